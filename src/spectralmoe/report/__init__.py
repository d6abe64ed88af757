"""Reports: documents on one self-contained HTML page."""

from spectralmoe.report.documents import Document, as_document, read_documents
from spectralmoe.report.page import render_report

__all__ = ["Document", "as_document", "read_documents", "render_report"]

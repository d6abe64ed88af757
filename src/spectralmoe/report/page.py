"""The page: one HTML file with everything inside, from documents that were read."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import spectralmoe
from spectralmoe.errors import UserError
from spectralmoe.report.charts import comparison_data, inspection_data, monitor_data
from spectralmoe.report.documents import Document, as_document, tell_apart
from spectralmoe.report.encode import script_json
from spectralmoe.report.panels import make_panels
from spectralmoe.report.runs import history_data
from spectralmoe.report.schema import Inspection
from spectralmoe.report.schema_runs import Comparison, History, Monitor

__all__ = ["render_report"]

SCRIPTS = (
    *("core", "colour", "heat", "lines", "load", "training", "similarity"),
    *("spectra", "paths", "text", "examples", "tables", "estimates", "main"),
)
STYLES = ("base", "panels", "print")


def render_report(documents: Sequence[Document | Mapping[str, Any]], title: str) -> str:
    """The HTML of a page about ``documents``, read ones or JSON values in memory; several of a kind stand side by side.

    The page loads nothing from elsewhere; its content policy forbids that, and lets only its own script run.

    Raises:
        UserError: nothing to show; a value that is no document.
    """
    if not documents:
        raise UserError("a report needs at least one document")
    read = tell_apart([given if isinstance(given, Document) else as_document(given, title) for given in documents])
    bodies = [document.body for document in read]
    data = {
        "inspections": [inspection_data(body) for body in bodies if isinstance(body, Inspection)],
        "monitors": [monitor_data(body) for body in bodies if isinstance(body, Monitor)],
        "histories": [history_data(body) for body in bodies if isinstance(body, History)],
        "comparisons": [comparison_data(body) for body in bodies if isinstance(body, Comparison)],
    }
    script = '"use strict";\n(() => {\n' + "\n".join(_text(f"{name}.js") for name in SCRIPTS) + "\n})();"
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            about=[_about(document) for document in read],
            policy=f"default-src 'none'; script-src 'sha256-{hashed}'; style-src 'unsafe-inline'; img-src data:",
            style="\n".join(_text(f"{name}.css") for name in STYLES),
            script=script,
            data=script_json(data),
            version=spectralmoe.__version__,
            **make_panels(read),
        )
    )


def _about(document: Document) -> str:
    body: Any = document.body
    if isinstance(body, Inspection):
        model = body.model
        parts = [
            model.kind or model.name,
            model.dtype,
            "weights only, not run" if model.mode == "router-only" else "",
        ]
        return f"{body.title}: {', '.join(part for part in parts if part)}"
    kinds = {"monitor": "training run ", "history": "training of ", "receipt": "receipt of "}
    return kinds.get(document.kind, "") + str(body.title)


@cache
def _environment() -> Environment:
    loader = PackageLoader("spectralmoe.report", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def _text(name: str) -> str:
    return resources.files("spectralmoe.report").joinpath("templates", name).read_text(encoding="utf-8")

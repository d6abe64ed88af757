"""``llms.txt`` beside the start page: every page with its first sentence, for readers that are programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

__all__ = ["llms_lines", "setup"]


def llms_lines(app: Sphinx) -> Iterator[str]:
    """The file's lines: a heading for each part of the start page, a link for each page below it."""
    start = app.env.get_doctree(app.config.root_doc)
    yield from (f"# {app.config.project}", "", f"> {_sentence(start)}")
    for tree in start.findall(addnodes.toctree):
        yield from ("", f"## {tree['caption']}", "")
        for _, name in tree["entries"]:
            page = app.env.get_doctree(name)
            yield f"- {_link(app, name)}: {_sentence(page)}"
            for below in page.findall(addnodes.toctree):
                yield from (f"  - {_link(app, inner)}" for _, inner in below["entries"])


def _link(app: Sphinx, name: str) -> str:
    return f"[{app.env.titles[name].astext()}]({app.builder.get_target_uri(name)})"


def _sentence(page: nodes.document) -> str:
    """The first sentence of the first paragraph."""
    first = next(page.findall(nodes.paragraph), None)
    text = " ".join(first.astext().split()) if first is not None else ""
    return text.split(". ")[0].rstrip(".:") + "."


def _write(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        Path(app.outdir, "llms.txt").write_text("\n".join(llms_lines(app)) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Write the file when all pages are there."""
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

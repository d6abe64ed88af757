"""Docstrings of this library are plain text with formulas and code: a star or a bar in them is a star or a bar."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

__all__ = ["plain", "setup"]

_KEPT = re.compile(r":math:`[^`]*`|``[^`]*``|\*\*\w[^*]*\w\*\*")


def plain(lines: list[str]) -> list[str]:
    """The lines with every star and bar of the prose escaped, so that reStructuredText reads no markup in them.

    >>> plain(["(M, *S) of |x|, **not** ``*args``", ">>> 2 * 3", ".. math:: a * b"])
    ['(M, \\\\*S) of \\\\|x\\\\|, **not** ``*args``', '>>> 2 * 3', '.. math:: a * b']
    """
    text, kept = "\n".join(lines), []
    blocks = re.compile(r"^( *)(\.\. math::|>>> ).*\n?(?:(?!\s*$).*\n?|\n(?=\1  ))*", re.M)

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\0{len(kept) - 1}\0"

    text = _KEPT.sub(keep, blocks.sub(keep, text))
    text = re.sub(r"[*|]", r"\\\g<0>", text)
    while "\0" in text:
        text = re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], text)
    return text.split("\n")


def _process(app: Sphinx, *event: Any) -> None:
    lines = event[-1]
    lines[:] = plain(lines)


def _skip(app: Sphinx, *event: Any) -> bool | None:
    """Leave out the fields of a named tuple, which its own docstring tells; None: as autodoc does."""
    return True if str(event[2].__doc__).startswith("Alias for field number") else None


def setup(app: Sphinx) -> ExtensionMetadata:
    """Escape before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

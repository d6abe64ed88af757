"""Tables for documents: Markdown, and LaTeX for a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["latex_table", "markdown_table"]

_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
_NUMBER = re.compile(r"(?P<mean>[+-]?\d+(?:\.\d+)?)(?: ±(?P<half>\d+(?:\.\d+)?))?(?P<words>(?: [a-z ]+)?)")


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a table.

    >>> markdown_table(["row", "accuracy"], [["a|b", 97.5]])
    ['| row | accuracy |', '| --- | --- |', '| a\\\\|b | 97.5 |']
    """
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def latex_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    r"""The lines of a ``tabular`` with the rules of the package booktabs; estimates become mathematics.

    >>> print("\n".join(latex_table(["row", "accuracy %"], [["a_b", "97.10 ±0.35"]])))
    \begin{tabular}{lr}
    \toprule
    row & accuracy \% \\
    \midrule
    a\_b & $97.10 \pm 0.35$ \\
    \bottomrule
    \end{tabular}
    """
    body = [" & ".join(_latex(str(cell)) for cell in row) + r" \\" for row in rows]
    head = " & ".join(map(_latex, headings)) + r" \\"
    columns = "l" + "r" * (len(headings) - 1)
    rules = [r"\begin{tabular}{" + columns + "}", r"\toprule", head, r"\midrule"]
    return [*rules, *body, r"\bottomrule", r"\end{tabular}"]


def _latex(text: str) -> str:
    number = _NUMBER.fullmatch(text)
    if number is None:
        return "".join(_SPECIAL.get(letter, letter) for letter in text)
    half = f" \\pm {number['half']}" if number["half"] else ""
    return f"${number['mean']}{half}${number['words']}"

"""Equations as MathML, which browsers draw by themselves: no script, no font, no network."""

from __future__ import annotations

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

__all__ = ["mathml", "setup"]


def mathml(formula: str, *, block: bool = False) -> str:
    """A formula of LaTeX as MathML, by docutils' own converter; what it cannot read stops the build.

    >>> "<mi>x</mi>" in mathml("x")
    True
    """
    formula = re.sub(r"\\([bB]ig)(?![a-zA-Z])", r"\\\1l", formula)  # brackets that docutils knows by another name
    formula = re.sub(r"\\dots(?![a-zA-Z])", r"\\ldots", formula).replace(r"\textstyle", "")
    markup = str(tex2mathml(formula, as_block=block))
    return re.sub("<mo>([|‖])</mo>", r'<mo stretchy="false">\1</mo>', markup)


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{mathml(node.astext(), block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    """Let Sphinx draw equations so."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The documentation site, made of this repository: ``make docs`` writes it to build/site.

The source folder is the repository, so that links between its pages, cards and files lead where they lead on disk.
"""

import sys
from pathlib import Path

from spectralmoe import __version__

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "spectralmoe"
author = "The spectralmoe authors"
version = release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "plain_docstrings",
    "tables",
    "llms",
]

root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "papers/*/README.md",
    "papers/*/RESULTS.md",
    "benchmarks/**.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LOG.md",
    "SECURITY.md",
]
exclude_patterns = ["build", "src", "tests", ".*", "**/runs", "**/cells"]

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # release notes and experiments go on from day to day

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of torch say nothing of ours
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"spectralmoe {version}"
html_extra_path = ["root"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_search_summary = False  # which would fetch pages, and cannot from a disk
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

"""The documentation site: what its tables say, its formulas, and the whole built with warnings as errors."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from urllib.parse import unquote

import pytest
from browser_tools import all_of, errors, look, one
from pages import CARDS, ROOT

from spectralmoe.cli.app import run
from spectralmoe.experiments.cards.field import FIELD, field_table
from spectralmoe.presets import PRESETS

COMPARISONS = {"language", "methods"}
"""Cards that test no paper's method."""
NO_SECTION = "llep"
"""A method of the field that docs/methods.md leaves to docs/parallel.md."""


@pytest.fixture
def extension(monkeypatch):
    """A module of docs/extensions by name."""
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "extensions"))
    names = []

    def load(name):
        names.append(name)
        return import_module(name)

    yield load
    for name in names:
        del sys.modules[name]


def card_text(name):
    return (ROOT / "papers" / name / "README.md").read_text(encoding="utf-8")


def test_every_card_of_a_method_is_in_the_field():
    assert {item.card for item in FIELD} | COMPARISONS == {page.split("/")[1] for page in CARDS}
    assert len({item.name for item in FIELD}) == len(FIELD)


@pytest.mark.parametrize("item", FIELD, ids=lambda item: item.card)
def test_the_field_says_what_is_there(item, extension):
    assert all((ROOT / "src" / "spectralmoe" / file).is_file() for file in item.files)
    assert set(item.rows) <= PRESETS.keys()
    text = card_text(item.card)
    assert item.arxiv in text
    assert extension("claims").read_verdict(text) == item.verdict


def test_the_field_and_the_page_of_methods_name_the_same_files():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    named = {item.card: set() for item in FIELD}
    for part in page.split("\n### ")[1:]:
        for card in set(re.findall(r"papers/([\w-]+)/README", part)) & named.keys():
            named[card] |= set(re.findall(r"\]\(\.\./src/spectralmoe/([\w/]+\.py)\)", part))
    assert {item.card: set(item.files) for item in FIELD if item.card != NO_SECTION} == {
        card: files for card, files in named.items() if card != NO_SECTION
    }


def test_claims_of_cards(extension):
    claims = extension("claims")
    for item in FIELD:
        found = claims.read_claims(card_text(item.card))
        assert found, item.card
        assert {claim.outcome for claim in found} <= set(claims.OUTCOMES), item.card
        assert (item.verdict == "open") == all(claim.outcome == "open" for claim in found), item.card
        others = " ".join(line for line in card_text(item.card).splitlines() if not line.startswith("|"))
        results = ROOT / "papers" / item.card / "RESULTS.md"
        known = " ".join([others, *(results.read_text(encoding="utf-8") if results.exists() else "").split()])
        for claim in found:
            for figure in re.findall(r"\d*\.?\d+ ±\d*\.?\d+", claim.here):
                assert figure in " ".join(known.split()), (item.card, figure)
    table = claims.claim_table(ROOT / "papers", [item.card for item in FIELD], "../papers")
    assert len(table) == 2 + sum(len(claims.read_claims(card_text(page.split("/")[1]))) for page in CARDS)
    assert sum("| [language](" in row for row in table) == 3


def test_versions_are_those_of_the_project(extension):
    rows = extension("versions").version_table(ROOT)
    assert any(row.startswith("| torch | 2.") and "| everything |" in row for row in rows)
    assert any(row.startswith("| transformers | 5.") and "hf" in row for row in rows)
    assert not any("pytest" in row or "sphinx" in row for row in rows)


def test_a_version_has_its_reason(extension, tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nrequires-python = ">=3.11"\nclassifiers = ["Programming Language :: Python :: 3.11"]\n'
        'dependencies = ["torch>=2.11"]\n[project.optional-dependencies]\nhf = ["transformers>=5.20"]\n'
    )
    (tmp_path / "constraints.txt").write_text("torch==2.15.0\n")
    (tmp_path / "constraints-min.txt").write_text("torch==2.11.0  # older ones lack a name\ntransformers==5.20.0\n")
    assert extension("versions").version_table(tmp_path)[2:] == [
        "| Python | 3.11 | 3.11 | everything | settings are read by tomllib, which 3.10 lacks |",
        "| torch | 2.11 | 2.15.0 | everything | older ones lack a name |",
        "| transformers | 5.20 |  | hf | no older one was tried |",
    ]


def test_defaults_of_options_are_shown(extension):
    lines = extension("tables").command_lines()
    assert any(line.startswith("| `--experts` |") and line.endswith("| `8` |") for line in lines)
    assert any(line.startswith("| `--keep` |") and line.endswith("| must be given |") for line in lines)
    assert not any("False" in line or "None" in line.rpartition("|")[0].rpartition("|")[2] for line in lines)


def test_list_prints_the_field(capsys):
    assert run(["list", "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines() == field_table()
    assert run(["list", "--markdown", "--json"]) == 2


@pytest.mark.parametrize("name", ["mathml", "plain_docstrings", "claims"])
def test_examples_of_extensions(name, extension):
    assert doctest.testmod(extension(name)).failed == 0


def test_every_formula_can_be_drawn(extension):
    mathml = extension("mathml").mathml
    count = 0
    for path in sorted((ROOT / "src" / "spectralmoe").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        formulas = re.findall(r":math:`([^`]+)`", text) if "_FORMULA" not in text else []
        formulas += [m[2] + m[3] for m in re.finditer(r"^( *)\.\. math::(.*)\n((?:\1 +.*\n|\s*\n)*)", text, re.M)]
        for formula in formulas:
            assert mathml(" ".join(formula.split())).startswith("<math"), path
        count += len(formulas)
    assert count > 100


def test_every_public_package_has_a_page():
    pages = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    inside = {"draw", "checkpoints", "training", "experiments", "bench", "cli", "report", "data", "integrations"}
    for init in (ROOT / "src" / "spectralmoe").glob("*/__init__.py"):
        name = init.parent.name
        assert f"automodule:: spectralmoe.{name}\n" in pages or name in inside, name


class Page(HTMLParser):
    """What an HTML page links to, loads, and offers as targets."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        key = {"script": "src", "img": "src", "link": "href", "iframe": "src"}.get(tag)
        if key and values.get(key):
            self.loads.append(values[key])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built as ``make docs`` builds it."""
    for package in ("furo", "myst_parser", "sphinx_copybutton"):
        pytest.importorskip(package)
    where = tmp_path_factory.mktemp("docs")
    rule = re.search(r"^docs:.*\n\t\$\(BIN\)/sphinx-build (.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    words = rule.replace("build/", f"{where}/").split()
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return where / "site"


@pytest.mark.full
@pytest.mark.slow
def test_the_site_is_whole(site):
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 60
    assert [path.name for path in pages if path.stat().st_size > 1_000_000] == []
    for path, page in pages.items():
        assert [name for name in page.loads if re.match(r"(https?:)?//", name)] == [], path
        for link in [*page.links, *page.loads]:
            if re.match(r"[a-z]+:", link) or link in ("#", "") or "searchindex" in link:
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / unquote(name.partition("?")[0])).resolve() if name else path
            assert target.exists(), (path.name, link)
            if anchor and target in pages and not anchor.startswith("/"):
                assert unquote(anchor) in pages[target].ids or anchor in ("top", "furo-main-content"), (path.name, link)
    style = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style)
    listed = re.findall(r"\]\(([^)]+\.html)\)", (site / "llms.txt").read_text(encoding="utf-8"))
    assert len(listed) > 40
    assert [name for name in listed if not (site / name).is_file()] == []


@pytest.fixture
def wide(browser):
    """``wide(width)``: the browser with pages so wide."""
    yield lambda width: look(browser, width)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize(
    "page", ["docs/index", "docs/gallery", "docs/methods", "papers/emoe/README", "docs/api/scorers", "search"]
)
def test_pages_say_no_error_and_fit(page, width, site, browser, wide):
    wide(width)
    browser.get_log("browser")
    browser.get((site / f"{page}.html").as_uri())
    assert errors(browser) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    broken = "return [...document.images].filter((i) => i.loading != 'lazy' && !i.naturalWidth).map((i) => i.src)"
    assert browser.execute_script(broken) == []


@pytest.mark.full
@pytest.mark.slow
def test_search_finds(site, browser):
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get((site / "docs" / "index.html").as_uri())
    browser.get_log("browser")
    one(browser, ".sidebar-search").send_keys("load_balance\n")
    found = WebDriverWait(browser, 60).until(lambda _: all_of(browser, "#search-results li a"))
    assert any("regularizers" in link.get_attribute("href") for link in found)
    assert errors(browser) == []

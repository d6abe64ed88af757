"""Every measured number of README, docs, cards and benchmarks stands in a file of the repository or carries its source.

1. The figures of a sentence in ``number_places.PLACES`` stand where it says.
2. A table in ``number_places.TABLES`` stands in the JSON files of its section.
3. A card's intervals stand in its RESULTS.md, which ``papers/test_verdicts.py`` holds to the stored cells; what its
   plan sets stands in its code; what its claim repeats has the paper as its source.

What has none of these is reported. ``figures.py`` says which numbers are measured.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain

import pytest
from figures import Figure, Group, Passage, column, figure_at, figures, groups, passages, stands
from number_places import BENCHMARKS, PLACES, SIZES_OF_BANKS, TABLES, Place
from pages import CARDS, PAGES, ROOT
from papers.test_stored_sentences import SENTENCES as COMPUTED

NUMBERED = [*PAGES, "CHANGELOG.md", BENCHMARKS, SIZES_OF_BANKS, *CARDS]
PLANNED = re.compile(
    "Plan|What is measured|What is known|Run it|The protocol|The command|What differs|The default form"
)
COMPUTED_TABLES = ("interference", "accuracy", "with the guard", "a hundred in a row", "row", "change")
"""First columns of the tables of sr-moe and emoe that papers/test_stored_figures.py computes from the cells."""
SIZES = re.compile(r"\| (\d+), (\d+), (\d+), (\d+), (\d+)")
UNITS = {"MFLOP/sample": "million", "MB": "MB"}
"""Columns whose numbers have a unit in the title alone."""
NUMBER = r"()[+-]?[\d.,]*\d(?: ±[\d.]+)?(?:\*\*)?(?: \([\d.]+ to [\d.]+\))?"
"""A number with its interval; the empty group lies where it starts."""


@cache
def found_in(place: str) -> Sequence[Group]:
    name, *parts = place.split(" > ")
    return groups(ROOT / name, *parts)


def starts(sentence: str, text: str) -> list[int]:
    """Where the numbers of a sentence start in a passage, as often as it stands there."""
    pattern = NUMBER.join(re.escape(part) for part in sentence.split("#"))
    return [match.start(group + 1) for match in re.finditer(pattern, text) for group in range(sentence.count("#"))]


def listed(page: str, passage: Passage) -> Iterator[tuple[Figure, Place]]:
    """The numbers of a passage that sentences of the list speak of, measured or not, and their places."""
    measured = {figure.start: figure for figure in figures(passage.text)}
    for sentence, place in PLACES.get(page, ()):
        for start in starts(sentence, passage.raw):
            yield measured.get(start) or figure_at(passage.raw, start), place


@cache
def computed(page: str, passage: Passage) -> set[int]:
    """Where the numbers start that the cards' own tests compute from the cells."""
    card = page.split("/")[1] if page in CARDS else ""
    found = {start for name, sentence, _ in COMPUTED if name == card for start in starts(sentence, passage.raw)}
    if card in ("sr-moe", "emoe") and passage.titles and passage.titles[0] in COMPUTED_TABLES:
        found |= {figure.start for figure in figures(passage.text)}
    return found


def by_rule(page: str, passage: Passage, figure: Figure) -> Sequence[Group] | str:
    """Where a figure has to stand that no sentence speaks of, or what answers for it."""
    title = passage.titles[column(passage, figure.start)] if passage.titles else ""
    if passage.titles and title == passage.titles[0]:
        return "label"
    if figure.start in computed(page, passage):
        return "computed"
    table = (passage.heading.split(",")[0], *passage.titles[1:2])
    if table in TABLES:
        sizes = SIZES.match(passage.raw)
        under = " > N{} D{} H{} E{} k{}".format(*sizes.groups()) if sizes else ""
        return list(chain.from_iterable(found_in(place + under) for place in TABLES[table]))
    if page not in CARDS:
        return []
    if title == "paper" or passage.heading == "The claim" or passage.raw.startswith("**Claim"):
        return "paper"
    folder = page.removesuffix("/README.md")
    if PLANNED.match(passage.heading):
        files = sorted(path.name for path in (ROOT / folder).iterdir() if path.name.endswith((".py", "settings.json")))
        return list(chain.from_iterable(found_in(f"{folder}/{name}") for name in files))
    return found_in(f"{folder}/RESULTS.md") if figure.beside else []


def checked(page: str, text: str) -> Iterator[tuple[Passage, Figure, Sequence[Group] | str, bool]]:
    """The measured numbers of a page: passage, figure, where it has to stand, and whether its size alone counts."""
    for passage in passages(text):
        spoken_of = set()
        for figure, place in listed(page, passage):
            spoken_of.add(figure.start)
            if isinstance(place, str) and place.startswith("cites: "):
                yield passage, figure, "cited" if place.removeprefix("cites: ") in passage.raw else [], True
            else:
                yield passage, figure, found_in(place) if isinstance(place, str) else [Group((v,)) for v in place], True
        for figure in figures(passage.text):
            if figure.start not in spoken_of:
                title = passage.titles[column(passage, figure.start)] if passage.titles else ""
                full = figure._replace(unit=figure.unit or UNITS.get(title, ""))
                yield passage, full, by_rule(page, passage, figure), False


def lost(page: str, text: str) -> list[str]:
    """The measured numbers of a page that stand nowhere."""
    return [
        f"{figure.number}{figure.unit}, in: {passage.raw[max(0, figure.start - 60) : figure.start + 40]}"
        for passage, figure, among, size in checked(page, text)
        if not isinstance(among, str) and not stands(figure, among, size=size)
    ]


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", NUMBERED)
def test_every_measured_number_stands_somewhere(page):
    assert lost(page, text_of(page)) == []


@pytest.mark.parametrize("page", PLACES)
def test_every_sentence_of_the_list_is_on_its_page(page):
    text = " ".join(text_of(page).split())
    assert [sentence for sentence, _ in PLACES[page] if not starts(sentence, text)] == []


@pytest.mark.parametrize("page", CARDS)
def test_a_card_cites_the_paper_whose_numbers_it_repeats(page):
    repeats = [figure for _, figure, among, _ in checked(page, text_of(page)) if among == "paper"]
    assert not repeats or re.search(r"\b\d{4}\.\d{5}\b", text_of(page))


PAGE = """# A card

**Verdict.** It is ahead by 0.53 ±0.06 dB (half: 1.5 ms), and `code 9.9` is passed over.

| row | PSNR |
| --- | --- |
| mor | 21.97 ±0.05 |

```sh
run --rate 0.3
```
"""


def test_a_wrong_number_is_found(monkeypatch):
    page = "papers/mor/README.md"
    monkeypatch.setitem(PLACES, page, [("(half: # ms)", [1.5])])
    assert lost(page, PAGE) == []
    for right, wrong in [
        ("0.53", "9.54"),
        ("±0.06", "±0.99"),
        ("1.5", "1.6"),
        ("21.97", "29.98"),
        ("half:", "or"),
        ("`code 9.9`", "code 9.9"),
    ]:
        assert len(lost(page, PAGE.replace(right, wrong))) == 1, wrong


def moved(figure: Figure, step: int) -> Figure:
    """A figure that is wrong by some units of its last digit."""
    digits = len(figure.number.partition(".")[2])
    sign = "+" if figure.number[0] in "+-" else ""
    return figure._replace(number=f"{float(figure.number) + step * 10.0**-digits:{sign}.{digits}f}")


def test_of_numbers_that_are_slightly_wrong_nearly_all_are_found():
    """A number that is off by three units of its last digit may stand where it should by chance."""
    tried, missed = Counter[str](), Counter[str]()
    for page in NUMBERED:
        for passage, figure, among, size in checked(page, text_of(page)):
            if not isinstance(among, str):
                kind = "settings" if PLANNED.match(passage.heading) else "intervals" if figure.beside else "others"
                tried[kind] += 2
                missed[kind] += sum(stands(moved(figure, step), among, size=size) for step in (-3, 3))
    shares = {kind: missed[kind] / tried[kind] for kind in tried}
    assert shares["intervals"] < 0.06
    assert shares["others"] < 0.25

"""Every number in the cards' tables is that of the stored cells, computed anew; bold is only what seeds separate."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev

import pytest
from markdown_tables import agrees, numbers, plain, rows_of

from spectralmoe.adaptation import COPIES

PAPERS = Path(__file__).parents[2] / "papers"
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
DATASETS = ("fashion-mnist", "mnist5k")

CARRY = {f"{kind.text} right %": (f"{key}_after", 100.0) for key, kind in COPIES.items()}
SR_MOE = {
    "accuracy %": ("accuracy", 1.0),
    "accuracy": ("accuracy", 1.0),
    "interference, mean": ("interference_mean", 1.0),
    "interference": ("interference_mean", 1.0),
    "worst trial": ("interference_worst", 1.0),
    "success %": ("success", 100.0),
    "smallest load share": ("min_load_share", 1.0),
    "stable rank": ("stable_rank", 1.0),
    **CARRY,
}
STREAMS = {"success %": ("success", 100.0), "cost": ("cost", 1.0), "kept %": ("kept", 100.0), **CARRY}
EMOE = {
    "accuracy %": ("accuracy", 1.0),
    "accuracy": ("accuracy", 1.0),
    "MaxVio": ("maxvio", 1.0),
    "Gini": ("gini", 1.0),
    "dead": ("dead", 1.0),
    "dead of 16": ("dead", 1.0),
    "smallest load share": ("min_load_share", 1.0),
    "output cos²": ("output_cos2", 1.0),
    "entropy": ("entropy", 1.0),
    "changed by noise": ("changed_by_noise", 1.0),
    "step, ms": ("step_ms", 1.0),
}


def stored(card, name="results"):
    return json.loads((PAPERS / card / f"{name}.json").read_text(encoding="utf-8"))


def text(card, name):
    return (PAPERS / card / name).read_text(encoding="utf-8")


def chosen(cells, **wanted):
    return [cell for cell in cells if all(cell[key] == value for key, value in wanted.items())]


def paired(cells, key, row, baseline):
    """Differences under the seeds that both rows have on one processor."""
    other = {(cell["seed"], cell["cpu"]): cell[key] for cell in chosen(cells, row=baseline)}
    pairs = [(cell[key], other.get((cell["seed"], cell["cpu"]))) for cell in chosen(cells, row=row)]
    return [a - b for a, b in pairs if a is not None and b is not None]


def interval(values):
    """(mean, half width), the second 0 for one value."""
    return fmean(values), T95[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def is_estimate(field, values, scale=1.0):
    """Whether a field reads ``mean ±half`` of the values, or their mean alone."""
    values = [value for value in values if value is not None]
    written = numbers(field)
    if not values:
        return plain(field) in ("-", "")
    expected = interval(values)
    return bool(written) and all(agrees(w, e, scale) for w, e in zip(written, expected, strict=False))


def is_difference(field, values, scale=1.0):
    """The same with its word."""
    if not values:
        return field == "-"
    if not any(values):
        return field == "same"
    mean, half = interval(values)
    word = "one seed" if len(values) == 1 else "separated" if abs(mean) > half else "not"
    return is_estimate(field, values, scale) and plain(field).endswith(word)


def test_the_tables_of_sr_moe_results():
    cells, seen = stored("sr-moe"), 0
    for heading, fields in rows_of(text("sr-moe", "RESULTS.md")):
        dataset = next((name for name in DATASETS if heading.startswith(name)), None)
        if dataset is None:
            continue
        mine = chosen(cells, dataset=dataset, depth=int(fields["depth"]))
        if "minus" in fields:
            for title in fields.keys() - {"row", "minus", "depth", "seeds"}:
                key, scale = SR_MOE[title]
                values = paired(mine, key, fields["row"], fields["minus"])
                assert len(values) == int(fields["seeds"])
                assert is_difference(fields[title], values, scale), (heading, fields, title)
                seen += 1
            continue
        own = chosen(mine, row=fields["row"])
        assert len(own) == int(fields["seeds"])
        for title in fields.keys() - {"row", "depth", "seeds", "cpu"}:
            key, scale = SR_MOE[title]
            assert is_estimate(fields[title], [cell[key] for cell in own], scale), (heading, fields, title)
            seen += 1
    assert seen > 300


def test_the_streams_of_sr_moe_results():
    streams = stored("sr-moe", "streams")
    rows = [fields for heading, fields in rows_of(text("sr-moe", "RESULTS.md")) if heading == "Corrections in a row"]
    assert sum(int(fields["seeds"]) for fields in rows) == len(streams)
    shown = [fields for _, fields in rows_of(text("sr-moe", "README.md")) if "a hundred in a row" in fields]
    assert len(shown) == len(rows)
    for fields in (*rows, *shown):
        dataset = plain(fields.get("data") or fields["a hundred in a row"])
        own = chosen(streams, dataset=dataset, depth=int(fields["depth"]))
        for title in fields.keys() & STREAMS.keys():
            key, scale = STREAMS[title]
            assert is_estimate(fields[title], [cell[key] for cell in own], scale), (fields, title)


def test_the_tables_of_emoe_results():
    results, ablations, shots, seen = stored("emoe"), stored("emoe", "ablations"), stored("emoe", "fewshot"), 0
    for heading, fields in rows_of(text("emoe", "RESULTS.md")):
        if heading.startswith("Few-shot"):
            task = next(name for name in ("new classes", "mnist5k") if name in heading)
            for title in (title for title in fields if title.endswith(" shots")):
                mine = chosen(shots, task=task, shots=int(title.split()[0]))
                if "minus" in fields:
                    assert is_difference(fields[title], paired(mine, "accuracy", fields["row"], fields["minus"]))
                else:
                    assert is_estimate(fields[title], [c["accuracy"] for c in chosen(mine, row=fields["row"])])
                seen += 1
            continue
        for title in fields.keys() & EMOE.keys():
            key = EMOE[title][0]
            if "minus" in fields:
                ok = is_difference(fields[title], paired(results, key, fields["row"], fields["minus"]))
            elif "variant" in fields:
                ok = is_estimate(fields[title], [c[key] for c in chosen(ablations, variant=fields["variant"])])
            else:
                ok = is_estimate(fields[title], [c[key] for c in chosen(results, row=fields["row"])])
            assert ok, (heading, fields, title)
            seen += 1
    assert seen > 200


def test_the_tables_of_the_sr_moe_card():
    """The first column names the measure; the others a row, or one row minus another."""
    cells, seen = stored("sr-moe"), 0
    for _, fields in rows_of(text("sr-moe", "README.md")):
        measure = next(iter(fields))
        if measure not in SR_MOE and measure != "with the guard":
            continue
        mine = chosen(cells, dataset=plain(fields[measure]), depth=int(fields["depth"]))
        for title in list(fields)[2:]:
            if measure == "with the guard":
                key, scale = SR_MOE[title]
                assert is_estimate(fields[title], [c.get(key) for c in chosen(mine, row="SR-MoE+guard")], scale)
            elif " minus " in title:
                key, scale = SR_MOE[measure]
                assert is_difference(fields[title], paired(mine, key, *title.split(" minus ")), scale), (fields, title)
            else:
                key, scale = SR_MOE[measure]
                assert is_estimate(fields[title], [c[key] for c in chosen(mine, row=title)], scale), (fields, title)
            seen += 1
    assert seen > 50


def test_the_tables_of_the_emoe_card():
    results, ablations, seen = stored("emoe"), stored("emoe", "ablations"), 0
    names = {"none": "EMoE", "whole directions instead of sides": "whole directions, r = E"}
    for _, fields in rows_of(text("emoe", "README.md")):
        if "dead of 16" in fields:
            for title in fields.keys() & EMOE.keys():
                own = [cell[EMOE[title][0]] for cell in chosen(results, row=plain(fields["row"]))]
                assert is_estimate(fields[title], own), (fields, title)
                seen += 1
        elif "change" in fields:
            (own,) = chosen(ablations, variant=names.get(plain(fields["change"]), plain(fields["change"])))
            for title in fields.keys() & EMOE.keys():
                assert agrees(numbers(fields[title])[0], own[EMOE[title][0]]), (fields, title)
                seen += 1
    assert seen > 80


def separated_from_all(cells, key, row, others):
    for other in others:
        values = paired(cells, key, row, other)
        if len(values) < 2:
            return False
        mean, half = interval(values)
        if abs(mean) <= half:
            return False
    return True


@pytest.mark.parametrize("card", ["sr-moe", "emoe"])
def test_bold_is_only_what_the_seeds_separate_from_all_others(card):
    cells = stored(card)
    assert "**" not in text(card, "RESULTS.md")
    for _, fields in rows_of(text(card, "README.md")):
        bold = [title for title, field in fields.items() if field.startswith("**")]
        if card == "emoe" and "dead of 16" in fields:
            others = [row for row in {cell["row"] for cell in cells} if row not in (plain(fields["row"]), "dense")]
            for title in set(bold) - {"row"}:
                assert separated_from_all(cells, EMOE[title][0], plain(fields["row"]), others), (fields, title)
        elif card == "sr-moe" and next(iter(fields)) in SR_MOE:
            measure, rows = next(iter(fields)), [title for title in list(fields)[2:] if " minus " not in title]
            mine = chosen(cells, dataset=plain(fields[measure]), depth=int(fields["depth"]))
            for title in bold:
                others = [row for row in rows if row != title]
                assert separated_from_all(mine, SR_MOE[measure][0], title, others), (fields, title)
        else:
            assert not bold, fields

"""The memory card: what its rows do to a network, and a tiny run end to end."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

from spectralmoe.experiments.cards import run_card, small_images
from spectralmoe.layers import moe_layers

CARD = Path(__file__).parents[2] / "papers" / "memory"


@pytest.fixture(scope="module")
def sizes(card):
    vit = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    run = small_images(96, 1, k=1, bottleneck=8, experts=4)
    run = run.model_copy(update={"data": "digits", "backbone": run.backbone.model_copy(update={"arguments": vit})})
    return card.Sizes(run, validated=20, tested=40, seeds=1)


@pytest.mark.full
def test_a_tiny_run_holds_every_row(card, sizes, tmp_path):
    for ran in (True, False):  # a rerun does only what is missing
        count, notes = run_card(card.card(sizes), tmp_path, tmp_path / "work", 1, lambda *text: None)
        assert ((count > 0), notes) == (ran, [])
    cells = json.loads((tmp_path / "results.json").read_text())
    assert [cell["network"] for cell in cells] == list(card.NETWORKS)
    assert all(cell["none/clean/changed"] == 0 for cell in cells)
    rows = card.by_row(cells)
    assert all(row.keys() >= {column.key for column in (*card.ACCURACIES, *card.ROUTING)} for row in rows)
    tuned = json.loads((tmp_path / "tuning.json").read_text())
    assert {len(tuned[f"bare: {row}"]["tries"]) for row, one in card.ROWS.items() if one.tunable} == {4}


def test_rows_share_the_network_and_differ_in_what_they_align(card, sizes):
    from rows import aligned, behaviour, shifted

    network, task, _ = card.trained(sizes, "layernorm", 1.0, 0)
    assert all(int(layer.memory.updates) == 2 for layer in moe_layers(network).values())
    images = task.labelled("test")[0][:40]
    bright, weights = shifted(images, "brightness", 0), dict(network.named_parameters())
    seen = {}
    for name, row in card.ROWS.items():
        twin = aligned(network, row, least=2, unlabelled=bright, two_classes=card.of_two_classes(task, 0))
        assert all(torch.equal(value, weights[key]) for key, value in twin.named_parameters())
        seen[name] = {key: layer.memory for key, layer in moe_layers(twin).items()}
        assert behaviour(twin, bright)[1].shape == (2, 40 * 5)
    assert set(seen["none"].values()) == {None}
    for one, two in (("router", "router, two classes"), ("router", "layer, stream")):
        means = [next(iter(seen[row].values())).mean for row in (one, two)]
        assert torch.equal(*means) == (two == "layer, stream")
    assert all(int(memory.stream_count) == 40 * 5 for memory in seen["layer, stream"].values())
    assert all(int(memory.stream_count) == 0 for memory in seen["layer"].values())


def test_shifts_stay_within_the_pixels_and_occlusion_blackens_a_quarter(card):
    from rows import SHIFTS, shifted

    images = torch.full((3, 1, 8, 8), 0.9)
    assert all(0 <= float(shifted(images, s, 0).min()) <= float(shifted(images, s, 0).max()) <= 1 for s in SHIFTS)
    assert (shifted(images, "occlusion", 0) == 0).flatten(1).sum(1).tolist() == [16, 16, 16]
    assert torch.equal(shifted(images, "clean", 0), images)
    assert not torch.equal(shifted(images, "noise", 0), shifted(images, "noise", 1))

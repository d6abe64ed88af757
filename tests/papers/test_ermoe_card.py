"""The ERMoE card: rows start alike, its control reads nobody's bases, and what its own measures mean."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

from spectralmoe import BasisScorer, EigenExperts, MoE, Router, attach, record
from spectralmoe.context import Context
from spectralmoe.experiments.cards import Contest, run_card
from spectralmoe.linalg import orthonormality_error
from spectralmoe.presets import find_preset
from spectralmoe.selectors import Threshold
from spectralmoe.training.settings.run import TrainSettings

CARD = Path(__file__).parents[2] / "papers" / "ermoe"
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
RUN = TrainSettings(
    data="digits",
    train_size=32,
    backbone={"name": "vit_tiny_patch16_224", "arguments": VIT},
    moe={"kind": "replace_mlp", "init": "random", "blocks": "all", "experts": 4, "k": 2, "bottleneck": 8},
    optimization={"epochs": 1, "batch_size": 32},
)


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, tmp_path):
    form = card.card(Contest(RUN, card.ROWS, tries=2, more=card.about_bases), 1)
    for ran in (True, False):  # a rerun does only what is missing
        count, _ = run_card(form, tmp_path, tmp_path / "work", 1, lambda text, done: None)
        assert (count > 0) == ran
    cells = json.loads((tmp_path / "results.json").read_text())
    assert [cell["row"] for cell in cells] == list(card.ROWS)
    optional = {"eligible"}
    assert all(cell.keys() >= {column.key for column in card.COLUMNS} - optional for cell in cells)
    assert [cell["row"] for cell in cells if "eligible" not in cell] == ["linear", "linear+balanced"]
    assert len({len(row["tries"]) for row in json.loads((tmp_path / "tuning.json").read_text()).values()}) == 1


def layer_of(card, row, dim=8, experts=4):
    preset = find_preset(card.ROWS[row])
    return MoE(preset.make_router(dim, experts, k=2), preset.make_experts(experts, dim, 8))


@pytest.mark.parametrize("row", ["context", "context, random", "context, free"])
def test_the_control_reads_nobodys_bases_and_the_ablation_leaves_its_form(card, row):
    layer, x, attended = layer_of(card, row), torch.randn(40, 8), torch.randn(40, 8)
    context = Context(tokens={"attended": attended})
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    attach(optimizer, layer)
    before = layer.router(x, context=context).logits.detach()
    for _ in range(3):
        (layer(x, context=context) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    same = torch.equal(layer.router(x, context=context).logits, before)
    assert same == (row == "context, random")
    assert (float(orthonormality_error(layer.experts.right).max()) > 1e-3) == (row == "context, free")


def test_likeness_of_bases_is_0_for_blocks_of_one_matrix_and_1_for_equal_ones(card):
    from measure import basis_overlap

    bases = EigenExperts(4, 8, 2).right.detach()
    assert basis_overlap(bases) == pytest.approx(0, abs=1e-10)
    assert basis_overlap(bases[:1].expand(3, -1, -1) * torch.tensor([1.0, -2.0, 3.0])[:, None, None]) == pytest.approx(
        1
    )


def test_eligible_and_flips_are_shares(card):
    from measure import eligible, flips, used

    bank = EigenExperts(2, 2, 1)
    bank.right.data = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])
    router = Router(BasisScorer(2, 2, score="energy"), Threshold(1, 0.6, normalize=False, fallback="none"))
    layer = MoE(router, bank)

    def looked_at(*tokens):
        with record(layer, keep=("tokens",)) as tape:
            layer(torch.tensor(tokens))
        return [measure(tape[0]) for measure in (eligible, used, flips)]

    assert looked_at([1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.9, 0.1]) == [3 / 8, 3 / 4, 0]
    border = looked_at(*[[0.6**0.5, 0.4**0.5]] * 100)
    assert 0.2 < border[2] < 0.8

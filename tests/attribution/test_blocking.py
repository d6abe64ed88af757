"""``block``: what routers decide without some experts, and that nothing else and nothing later changes."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from spectralmoe import (
    Balanced,
    CosineScorer,
    FeedForward,
    LinearScorer,
    MoE,
    Placement,
    Router,
    Soft,
    TopK,
    UserError,
    feed,
    record,
)
from spectralmoe.attribution import block
from spectralmoe.hf import swap_routers
from spectralmoe.selectors import GroupLimited

E, WIDTH = 6, 8
SELECTORS = {
    "topk": lambda: TopK(2, normalize=True),
    "sigmoid": lambda: TopK(2, score="sigmoid"),
    "balanced": lambda: Balanced(2),
    "soft": Soft,
}


def layer(selector=None, scorer=LinearScorer) -> MoE:
    made = MoE(Router(scorer(WIDTH, E), selector or TopK(2, normalize=True)), FeedForward(E, WIDTH, 5))
    for part in made.router.selector.modules():
        if isinstance(part, Balanced):
            part.bias.copy_(torch.linspace(1, 0, E))  # lifts the first experts, those that are blocked too
    return made.eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(20, WIDTH)


@pytest.mark.parametrize("name", SELECTORS)
def test_mask_is_the_pruned_router_and_zero_the_sum_without_them(name, x, close):
    model = layer(SELECTORS[name](), CosineScorer)
    blocked, kept = [0, 3], [1, 2, 4, 5]
    pruned = MoE(model.router.select(kept), model.experts.select(kept)).eval()
    with block(model, {"": blocked}), record(model) as tape:
        masked = model(x)
    close(masked, pruned(x))
    assert tape[0].routing.counts()[blocked].tolist() == [0, 0]
    with block(model, {"": blocked}, mode="zero"), record(model) as tape:
        zeroed = model(x)
    gates = model.router(x).gates()
    want = sum(gates[:, e, None] * model.experts.expert(x, e) for e in kept)
    close(zeroed, want)
    assert torch.equal(tape[0].routing.indices, model.router(x).indices)


def test_empty_blocks_are_the_identity_and_nothing_stays_behind(x):
    model = layer()
    plain = model(x)
    for experts in ({}, {"": []}):
        for mode in ("mask", "zero"):
            with block(model, experts, mode=mode):
                assert torch.equal(model(x), plain)
    with pytest.raises(ZeroDivisionError), block(model, {"": [0]}):
        raise ZeroDivisionError
    assert torch.equal(model(x), plain)
    assert not any(module._forward_hooks for module in model.modules())


def test_blocks_nest_in_either_order_and_mode(x, close):
    model = layer()
    with block(model, {"": [0, 1]}), record(model) as tape:
        both = model(x)
    with block(model, {"": [0]}), block(model, {"": [1]}):
        close(model(x), both)
    counts = tape[0].routing.counts()
    silent = int(counts.argmax())
    with block(model, {"": [0, 1]}), block(model, {"": [silent]}, mode="zero"):
        want = model(x)
    with block(model, {"": [silent]}, mode="zero"), block(model, {"": [0, 1]}):
        close(model(x), want)
    assert not torch.allclose(want, both)
    with block(model, {"": [0]}):
        with block(model, {"": [1]}):
            pass
        with record(model) as tape:
            model(x)
    assert tape[0].routing.counts()[0] == 0
    assert tape[0].routing.counts()[1] > 0


def test_other_models_copies_and_threads_keep_all_experts(x):
    model, other = layer(), layer()
    plain, theirs, seen = model(x), other(x), []
    used = int(model.router(x).counts().argmax())
    with block(model, {"": [used]}):
        assert not torch.equal(model(x), plain)
        assert torch.equal(other(x), theirs)
        assert torch.equal(copy.deepcopy(model)(x), plain)
        thread = threading.Thread(target=lambda: seen.append(model(x)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], plain)


def test_the_mode_of_the_model_may_change_inside(x):
    model = layer(Balanced(2))
    with block(model, {"": [0]}):
        model.train()
        model(x)
        assert torch.isfinite(model.eval()(x)).all()


def test_a_placed_layer_and_side_layers_by_their_names(x, close):
    model = nn.Sequential(layer(), layer())
    placed = layer()
    placed = MoE(placed.router, placed.experts, placement=Placement([[5], [4], [3], [2], [1], [0]])).eval()
    with block(placed, {"": [2]}, mode="zero"):
        gates = placed.router(x).gates()
        close(placed(x), sum(gates[:, e, None] * placed.experts.expert(x, 5 - e) for e in range(E) if e != 2))
    with block(model, {"1": [0]}), record(model) as tape:
        model(x)
    assert tape.layer("1")[0].routing.counts()[0] == 0
    assert tape.layer("0")[0].routing.counts()[0] > 0


def test_mistakes_are_one_line(x):
    model = layer()
    grouped = layer(GroupLimited(TopK(2), groups=3, groups_on=1))
    for target, experts, mode, words in (
        (model, {"moe": [0]}, "mask", "unknown MoE layer 'moe'"),
        (model, {"": [E]}, "mask", f"has no expert {E}; it has 0 to 5"),
        (model, {"": [-1]}, "zero", "has no expert -1"),
        (model, {"": range(E)}, "mask", "all experts of layer '' are blocked"),
        (model, {"": range(5)}, "mask", r"without \[0, 1, 2, 3, 4\]: TopK: k=2 .*, or use mode=\"zero\""),
        (model, {"": [0]}, "drop", "unknown mode 'drop'"),
        (grouped, {"": [0]}, "mask", "equal groups of experts"),
        (nn.Linear(2, 2), {"": [0]}, "mask", "holds no MoE layer"),
        (torch.compile(model), {"": [0]}, "mask", "compiled"),
    ):
        with pytest.raises(UserError, match=words) as error, block(target, experts, mode=mode):
            pass
        assert "\n" not in str(error.value)
    with block(model, {"": range(E)}, mode="zero"):
        assert not model(x).any()
    with record(model) as tape:
        model(x)
    with pytest.raises(UserError, match="replayed"), block(model, {"": [0]}), feed(model, replay=tape):
        model(x)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "llama4", "glm4_moe"])
def test_stock_routers_decide_as_swapped_ones_do(family, close):
    pytest.importorskip("transformers")
    from families import left_padded, stock_of

    model = stock_of(family)
    inputs = left_padded(model)
    with record(model) as tape:
        plain = model(**inputs).logits
    name = tape[0].name
    used = int(tape[0].routing.counts().argmax())
    found = {}
    for routers in ("stock", "swapped"):
        swapped = swap_routers(model) if routers == "swapped" else None
        for mode in ("mask", "zero"):
            with record(model) as tape, block(model, {name: [used]}, mode=mode), record(model) as inner:
                found[routers, mode] = model(**inputs).logits, tape.layer(name)[0].routing
            assert torch.equal(found[routers, mode][1].indices, inner.layer(name)[0].routing.indices)
        if swapped is not None:
            swapped.undo()
    real = inputs["attention_mask"].bool()
    for mode in ("mask", "zero"):
        stock, ours = found["stock", mode], found["swapped", mode]
        close(stock[0][real], ours[0][real])
        assert not torch.allclose(stock[0][real], plain[real])
    assert found["stock", "mask"][1].counts()[used] == 0
    assert torch.equal(model(**inputs).logits, plain)

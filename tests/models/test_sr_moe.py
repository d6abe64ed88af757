"""The image network: its stages against the equations, and a fair start for every row of a comparison."""

import pytest
import torch
from seeds import shifted
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from spectralmoe import LinearScorer, PrototypeScorer, Router, Soft, TopK, UserError, load, record, save
from spectralmoe.experiments.compare.look import active_flops
from spectralmoe.models import SRMoE, Stage, VectorStem, prototype_router, sr_moe


def soft_prototypes(dim, experts):
    return Router(PrototypeScorer(dim, experts, temperature=0.25, scale=dim**-0.5), Soft())


def by_equation(model, z):
    """The stages, the last LayerNorm and the head on features z, expert by expert."""
    for stage in model.stages:
        linear, _, norm, *rest = stage.processor
        p = F.layer_norm(F.relu(z @ linear.weight.T + linear.bias), (12,), norm.weight, norm.bias)
        if rest:
            p = (p - rest[0].running_mean) / (rest[0].running_var + rest[0].eps).sqrt()
        scorer = stage.moe.router.scorer
        distance = (scorer.scale * p[:, None] - scorer.prototypes).square().sum(-1) / scorer.temperature
        weights = (-distance).softmax(-1)
        bank = stage.moe.experts
        y = torch.zeros_like(z)
        for e in range(4):
            hidden = F.relu(p @ bank.up[e].T + bank.up_bias[e])
            y += weights[:, e, None] * (hidden @ bank.down[e].T + bank.down_bias[e])
        z = z + y if stage.residual else y
    return F.layer_norm(z, (12,), model.norm.weight, model.norm.bias) @ model.head.weight.T + model.head.bias


def with_statistics(model, inputs):
    """The model in float64 and evaluation mode, after a few passes that moved its running statistics."""
    model = model.double().train()
    for _ in range(3):
        model(inputs + torch.randn_like(inputs))
    return model.eval()


@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_forward_is_the_equation(residual, centred, spare):
    sizes = {"width": 12, "depth": 3, "num_experts": 4, "hidden": 6, "spare": spare, "router": soft_prototypes}
    model = sr_moe(5, channels=2, residual=residual, centred=centred, mean=[0.3] * 2, std=[0.2] * 2, **sizes)
    images = torch.rand(4, 2, 9, 11, dtype=torch.float64)
    model = with_statistics(model, images)
    z = model.stem.project(model.stem.convolutions((images - 0.3) / 0.2).flatten(1))
    torch.testing.assert_close(model(images), by_equation(model, z), rtol=1e-10, atol=1e-10)
    model = sr_moe(5, features=7, residual=residual, centred=centred, **sizes)
    vectors = torch.randn(6, 7, dtype=torch.float64)
    model = with_statistics(model, vectors)
    z = vectors @ model.stem.project.weight.T + model.stem.project.bias
    torch.testing.assert_close(model(vectors), by_equation(model, z), rtol=1e-10, atol=1e-10)


def test_the_stem_calls_its_last_layer_and_keeps_the_order_of_its_inputs(close):
    stem, seen = sr_moe(5, channels=2).stem, []
    stem.project.register_forward_hook(lambda _, args, result: seen.append((args[0], result)))
    images = torch.rand(3, 2, 9, 11)
    features = stem(images)
    [(read, result)] = seen
    assert result is features
    close(read, stem.convolutions((images - 0.5) / 0.25).flatten(1))


def test_the_default_router_is_top_2_of_scaled_prototypes_with_a_selection_bias(close):
    router = prototype_router(16, 5).double()
    scorer, x = router.scorer, torch.randn(5, 16, dtype=torch.float64)
    rows = [[-(x[n] / 4 - mu).square().sum() for mu in scorer.prototypes] for n in range(5)]
    close(scorer(x), torch.stack([torch.stack(row) for row in rows]))
    router.selector.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]))
    routing = router(x)
    assert routing.indices.shape == (5, 2)
    assert (routing.indices == 2).any(1).all()
    assert prototype_router(16, 2)(torch.randn(3, 16)).soft


def test_centred_tokens_have_mean_zero_and_variance_one_in_training():
    model = sr_moe(3, features=6, width=8, depth=2, router=soft_prototypes).train()
    with record(model, keep=("input",)) as tape:
        model(torch.randn(64, 6))
    for item in tape:
        tokens = item.input[(item.order % 8).argsort(stable=True)][:64]
        assert float(tokens.mean(0).abs().max().detach()) < 1e-5
        assert float((tokens.var(0, correction=0) - 1).abs().max().detach()) < 1e-2


@pytest.mark.parametrize("centred", [True, False])
def test_rows_of_a_comparison_start_alike(centred):
    def network(scorer, spare=0):
        torch.manual_seed(shifted(0))
        return sr_moe(10, router=lambda d, e: Router(scorer(d, e), TopK(2)), centred=centred, spare=spare)

    first, second = network(LinearScorer).state_dict(), network(PrototypeScorer).state_dict()
    shared = [name for name in first if ".router." not in name]
    assert len(shared) > 20
    assert all(torch.equal(first[name], second[name]) for name in shared)
    third = network(LinearScorer, spare=3).state_dict()
    assert list(third) == list(first)
    for name, value in third.items():
        own = value[..., :32] if name.endswith("experts.down") else value
        own = own[:, :32] if name.endswith(("experts.up", "experts.up_bias")) else own
        assert torch.equal(own, first[name]), name


def test_classify_goes_on_from_any_stage():
    model = sr_moe(10, depth=3).eval()
    images = torch.rand(2, 1, 28, 28)
    features = model.stem(images)
    for first in range(3):
        torch.testing.assert_close(model.classify(features, first), model(images))
        features = model.stages[first](features)


@pytest.mark.parametrize("features", [None, 7])
def test_split_is_the_network_in_two(features):
    model = sr_moe(10, features=features, depth=3, num_experts=4).eval()
    x = torch.rand(5, 1, 9, 9) if features is None else torch.randn(5, features)
    with record(model) as whole:
        logits = model(x)
    for first in range(3):
        head, tail = model.split(f"stages.{first}.moe")
        assert not any(module.training for module in model.modules())
        between = head(x)
        with record(tail) as tape:
            assert torch.equal(tail(between), logits)
        assert [item.name for item in tape] == [item.name for item in whole][first:]
        for one, two in zip(tape, list(whole)[first:], strict=True):
            assert one.layer is two.layer
            assert torch.equal(one.routing.weights, two.routing.weights)
        own = {id(parameter) for parameter in model.parameters()}
        assert {id(parameter) for part in (head, tail) for parameter in part.parameters()} == own
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in tail.state_dict().items())


def test_split_names_the_layers_it_knows(user_error):
    model = sr_moe(10, depth=2)
    for name in ("stages.2.moe", "stages.0", "moe", "stages.-1.moe"):
        with user_error(repr(name), "stages.0.moe"):
            model.split(name)


@pytest.mark.parametrize(("centred", "spare"), [(True, 2), (False, 0)])
def test_a_network_on_vectors_is_saved_and_loaded(tmp_path, centred, spare):
    model = sr_moe(3, features=6, width=8, depth=2, num_experts=4, hidden=5, centred=centred, spare=spare)
    vectors = torch.randn(9, 6)
    model.train()(vectors)
    model.eval()
    with torch.no_grad():
        if spare:
            model.stages[1].moe.experts.down[2, :, 5] = 1.0
    save(model, tmp_path)
    again = load(tmp_path)
    assert isinstance(again.stem, VectorStem)
    assert again.stages[1].centred == centred
    assert torch.equal(again(vectors), model(vectors))
    for (name, value), (other, found) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(value, found)
    if spare:
        banks = [stage.moe.experts for stage in again.stages]
        assert [bank.free_units(2) for bank in banks] == [[5, 6], [6]]


def test_active_flops_count_only_the_used_experts():
    image = torch.rand(1, 1, 28, 28)
    flops = {
        k: active_flops(
            sr_moe(10, width=64, depth=2, hidden=32, router=lambda d, e, k=k: Router(LinearScorer(d, e), TopK(k))),
            image,
        )
        for k in (1, 2, 8)
    }
    expert = 2 * 2 * 64 * 32  # two GEMVs of 64 x 32
    assert flops[2] - flops[1] == 2 * expert
    assert flops[8] - flops[1] == 2 * 7 * expert
    loop = sr_moe(10, width=64, depth=2, hidden=32, router=lambda d, e: Router(LinearScorer(d, e), TopK(2))).eval()
    for stage in loop.stages:
        stage.moe.dispatch = "loop"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loop(image)
    assert flops[2] == counter.get_total_flops()


def test_sizes_that_do_not_fit():
    with pytest.raises(UserError, match="depth must be at least 1"):
        sr_moe(10, depth=0)
    model = sr_moe(10, width=64, depth=1)
    with pytest.raises(UserError, match="64 wide, but the stem gives D=32"):
        SRMoE(sr_moe(10, width=32).stem, [Stage(model.stages[0].moe)], 10)

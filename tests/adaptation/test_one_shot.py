"""One-shot corrections against a plain reading of the protocol: full forwards, autograd, no caching."""

import copy

import pytest
import torch
from torch.nn import functional as F

from spectralmoe import UserError, record
from spectralmoe.adaptation import Rule, correct_sample, one_shot_trials
from spectralmoe.diagnostics import evaluate
from spectralmoe.models import SRMoE
from spectralmoe.training.data import ImageData, load_data
from spectralmoe.training.loop import train
from spectralmoe.training.network import build_network
from spectralmoe.training.settings import Network, Optimization


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data("digits").subset(200)


@pytest.fixture(scope="module", params=["linear", "prototype"])
def network(request, data) -> SRMoE:
    k = 2 if request.param == "linear" else "soft"
    model = build_network(data, Network(width=16, num_experts=4, hidden=8, k=k), request.param, 2, seed=0)
    train(model, data, Optimization(epochs=6, batch_size=32))
    return model.eval()


def by_hand(model: SRMoE, image: torch.Tensor, label: int, rule: Rule) -> tuple[SRMoE, int]:
    """The protocol, written plainly on a copy of the model."""
    model = copy.deepcopy(model)
    with record(model) as tape:
        model(image[None])
    used = {item.name: int(item.routing.weights[0].argmax()) for item in tape}
    used = {item.name: int(item.routing.indices[0, used[item.name]]) for item in tape}
    if rule.layers == "last":
        used = dict([list(used.items())[-1]])
    for step in range(rule.max_steps + 1):
        logits = model(image[None])
        if int(logits.argmax()) == label or step == rule.max_steps:
            return model, step
        model.zero_grad()
        F.cross_entropy(logits, torch.tensor([label])).backward()
        with torch.no_grad():
            for name, e in used.items():
                for parameter in model.get_submodule(name).experts.parameters():
                    parameter[e] -= rule.lr * parameter.grad[e]
    raise AssertionError


def wrong_samples(model, split, count):
    return (model(split.images).argmax(-1) != split.labels).nonzero().flatten()[:count].tolist()


@pytest.mark.parametrize("rule", [Rule(), Rule("last", 2e-2), Rule("all", 1e-4, 3)], ids=["all", "last", "few-steps"])
def test_correction_equals_the_protocol_by_hand(network, data, rule):
    for sample in wrong_samples(network, data.test, 3):
        image, label = data.test.images[sample], int(data.test.labels[sample])
        expected, steps = by_hand(network, image, label, rule)
        model = copy.deepcopy(network)
        done = correct_sample(model, image, label, rule)
        assert done.steps == steps
        assert done.success == (int(expected(image[None]).argmax()) == label)
        for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=name)


def test_nothing_but_the_touched_experts_changes(network, data):
    sample = wrong_samples(network, data.test, 1)[0]
    model = copy.deepcopy(network)
    done = correct_sample(model, data.test.images[sample], int(data.test.labels[sample]))
    assert done.success
    before, total = network.state_dict(), 0.0
    for name, value in model.state_dict().items():
        layer = next((layer for layer in done.touched if name.startswith(f"{layer}.experts.")), None)
        for e in range(4 if layer else 0):
            changed = not torch.equal(value[e], before[name][e])
            assert not changed or e == done.touched[layer]
        if layer is None:
            assert torch.equal(value, before[name]), name
        total += float((value.double() - before[name].double()).square().sum())
    assert done.change == pytest.approx(total**0.5, rel=1e-4)


def test_trials_measure_the_other_samples_and_restore(network, data):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trials = one_shot_trials(network, data.test.images, data.test.labels, trials=4, seed=1)
    assert len(trials) == 4
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    accuracy = evaluate(network, data.test.images, data.test.labels)
    right = accuracy.predictions == data.test.labels
    for trial in trials:
        assert not right[trial.sample]
        image, label = data.test.images[trial.sample], int(data.test.labels[trial.sample])
        changed, _ = by_hand(network, image, label, Rule())
        after = evaluate(changed, data.test.images, data.test.labels).predictions == data.test.labels
        others = torch.arange(len(right)) != trial.sample
        expected = 100 * float(after[others].double().mean() - right[others].double().mean())
        assert trial.interference == pytest.approx(expected, abs=1e-3)


def test_trials_are_those_of_the_seed(network, data):
    first, again, other = (
        one_shot_trials(network, data.test.images, data.test.labels, trials=3, seed=s) for s in (0, 0, 5)
    )
    assert [t.sample for t in first] == [t.sample for t in again]
    assert [t.sample for t in first] != [t.sample for t in other]


def test_label_out_of_range(network, data):
    with pytest.raises(UserError, match="label 10 is out of range"):
        correct_sample(network, data.test.images[0], 10)

"""An inspection says what a tape, a watch and a count by hand say; what it keeps is a fair sample."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
from spectralmoe.diagnostics import joint_counts, max_vio, mutual_information, watch
from spectralmoe.experts import ConvExperts
from spectralmoe.instruments import Inspector, inspection_document
from spectralmoe.instruments.samples import BestTokens, TokenSample
from spectralmoe.json_files import to_json
from spectralmoe.units import Sample

E, K, D = 6, 2, 12


@pytest.fixture
def model():
    def layer():
        return MoE(Router(LinearScorer(D, E), TopK(K)), FeedForward(E, D, 16))

    return nn.ModuleDict({"first": nn.Sequential(layer()), "second": nn.Sequential(layer())})


def run(model, x):
    return model["second"](x + model["first"](x))


def inspected(model, batches, **options):
    with watch(model) as seen:
        inspector = Inspector(seen.layers, **options)
        for x, *labels in batches:
            run(model, x)
            inspector.add(seen.drain(), *labels)
        return inspector


def test_the_same_numbers_from_a_tape_a_watch_and_by_hand(model):
    batches = [torch.randn(2, 70, D), torch.randn(2, 70, D)]
    layers = inspected(model, [(x,) for x in batches]).layers()
    with record(model) as tape:
        for x in batches:
            run(model, x)
    for layer, name in zip(layers, ("first.0", "second.0"), strict=True):
        records = tape.layer(name)
        from_tape = sum(item.routing.counts() for item in records)
        by_hand = [0] * E
        for item in records:
            for row in item.routing.indices.tolist():
                for e in row:
                    by_hand[e] += 1
        assert layer["name"] == name
        assert layer["load"]["counts"] == from_tape.tolist() == by_hand
        share = torch.tensor(by_hand, dtype=torch.float64) / sum(by_hand)
        assert layer["load"]["max_vio"] == {
            "value": pytest.approx(max_vio(share)),
            "data": sum(by_hand),
            "unit": "slots",
        }


def test_paths_are_the_flows_between_consecutive_layers(model):
    x = torch.randn(3000, D)
    (path,) = inspected(model, [(x,)]).paths()
    with record(model) as tape:
        run(model, x)
    joint = joint_counts(tape[0].routing, tape[1].routing)
    assert (path["from"], path["to"]) == (0, 1)
    assert path["mutual_information"] == mutual_information(joint).as_json()
    assert all(count == joint[i, j] for i, j, count in path["flows"])
    counts = [count for _, _, count in path["flows"]]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == joint.max()


def test_labels_of_sequences_count_for_their_tokens(model):
    x, labels = torch.randn(4, 50, D), torch.tensor([0, 1, 1, 0])
    layer = inspected(model, [(x, labels)], labels=("cat", "dog")).layers()[0]
    with record(model) as tape:
        run(model, x)
    indices, expected = tape[0].routing.indices.view(4, 50, K), [[0] * E, [0] * E]
    for row, label in enumerate(labels.tolist()):
        for e in indices[row].flatten().tolist():
            expected[label][e] += 1
    assert layer["association"]["labels"] == ["cat", "dog"]
    assert layer["association"]["table"] == expected


def test_examples_are_the_tokens_that_lean_most_on_an_expert(model):
    x = torch.randn(3, 40, D)
    layers = inspected(model, [(x[:2],), (x[2:],)]).layers(
        lambda layer, place: {"text": f"{place.sequence}:{place.position}/{place.length}"}
    )
    with record(model) as tape:
        run(model, x)
    routing = tape[0].routing
    for e, examples in enumerate(layers[0]["examples"]):
        weights = torch.where(routing.indices == e, routing.weights, 0).sum(-1)
        row = int(weights.argmax())
        assert examples[0]["text"] == f"{row // 40}:{row % 40}/40"
        assert examples[0]["weight"] == pytest.approx(float(weights[row].detach()), abs=1e-4)


def test_no_token_is_no_data_and_not_healthy(model):
    with watch(model) as seen:
        layers = Inspector(seen.layers).layers()
    document = inspection_document("empty", {}, {}, layers)
    assert [finding["kind"] for finding in document["findings"]] == ["no_data"]
    for layer in layers:
        for block in ("load", "entropy", "stability"):
            assert all(item["value"] is None for item in layer[block].values() if isinstance(item, dict))


def test_a_document_is_json_and_the_same_for_the_same_seed(model):
    x = torch.randn(400, D)
    documents = [
        inspection_document("a", {}, {}, found.layers(), found.paths())
        for found in (inspected(model, [(x,)], seed=3), inspected(model, [(x,)], seed=3))
    ]
    assert documents[0] == documents[1]
    assert json.loads(to_json(documents[0])) == documents[0]


def test_a_sample_is_fair():
    seen = torch.zeros(40)
    for seed in range(400):
        sample = TokenSample(10, seed)
        for part in torch.arange(40.0)[:, None].split(7):
            sample.add(part)
        seen[sample.tokens[:, 0].long()] += 1
    assert sample.tokens.shape == (10, 1)
    assert (seen / 400 - 0.25).abs().max() < 0.1  # four and a half standard deviations


def test_the_best_tokens_of_an_expert_that_none_chose_are_none():
    routing = Router(LinearScorer(D, E), TopK(1, normalize=False))(torch.randn(0, D))
    best = BestTokens(E, 3)
    best.add(routing)
    assert best.found == [[]] * E


def kinds(found, **model):
    document = inspection_document("a", model, {}, found.layers(), found.paths())
    json.loads(to_json(document))
    return [item["kind"] for item in document["findings"]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_broken_weight_of_an_expert_is_found(model, value):
    with torch.no_grad():
        model["second"][0].experts.up[1].view(-1)[5] = value
    assert kinds(inspected(model, [(torch.randn(400, D),)])) == ["not_finite"]


def test_tokens_that_are_no_numbers_are_no_load(model):
    x = torch.randn(400, D)
    x[0] = float("nan")
    found = inspected(model, [(x,)])
    assert kinds(found) == ["not_finite"] * 2
    assert found.layers()[0]["finite"] is True
    assert found.layers()[0]["weights"]["share"] == []
    assert found.layers()[0]["stability"]["bf16"]["data"] == 399


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_a_gate_that_tells_nothing_apart(model, gate):
    with torch.no_grad():
        model["first"][0].router.scorer.weight[:] = gate * torch.ones(E, 1) + gate * 1e-3 * torch.randn(E, D)
    assert "no_router" in kinds(inspected(model, [(torch.randn(400, D),)]))


def test_an_expert_without_weights_of_its_own(model):
    with torch.no_grad():
        for value in model["first"][0].experts.expert_parameters(2).values():
            value.zero_()
    found = inspected(model, [(torch.randn(400, D),)])
    assert found.layers()[0]["empty_experts"] == [2]
    assert "empty_expert" in kinds(found)


def test_twelve_tokens_tell_nothing_about_precision(model):
    stability = inspected(model, [(torch.randn(12, D),)]).layers()[0]["stability"]
    assert stability["bf16"] == stability["noise"] == {"value": None, "data": 12, "unit": "tokens", "needs": 64}


def test_precision_is_judged_on_more_tokens_than_the_experts_outputs(model):
    layer = inspected(model, [(torch.randn(1500, D),), (torch.randn(1500, D),)]).layers()[0]
    assert layer["stability"]["bf16"]["data"] == layer["stability"]["bf16_sound"]["data"] == 2048
    assert layer["similarity"]["output_cos2"]["data"] == 256


def test_zero_experts_are_left_out_of_the_tables():
    def layer():
        return MoE(Router(LinearScorer(D, E + 2), TopK(K)), FeedForward(E, D, 16))

    model = nn.ModuleDict({"first": nn.Sequential(layer()), "second": nn.Sequential(layer())})
    found = inspected(model, [(torch.randn(4, 100, D), torch.tensor([0, 1, 1, 0]))], labels=("cat", "dog"))
    document = inspection_document("zero", {"name": "zero", "class": "", "mode": "run"}, {"source": ""}, found.layers())
    for entry in document["layers"]:
        assert [len(row) for row in entry["similarity"]["matrices"]["rows"]] == [E] * E
        assert [len(row) for row in entry["association"]["table"]] == [E] * 2
        assert [sum(column) for column in zip(*entry["association"]["table"], strict=True)] == entry["load"]["counts"]
    (path,) = found.paths()
    assert len(path["out"]) == len(path["into"]) == E
    assert all(i < E and j < E for i, j, _ in path["flows"])


def test_a_layer_that_runs_twice_shows_the_sequences_that_there_are(model):
    layer = model["first"][0]
    twice = nn.Sequential(layer, layer)
    with watch(twice) as seen:
        inspector = Inspector(seen.layers)
        for _ in range(3):
            twice(torch.randn(4, 20, D))
            inspector.add(seen.drain())
        (found,) = inspector.layers(lambda layer, place: {"text": f"{place.sequence}"})
    sequences = {int(item["text"]) for examples in found["examples"] for item in examples}
    assert max(sequences) < 12
    assert max(sequences) >= 8


def test_layers_of_whole_images_and_of_experts_with_side_information_are_inspected_without_tokens():
    """What needs tokens has no data there; the load has."""

    class Reading(FeedForward):
        reads = ("severity",)

        def beside(self, x, context):
            return x

    images = MoE(Router(LinearScorer(D, E), TopK(K)), ConvExperts(E, D, 4), unit=Sample())
    reading = MoE(Router(LinearScorer(D, E), TopK(K)), Reading(E, D, 8))
    for layer, x in [(images, torch.randn(30, D, 3, 3)), (reading, torch.randn(30, D))]:
        with watch(layer) as seen:
            inspector = Inspector(seen.layers)
            layer(x)
            inspector.add(seen.drain())
        (values,) = inspector.layers()
        assert values["load"]["max_vio"]["data"] == 30 * K
        assert json.loads(to_json(values))["experts"] == E

"""Receipts against a plain reading: two copies of a model, one corrected; and the text and picture made of them."""

import copy
import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from seeds import generator, shifted

from spectralmoe import LinearScorer, Router, TopK, UserError
from spectralmoe.adaptation import COPIES, Guard, adapt_one, apply_update, draw_receipt, make_receipt, receipt_lines
from spectralmoe.json_files import to_json
from spectralmoe.models import sr_moe

NAMES = ("T-shirt/top", "Trouser & <co>", "Ankle boot", "Sandal", "Sneaker")


def small(features=None, channels=1):
    """An untrained network: every correction moves much."""
    torch.manual_seed(shifted(0))
    router = {"router": lambda d, e: Router(LinearScorer(d, e), TopK(2))}
    sizes = {"width": 8, "depth": 2, "num_experts": 4, "hidden": 4, "spare": 2}
    return sr_moe(5, channels=channels, features=features, **sizes, **router).eval()


@pytest.fixture
def images():
    return torch.rand(60, 1, 8, 8, generator=generator(1))


@pytest.fixture
def labels(images):
    return torch.randint(5, (len(images),), generator=generator(2))


@pytest.fixture
def made(images, labels):
    """(model before, model after, update, receipt): one correction that flips and reroutes reference samples."""
    model = small()
    before, guard = copy.deepcopy(model), Guard([(images[10:], labels[10:])], budget=100)
    wrong = int(model(images[:1]).argmin())
    update = adapt_one(model, images[:1], wrong, guard=guard, lr=0.2, layers="all")
    test = (torch.cat([images[:30], images[:1]]), torch.cat([labels[:30], labels[:1]]))
    return before, model, update, make_receipt(model, images[:1], wrong, update, guard=guard, test=test, classes=NAMES)


def same_bits(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_numbers_by_hand(made, images, labels):
    before, after, update, receipt = made
    was, now = before(images).argmax(-1), after(images).argmax(-1)
    flips = [(f.index, f.label, f.before, f.after) for f in receipt.reference.flipped]
    moved = (was != now)[10:].nonzero().flatten()
    assert flips == [(int(i), int(labels[10 + i]), int(was[10 + i]), int(now[10 + i])) for i in moved]
    assert flips, "this case is meant to show flips"
    right_was, right_now = (was == labels), (now == labels)
    assert receipt.reference.interference.gained == int((right_now & ~right_was)[10:].sum())
    assert receipt.reference.interference.lost == int((right_was & ~right_now)[10:].sum())
    assert not receipt.reference.contains_sample
    assert receipt.test.left_out == 2
    assert receipt.test.interference.samples == 29
    assert [f.index for f in receipt.test.flipped] == [1 + int(i) for i in (was != now)[1:30].nonzero().flatten()]
    assert receipt.test.accuracy_before == pytest.approx(100 * int(right_was[1:30].sum()) / 29)
    assert receipt.test.accuracy_after == pytest.approx(100 * int(right_now[1:30].sum()) / 29)
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert receipt.written == sum(int((p != q).sum()) for p, q in pairs) > 0
    assert receipt.success
    assert (receipt.before.prediction, receipt.after.prediction) == (int(was[0]), int(now[0]))
    assert (receipt.steps, receipt.method, receipt.touched) == (update.steps, "sgd", update.touched)


def test_model_and_update_stay_as_they_are(made, images, tmp_path):
    before, after, update, _ = made
    again = copy.deepcopy(before)
    update.save(tmp_path / "update.safetensors")
    apply_update(again, tmp_path / "update.safetensors")
    assert same_bits(again, after)
    make_receipt(after, images[:1], 0, update)
    assert same_bits(again, after)
    update.revert()
    assert same_bits(before, after)


def test_json(made):
    receipt = made[-1]
    found = json.loads(to_json(receipt.to_json()))
    assert found["reference"]["flipped"][0]["index"] == receipt.reference.flipped[0].index
    assert found["touched"] == receipt.touched
    assert found["classes"] == list(NAMES)
    assert "torch" in found["machine"]


def test_text(made):
    receipt = made[-1]
    text = "\n".join(receipt_lines(receipt))
    assert f"-> {NAMES[receipt.label]} (" in text
    reference = receipt.reference
    kinds = f"({reference.interference.gained} better, {reference.interference.lost} worse"
    assert f"{len(reference.flipped)} predictions changed {kinds}" in text
    assert "test: 29 samples without this one; " in text
    shares = {kind: f"{receipt.carried_before[kind]:.0%} -> {receipt.carried_after[kind]:.0%}" for kind in COPIES}
    assert f"copies right: noisy {shares['noisy']}, shifted 2 px {shares['shifted_two']}, rotated 10° " in text
    assert text.endswith(
        f"copies of the kind that carried corrections are built from: shifted 1 px {shares['shifted_one']}"
    )
    assert max(map(len, text.splitlines())) < 260
    one = replace(reference, samples=10_000, reachable=1204, flipped=reference.flipped[:1], rerouted=(7,))
    line = receipt_lines(replace(receipt, reference=one))[2]
    assert line.startswith("reference: 10,000 samples, 1,204 could change; 1 prediction changed (")
    assert ", 1 route changed; interference " in line


def test_picture(made, images):
    receipt = made[-1]
    root = ElementTree.fromstring(draw_receipt(receipt, images[:1], images[10:]))
    assert root.get("role") == "img"
    assert NAMES[receipt.label] in root.get("aria-label")
    shown = {f.index for f in receipt.reference.flipped} | set(receipt.reference.rerouted)
    svg = "{http://www.w3.org/2000/svg}"
    assert len(list(root.iter(f"{svg}image"))) == 1 + min(len(shown), 24)
    titles = [element.text for element in root.iter(f"{svg}title")]
    named = tuple(
        f"reference sample {f.index}: true {NAMES[f.label]}, {NAMES[f.before]} → {NAMES[f.after]}; "
        for f in receipt.reference.flipped
    )
    assert sum(title.startswith(named) for title in titles) == min(len(named), 24)
    style = root.find(f"{svg}style").text
    assert "prefers-color-scheme:dark" in style
    texts = list(root.iter(f"{svg}text"))
    beside = [text for text in texts if text.get("x") == "160"]
    caption = next(text for text in texts if text.text.startswith(("reference samples that", "none of")))
    assert len(beside) >= 5
    assert max(len(text.text) for text in beside) <= 90  # what fits in the picture's width
    assert max(float(text.get("y")) for text in beside) < float(caption.get("y")) - 12
    many = replace(receipt, reference=replace(receipt.reference, flipped=(), rerouted=tuple(range(40))))
    drawn = draw_receipt(many, images[:1], images[10:])
    assert "24 of 40 shown" in drawn
    assert drawn.count("<image") == 25
    assert "copies right: noisy " in drawn
    assert "carried corrections are built from: shifted 1 px " in drawn
    calm = replace(receipt, reference=replace(receipt.reference, flipped=(), rerouted=()))
    assert "none of the 50 reference samples changed" in draw_receipt(calm, images[:1], images[10:])
    assert "no reference data" in draw_receipt(replace(receipt, reference=None), images[:1])


def blind():
    """A network that does not see the last of six numbers, and three samples that differ in it alone."""
    model = small(features=6)
    with torch.no_grad():
        model.stem.project.weight[:, -1] = 0
    samples = torch.rand(1, 6).repeat(4, 1)
    samples[:, -1] = torch.arange(4)
    return model, samples


def test_refused_update():
    """What looks the same to the model flips with the sample, whatever its weights are; the sample does not count."""
    model, samples = blind()
    before, wrong = copy.deepcopy(model), int(model(samples[:1]).argmin())
    own = int(model(samples[:1]).argmax())
    others = torch.randn(30, 6)
    data = torch.cat([samples, others]), torch.cat([torch.tensor([own] * 4), model(others).argmax(-1)])
    guard = Guard([data], max_flips=0)
    update = adapt_one(model, samples[:1], wrong, guard=guard, lr=0.2)
    receipt = make_receipt(model, samples[:1], wrong, update, guard=guard, test=(samples, torch.zeros(4).long()))
    assert not receipt.success
    assert receipt.before == receipt.after
    assert receipt.written == 0
    assert receipt.test is None
    assert receipt.reference.contains_sample
    flipped = {f.index: (f.before, f.after) for f in receipt.reference.flipped}
    assert [flipped.get(index) for index in range(4)] == [None, (own, None), (own, None), (own, None)]
    text = "\n".join(receipt_lines(receipt))
    assert text.startswith("NOT corrected: ")
    assert "reference: 33 samples without this one, " in text
    assert f"{len(flipped)} predictions would have changed (0 better, {len(flipped)} worse)" in text
    assert "tried: sgd in stages.1.moe: it costs " in text
    assert same_bits(before, model)


def test_what_costs_more_on_test_data_than_the_budget_is_said():
    """40 test samples look like the corrected one and lose their class with it; the guard's data have none to lose."""
    model, samples = blind()
    own, wrong = int(model(samples[:1]).argmax()), int(model(samples[:1]).argmin())
    far = torch.randn(300, 6)  # all of them wrong: on these an update can cost nothing
    alike = samples[:1].repeat(41, 1)
    alike[:, -1] = torch.arange(41)
    guard = Guard([(far, (model(far).argmax(-1) + 1) % 5)], budget=5.0)
    test = (alike, torch.full((41,), own))
    update = adapt_one(model, alike[:1], wrong, guard=guard, lr=0.2)
    assert update.success
    receipt = make_receipt(model, alike[:1], wrong, update, guard=guard, test=test)
    change = receipt.test.interference
    assert (change.samples, change.mean, receipt.test.left_out) == (40, -100, 1)
    assert change.high < -5
    assert receipt.test.over_budget is True
    assert json.loads(to_json(receipt.to_json()))["test"]["over_budget"] is True
    warning = next(line for line in receipt_lines(receipt) if "WARNING" in line)
    assert f"{change.low:+.2f} to {change.high:+.2f} points, lies below -5; " in warning
    image = torch.rand(1, 1, 8, 8)
    assert "Costs more than its budget on the test data" in draw_receipt(receipt, image)
    near = replace(receipt, test=replace(receipt.test, over_budget=False))
    assert "WARNING" not in "".join(receipt_lines(near))
    assert "Costs more" not in draw_receipt(near, image)
    without = make_receipt(model, alike[:1], wrong, update, test=test)
    assert without.test.over_budget is None


def test_sample_that_is_right_already(images, labels):
    model = small()
    right = int(model(images[:1]).argmax())
    update = adapt_one(model, images[:1], right)
    receipt = make_receipt(model, images[:1], right, update, guard=Guard([(images, labels)]), test=(images, labels))
    assert receipt.success
    assert receipt.reference is None
    assert receipt_lines(receipt)[0].startswith(f"already right: the model says {right} (")


def test_feature_vectors_have_no_shifted_copies():
    model, x = small(features=6), torch.rand(1, 6, generator=generator(3))
    wrong = int(model(x).argmin())
    receipt = make_receipt(model, x, wrong, adapt_one(model, x, wrong, lr=0.2))
    assert receipt.carried_after.keys() == {"noisy"}
    assert receipt_lines(receipt)[-1].startswith("copies right: noisy ")
    assert "shifted" not in receipt_lines(receipt)[-1]
    with pytest.raises(UserError, match=r"images of 1 or 3 channels, \(C, H, W\), not \(6,\)"):
        draw_receipt(receipt, x)


def test_mistakes(made, images):
    _, model, update, _ = made
    with pytest.raises(UserError, match=r"one sample, x \(1, \.\.\.\), not 2"):
        make_receipt(model, images[:2], 0, update)
    update.written[0].target.write([value + 1 for value in update.written[0].new])
    with pytest.raises(UserError, match="has changed since this update"):
        make_receipt(model, images[:1], 0, update)

"""Updates: taken back bit by bit, kept in a small file, applied to another copy, refused where they do not fit."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from seeds import shifted
from torch import nn

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, UserError
from spectralmoe.adaptation import adapt_one, apply_update
from spectralmoe.adaptation.targets import canonical, digest_of

METHODS = ["sgd", "margin", "null_space", "low_rank", "unit"]


@pytest.fixture
def correct(data, wrong, make_guard):
    """``correct(model, n)``: correct the n-th wrong image (of the given model) in the last layer, or in those named."""

    def run(model, n=0, **arguments):
        sample = wrong(model, n + 1)[n]
        arguments = {"lr": 0.05, **arguments}
        if arguments.get("method", "sgd") not in ("sgd", "margin"):
            arguments["guard"] = make_guard(budget=100.0)
        update = adapt_one(model, data.test.images[[sample]], data.test.labels[[sample]], **arguments)
        assert update.success
        assert update.written
        return update

    return run


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["top2", "soft"])
def test_taken_back_bit_by_bit(network, correct, untouched, name, method):
    model = network(name).train()
    with untouched(model):
        update = correct(model.eval(), method=method, layers="all")
        assert not equal(model, network(name))
        update.revert()
        model.train()


def test_a_bank_of_modules_is_taken_back(pooled, untouched):
    model = pooled("modules")
    x = torch.randn(1, 4, 6)
    with untouched(model):
        update = adapt_one(model, x, int(model(x).argsort(dim=-1)[0, -2]), layers="all", lr=0.1)
        assert update.success
        update.revert()


def test_the_later_update_of_an_expert_is_taken_back_first(network, data, wrong, untouched):
    model = network("top2")
    with untouched(model):
        updates = {}
        for sample in wrong(model, 20):
            update = adapt_one(model, data.test.images[[sample]], data.test.labels[[sample]], lr=0.05)
            if not update.written:
                continue
            (e,) = update.touched.values()
            if e in updates:
                break
            updates[e] = update
        earlier, after = updates.pop(e), copy.deepcopy(model)
        with pytest.raises(UserError, match=rf"expert {e} of layer 'stages\.1\.moe' has changed since") as caught:
            earlier.revert()
        assert "\n" not in str(caught.value)
        assert equal(model, after)
        update.revert()
        earlier.revert()
        with pytest.raises(UserError, match="has changed since"):
            earlier.revert()
        for other in updates.values():
            other.revert()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_updates_of_different_experts_come_back_in_any_order(network, correct, untouched, order):
    model = network("top2")
    with untouched(model):
        updates = [correct(model, layers=["stages.0.moe"]), correct(model, layers=["stages.1.moe"])]
        for i in order:
            updates[i].revert()


def test_one_changed_layer_of_two_keeps_both_in_place(network, correct):
    model = network("soft")
    update = correct(model, layers="all")
    with torch.no_grad():
        model.stages[1].moe.experts.up_bias[update.touched["stages.1.moe"], 0] += 1
    state = copy.deepcopy(model)
    with pytest.raises(UserError, match=r"stages\.1\.moe"):
        update.revert()
    assert equal(model, state)


@pytest.mark.parametrize("move", ["cast", "assign"])
def test_a_model_that_got_other_memory_is_taken_back(network, correct, move):
    model = network("soft")
    original = network("soft")
    update = correct(model)
    if move == "cast":
        model.double()
    else:
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    update.revert()
    assert equal(model.float(), original)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["top2", "soft"])
def test_a_saved_update_gives_another_copy_the_same_bits(network, correct, tmp_path, name, method):
    model, path = network(name), tmp_path / "fix.safetensors"
    update = correct(model, method=method, layers="all")
    update.save(path)
    copied, before = network(name), network(name)
    applied = apply_update(copied, path)
    assert equal(copied, model)
    assert applied.success
    assert applied.touched == update.touched
    assert applied.change == pytest.approx(update.change)
    applied.revert()
    assert equal(copied, before)
    apply_update(copied, str(path)).save(tmp_path / "again.safetensors")
    again = network(name)
    apply_update(again, tmp_path / "again.safetensors")
    assert equal(again, model)


def test_modules_and_bf16_experts_are_saved_too(pooled, tmp_path):
    for index, dtype in enumerate((torch.float32, torch.bfloat16)):
        for kind in ("modules", "stacked"):
            original = pooled(kind).to(dtype)
            model, path = copy.deepcopy(original), tmp_path / f"{kind}{index}"
            x = torch.randn(1, 4, 6, dtype=dtype)
            y = int(model(x).argsort(dim=-1)[0, -2])
            update = adapt_one(model, x, y, layers="all", lr=0.5)
            assert update.success
            update.save(path)
            copied = copy.deepcopy(original)
            apply_update(copied, path)
            assert equal(copied, model)


def test_the_file_is_about_as_large_as_the_expert(network, correct, tmp_path):
    model, path = network("soft"), tmp_path / "fix"
    update = correct(model)
    update.save(path)
    ((layer, e),) = update.touched.items()
    expert = sum(4 * view.numel() for view in model.get_submodule(layer).experts.expert_parameters(e).values())
    whole = sum(4 * value.numel() for value in model.state_dict().values())
    assert expert < path.stat().st_size < expert + 2000 < whole / 4
    with safe_open(path, framework="pt") as file:
        entries = json.loads(file.metadata()["experts"])
        assert [(entry["layer"], entry["expert"]) for entry in entries] == [(layer, e)]
        for name, view in model.get_submodule(layer).experts.expert_parameters(e).items():
            assert torch.equal(file.get_tensor(f"0/{name}"), view)


@pytest.fixture
def saved(network, correct, tmp_path):
    update, path = correct(network("soft"), layers="all"), tmp_path / "fix.safetensors"
    update.save(path)
    return path


def scaled(model):
    with torch.no_grad():
        for layer in (model.stages[0].moe, model.stages[1].moe):
            layer.experts.down.mul_(1.001)
    return model


def without_layer(model):
    model.stages[1].moe = nn.Linear(16, 16)
    return model


def without_experts(model):
    """One expert fewer in each bank than any update could name."""
    for stage in model.stages:
        bank = stage.moe.experts
        bank.num_experts = 0
    return model


OTHERS = {
    "weights": (lambda network: scaled(network("soft")), ("another model", "other weights")),
    "network": (lambda network: network("top2"), ("another model", "other weights")),
    "layer": (lambda network: without_layer(network("soft")), ("another model", "stages.1.moe")),
    "experts": (lambda network: without_experts(network("soft")), ("another model", "has no expert")),
    "precision": (lambda network: network("soft").bfloat16(), ("another model",)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_are_refused(network, saved, untouched, user_error, case):
    make, words = OTHERS[case]
    model = make(network)
    with untouched(model), user_error(str(saved), *words):
        apply_update(model, saved)


def test_no_update_is_applied_twice(network, saved, untouched, user_error):
    model = network("soft")
    apply_update(model, saved)
    with untouched(model), user_error("applied to this model already"):
        apply_update(model, saved)


def refused(model, path):
    with pytest.raises(UserError) as caught:
        apply_update(model, path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(path) in str(caught.value)


def test_a_cut_file_is_refused(network, saved, untouched):
    whole, model = saved.read_bytes(), network("soft")
    with untouched(model):
        for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 4, len(whole) - 1):
            saved.write_bytes(whole[:length])
            refused(model, saved)


def test_a_flipped_byte_is_found(network, saved, untouched):
    """Anywhere in the tensors; in the header it is found, or in a word that is not used."""
    whole, model = saved.read_bytes(), network("soft")
    tensors = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(shifted(0))
    with untouched(model):
        for position in [tensors, len(whole) - 1, *(draw.randrange(tensors, len(whole)) for _ in range(10))]:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << draw.randrange(8)
            saved.write_bytes(damaged)
            refused(model, saved)
    done = network("soft")
    saved.write_bytes(whole)
    apply_update(done, saved)
    for position in [*range(0, 40, 3), *(draw.randrange(8, tensors) for _ in range(60))]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(7)
        saved.write_bytes(damaged)
        try:
            update = apply_update(model, saved)
        except UserError:
            assert equal(model, network("soft"))
        else:
            assert equal(model, done)
            update.revert()


GOOD = [{"layer": "stages.1.moe", "expert": 0, "old_sha256": "0", "new_sha256": "1"}]
HEADERS = {
    "none": None,
    "no format": {"experts": json.dumps(GOOD)},
    "other format": {"format": "spectralmoe-update-9", "experts": json.dumps(GOOD)},
    "no experts": {"format": "spectralmoe-update-1"},
    "empty": {"format": "spectralmoe-update-1", "experts": "[]"},
    "not JSON": {"format": "spectralmoe-update-1", "experts": "{"},
    "number": {"format": "spectralmoe-update-1", "experts": "7"},
    "object": {"format": "spectralmoe-update-1", "experts": json.dumps(GOOD[0])},
    "numbers": {"format": "spectralmoe-update-1", "experts": "[7]"},
    "missing key": {"format": "spectralmoe-update-1", "experts": json.dumps([{"layer": "stages.1.moe"}])},
    "text for a number": {"format": "spectralmoe-update-1", "experts": json.dumps([{**GOOD[0], "expert": "0"}])},
    "negative": {"format": "spectralmoe-update-1", "experts": json.dumps([{**GOOD[0], "expert": -1}])},
    "too large": {"format": "spectralmoe-update-1", "experts": json.dumps([{**GOOD[0], "expert": 4}])},
    "line break": {"format": "spectralmoe-update-1", "experts": json.dumps([{**GOOD[0], "layer": "a\nb"}])},
    "deep": {"format": "spectralmoe-update-1", "experts": "[" * 100_000},
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_not_ours(network, tmp_path, untouched, case):
    model, path = network("soft"), tmp_path / "file"
    save_file({"0/up": torch.zeros(3)}, path, HEADERS[case])
    with untouched(model):
        refused(model, path)


@pytest.mark.parametrize("what", ["missing", "shape", "type", "values", "second"])
def test_tensors_that_are_not_those_announced(network, saved, untouched, what):
    with safe_open(saved, framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = "1/down" if what == "second" else "0/down"
    if what == "missing":
        del tensors[name]
    elif what == "shape":
        tensors[name] = tensors[name].T.contiguous()
    elif what == "type":
        tensors[name] = tensors[name].double()
    else:
        tensors[name] = tensors[name] + 1
    save_file(tensors, saved, about)
    model = network("soft")
    with untouched(model):
        refused(model, saved)


class Boom:
    """A pickle that would run."""

    def __reduce__(self):
        return (os._exit, (3,))


def test_other_files_are_refused_and_never_run(network, tmp_path, untouched):
    model = network("soft")
    files = {
        "pickle": pickle.dumps(Boom()),
        "torch": None,
        "text": b"not an update\n",
        "image": b"\x89PNG\r\n\x1a\n" + bytes(200),
    }
    torch.save({"0/up": torch.zeros(3)}, tmp_path / "torch")
    with untouched(model):
        for name, content in files.items():
            if content is not None:
                (tmp_path / name).write_bytes(content)
            refused(model, tmp_path / name)
        refused(model, tmp_path / "absent")
        refused(model, tmp_path)


def test_paths_that_cannot_be_written(network, correct, tmp_path, user_error):
    update = correct(network("soft"))
    with user_error("cannot write", "nowhere"):
        update.save(tmp_path / "nowhere" / "fix")
    folder = tmp_path / "folder"
    folder.mkdir()
    with user_error("cannot write", "folder"):
        update.save(folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert list(folder.iterdir()) == []


def test_nothing_to_save(network, data, tmp_path, user_error):
    model = network("soft")
    right = int((model(data.test.images).argmax(-1) == data.test.labels).nonzero()[0])
    update = adapt_one(model, data.test.images[[right]], data.test.labels[[right]])
    with user_error("nothing"):
        update.save(tmp_path / "fix")
    assert list(tmp_path.iterdir()) == []


def rewritten(saved, change):
    """The file with its experts (a list) and tensors (a dict) as ``change`` leaves them, in order with itself."""
    with safe_open(saved, framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    experts = json.loads(about["experts"])
    change(experts, tensors)
    save_file(tensors, saved, {**about, "experts": json.dumps(experts)})


def with_new_digest(experts, tensors, index=0):
    """The header that goes with the changed tensors of one entry."""
    prefix = f"{index}/"
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    order = {name: found[name] for name in ("up", "down", "up_bias", "down_bias")}
    experts[index]["new_sha256"] = digest_of({name: canonical(value) for name, value in order.items()})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(network, saved, untouched, user_error, value):
    def spoil(experts, tensors):
        tensors["0/down"][0, 0] = value
        with_new_digest(experts, tensors)

    rewritten(saved, spoil)
    model = network("soft")
    with untouched(model), user_error("not finite"):
        apply_update(model, saved)


def test_repeated_entries_are_refused(network, saved, untouched, user_error):
    def repeat(experts, tensors):
        experts.append(dict(experts[0]))
        tensors |= {f"{len(experts) - 1}/{name[2:]}": v.clone() for name, v in tensors.items() if name[:2] == "0/"}

    rewritten(saved, repeat)
    model = network("soft")
    with untouched(model), user_error("twice"):
        apply_update(model, saved)


@pytest.mark.parametrize("name", ["0/other", "9/up", "stray"])
def test_tensors_that_nothing_announces_are_refused(network, saved, untouched, user_error, name):
    rewritten(saved, lambda experts, tensors: tensors.update({name: torch.zeros(2)}))
    model = network("soft")
    with untouched(model), user_error("is damaged", repr(name)):
        apply_update(model, saved)


def test_true_is_no_expert_number(network, saved, untouched, user_error):
    rewritten(saved, lambda experts, tensors: experts[0].update(expert=True))
    model = network("soft")
    with untouched(model), user_error("is damaged"):
        apply_update(model, saved)


def test_the_sign_of_zero_makes_no_other_model(network, correct, tmp_path):
    """Compared by value: zeros of either sign are the same weights, before the update, after it, and in the file."""
    model, path = network("soft"), tmp_path / "update"
    update = correct(model)
    update.save(path)
    update.revert()
    layer, expert = next(iter(update.touched.items()))
    signs = network("soft")
    with torch.no_grad():
        views = signs.get_submodule(layer).experts.expert_parameters(expert)
        zeros = sum(int((view == 0).sum()) for view in views.values())
        for view in views.values():
            view[view == 0] = -0.0
    assert zeros
    applied = apply_update(signs, path)
    assert {name: view.tolist() for name, view in views.items()} == {
        name: new.tolist() for name, new in zip(views, update.written[0].new, strict=True)
    }
    with torch.no_grad():
        for view in views.values():
            view[view == 0] = -0.0
    with pytest.raises(UserError, match="applied to this model already"):
        apply_update(signs, path)
    applied.revert()
    assert equal(signs, network("soft"))


def test_an_expert_with_nan_can_be_taken_back(network, correct):
    """NaN equals NaN where it is asked whether somebody else has changed an expert."""
    model = network("soft")
    update = correct(model)
    item = update.written[0]
    view = next(iter(item.target.views.values()))
    with torch.no_grad():
        view.view(-1)[0] = math.nan
        item.new[0].view(-1)[0] = math.nan
    update.revert()
    assert equal(model, network("soft"))


def test_tied_weights_take_one_value(tmp_path, user_error):
    """The file is of a model without ties; here two experts are one memory, and it holds different numbers for them."""
    torch.manual_seed(0)

    def make():
        one, two = (FeedForward(3, 6, 5) for _ in range(2))
        two.load_state_dict(one.state_dict())
        layers = [MoE(Router(LinearScorer(6, 3), TopK(1)), bank) for bank in (one, two)]
        return nn.Sequential(*layers, nn.Linear(6, 4))

    apart = make()
    x = torch.randn(1, 6)
    with torch.no_grad():
        for layer in apart[:2]:
            layer.router.scorer.weight.zero_()
        y = apart(x).argsort(dim=-1)[:, -2]
    tied = copy.deepcopy(apart)
    tied[1].experts = tied[0].experts
    update = adapt_one(apart, x, y, layers="all", lr=1.0, max_steps=300)
    assert len(update.touched) == 2
    update.save(tmp_path / "update")
    before = copy.deepcopy(tied.state_dict())
    with user_error("tied here"):
        apply_update(tied, tmp_path / "update")
    assert all(torch.equal(value, before[name]) for name, value in tied.state_dict().items())

"""A model comes back bitwise or not at all: round trips, damage, hostile folders, crashes while saving."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from grids import first_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectralmoe import (
    Adapter,
    Balanced,
    CosineScorer,
    EigenbasisScorer,
    FeedForward,
    LinearScorer,
    Loop,
    ModuleExperts,
    MoE,
    PrototypeScorer,
    Router,
    Scorer,
    Soft,
    TopK,
    UserError,
    load,
    model_folder,
    save,
)
from spectralmoe.models import sr_moe
from spectralmoe.saving import read_config

D, E = 8, 4


def make_layer(**options):
    return MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 16), **options)


def perturb(model):
    """Give every tensor, buffers included, values of its own."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.dtype == torch.bool:
                value.logical_not_()
            else:
                value.add_(torch.randn_like(value) * 0.1 if value.is_floating_point() else 3)
    return model


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype
        assert torch.equal(value, two[name]), name


def rewrite(folder, *, tensors=None, config=None, edit=None):
    """Forge a folder: other tensors (with their hash), another config, or one edited in place."""
    import hashlib

    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    if config is None:
        config = json.loads((folder / "config.json").read_text())
        config["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if edit is not None:
        edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved layer, and the layer."""
    layer = perturb(make_layer())
    save(layer, tmp_path / "model", meta={"name": "old"})
    return tmp_path / "model", layer


def load_or_error(folder):
    """The model, or the user's error; any other exception passes."""
    try:
        return load(folder)
    except UserError as error:
        return error


# Round trips


def test_every_scorer_and_selector(make_router, scorer_name, selector_name, tmp_path):
    layer = perturb(MoE(make_router(scorer_name, selector_name, D, E), FeedForward(E, D, 16))).eval()
    save(layer, tmp_path)
    loaded = load(tmp_path)
    same(loaded, layer)
    assert not loaded.training
    x = torch.randn(10, D)
    assert torch.equal(loaded(x), layer(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_layer(dispatch="loop"),
        lambda: make_layer(dispatch=Loop()),
        lambda: make_layer(shared=FeedForwardAlone(D)),
        lambda: MoE(Router(LinearScorer(D, E + 2), TopK(2)), Adapter(E, D, 3)),
        lambda: MoE(
            Router(LinearScorer(D, E, bias=True), Soft()), FeedForward(E, D, 5, activation="swiglu", bias=True)
        ),
        lambda: MoE(Router(CosineScorer(D, E, temperature=0.1), Balanced(2)), ModuleExperts([FeedForwardAlone(D)] * E)),
        lambda: nn.ModuleList([make_layer(), make_layer()]),
    ],
)
def test_other_parts(make, tmp_path):
    layer = perturb(make())
    save(layer, tmp_path)
    allow = [f"{__name__}:FeedForwardAlone"]
    into = copy.deepcopy(layer) if isinstance(layer, nn.ModuleList) else None
    if into is not None:
        perturb(into)
    loaded = load(tmp_path, allow=allow, into=into)
    same(loaded, layer)
    assert into is None or loaded is into


class FeedForwardAlone(nn.Module):
    """A user's own module."""

    def __init__(self, dim):
        super().__init__()
        self.dim, self.linear = dim, nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("residual", [True, False])
def test_whole_networks(make_router, scorer_name, residual, tmp_path):
    def router(dim, experts):
        return make_router(scorer_name, "balanced", dim, experts)

    net = perturb(
        sr_moe(
            5,
            channels=2,
            width=12,
            depth=2,
            num_experts=6,
            router=router,
            residual=residual,
            mean=[0.1, 0.2],
            std=[1, 2],
        )
    ).eval()
    save(net, tmp_path)
    loaded = load(tmp_path)
    same(loaded, net)
    images = torch.rand(3, 2, 16, 16)
    assert torch.equal(loaded(images), net(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_come_back(dtype, tmp_path):
    net = perturb(sr_moe(5).to(dtype))
    save(net, tmp_path)
    loaded = load(tmp_path)
    same(loaded, net)
    assert loaded.head.weight.dtype == dtype
    assert loaded.head.weight.requires_grad
    router_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert loaded.stages[0].moe.router.scorer.prototypes.dtype == router_dtype


def test_into_keeps_its_own_dtype(saved):
    folder, layer = saved
    into = make_layer().double()
    assert load(folder, into=into) is into
    for name, value in into.state_dict().items():
        assert torch.equal(value, layer.state_dict()[name].double())


class Tied(nn.Module):
    """Embedding and head are one parameter; one layer has two names."""

    def __init__(self):
        super().__init__()
        self.embedding, self.moe, self.head = nn.Embedding(7, D), make_layer(), nn.Linear(D, 7)
        self.head.weight = self.embedding.weight
        self.again = self.moe

    def forward(self, tokens):
        return self.head(self.again(self.moe(self.embedding(tokens))))


def test_tied_tensors_are_written_once(tmp_path):
    net = perturb(Tied())
    save(net, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert len(stored) == len(list(net.parameters())) < len(net.state_dict())
    into = perturb(Tied())
    loaded = load(tmp_path, into=into)
    same(loaded, net)
    assert loaded.head.weight is loaded.embedding.weight
    expert = FeedForwardAlone(D)
    save(MoE(Router(LinearScorer(D, 2), TopK(1)), ModuleExperts([expert, expert])), tmp_path)
    assert len(load_file(tmp_path / "model.safetensors")) == 3


def test_tensors_that_only_look_tied_are_kept_apart(tmp_path):
    """Two views of one storage are two tensors of the file."""
    layer = make_layer()
    layer.experts.up = nn.Parameter(torch.randn(2, E, 16, D)[0])
    layer.experts.register_parameter("other", nn.Parameter(layer.experts.up.detach()))
    save(layer, tmp_path)
    assert {"experts.up", "experts.other"} <= load_file(tmp_path / "model.safetensors").keys()


def wrapped_inside(net):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for i, stage in enumerate(net.stages):
        net.stages[i] = torch.compile(checkpoint_wrapper(stage), backend="eager")
    return net


@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel, wrapped_inside])
def test_wrappers_leave_no_trace(wrap, tmp_path):
    net = perturb(sr_moe(5))
    plain = copy.deepcopy(net)
    save(wrap(net), tmp_path)
    same(load(tmp_path), plain)
    other = wrap(perturb(sr_moe(5)))
    assert load(tmp_path, into=other) is other
    assert torch.equal(next(other.parameters()), next(plain.parameters()))


def test_meta_comes_back_and_must_be_json(saved, user_error):
    folder, layer = saved
    meta = {"classes": ["a", "ß"], "lr": 1e-3, "nested": {"none": None}}
    save(layer, folder, meta=meta)
    assert read_config(folder)["meta"] == meta
    for bad in ({"x": torch.zeros(1)}, {(1, 2): 3}, {"x": {1, 2}}):
        with user_error("JSON"):
            save(perturb(copy.deepcopy(layer)), folder, meta=bad)
        same(load(folder), layer)


def test_the_global_generators_are_untouched(tmp_path):
    save(sr_moe(5, router=lambda d, e: Router(EigenbasisScorer(d, e, rank=3), TopK(2))), tmp_path)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    load(tmp_path)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))  # noqa: NPY002


# A user's own classes


class OwnScorer(Scorer):
    def __init__(self, dim, num_experts, *, power=1.0):
        super().__init__(dim, num_experts)
        self.power, self.weight = power, nn.Parameter(torch.randn(num_experts, dim))

    def forward(self, x, *, context=None):
        return self.power * x @ self.weight.T


class Opaque(nn.Module):
    """A network that does not keep its arguments."""

    def __init__(self, width):
        super().__init__()
        self.moe = MoE(Router(LinearScorer(width, E), TopK(2)), FeedForward(E, width, 16))

    def forward(self, x):
        return self.moe(x)


def test_a_users_class_must_be_allowed(tmp_path, user_error):
    layer = perturb(MoE(Router(OwnScorer(D, E, power=2.0), TopK(2)), FeedForward(E, D, 16)))
    save(layer, tmp_path)
    name = f"{__name__}:OwnScorer"
    for allow in ((), ["os:system"], name):  # a bare string is no list of names
        with user_error(f"type '{name}'", "not allowed", f"allow=['{name}']"):
            load(tmp_path, allow=allow)
    loaded = load(tmp_path, allow=[name])
    same(loaded, layer)
    assert loaded.router.scorer.power == 2.0
    other = MoE(Router(OwnScorer(D, E, power=3.0), TopK(2)), FeedForward(E, D, 16))
    with user_error("layer '' differs"):
        load(tmp_path, into=other)


def test_a_network_without_a_spec_needs_into(tmp_path, user_error):
    net = perturb(Opaque(D))
    save(net, tmp_path)
    with user_error("load(..., into=model)"):
        load(tmp_path)
    same(load(tmp_path, into=Opaque(D)), net)


def test_a_model_without_moe_layers(tmp_path, user_error):
    with user_error("no MoE layer"):
        save(nn.Linear(2, 2), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Folders that do not fit


def test_tensors_that_do_not_fit_are_listed(saved, user_error):
    folder, layer = saved
    tensors = load_file(folder / "model.safetensors")
    up = tensors.pop("experts.up")
    rewrite(folder, tensors={**tensors, "experts.more": up, "experts.down": tensors["experts.down"][:1].clone()})
    words = ["missing 'experts.up'", "extra 'experts.more'", "'experts.down' has shape [1, 8, 16]", "[4, 8, 16]"]
    for into in (None, copy.deepcopy(layer)):
        with user_error(*words):
            load(folder, into=into)
    many = {f"t{i}\n\x1b[31m": torch.zeros(1) for i in range(30)}
    rewrite(folder, tensors={**tensors, "experts.up": up, **many})
    with user_error("and 25 more"):
        load(folder)


def test_other_layers_than_into_has(saved, user_error):
    folder, _ = saved
    with user_error("layer '' differs"):
        load(folder, into=MoE(Router(PrototypeScorer(D, E), TopK(2)), FeedForward(E, D, 16)))
    with user_error("layer '' differs"):
        load(folder, into=nn.ModuleList([make_layer()]))
    with user_error("no MoE layer"):
        load(folder, into=nn.Linear(2, 2))


def test_a_refused_load_leaves_into_as_it_was(saved, user_error):
    folder, layer = saved
    tensors = load_file(folder / "model.safetensors")
    del tensors["experts.up"]
    rewrite(folder, tensors=tensors)
    into = perturb(copy.deepcopy(layer))
    before = copy.deepcopy(into)
    with user_error("missing"):
        load(folder, into=into)
    same(into, before)


# Damage


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights(saved, user_error, share):
    folder, _ = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with user_error("model.safetensors", "not a whole safetensors file"):
        load(folder)


def test_a_flipped_byte_anywhere(saved):
    folder, _ = saved
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for place in [*range(0, 64), *range(64, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"^[^\n]*$"):
            load(folder)


def test_missing_files(saved, user_error):
    folder, _ = saved
    (folder / "config.json").rename(folder / "c")
    with user_error(str(folder), "not a model folder", "config.json"):
        load(folder)
    (folder / "c").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with user_error("not a model folder"):
        load(folder)
    with user_error("nowhere", "not a model folder"):
        load(folder / "nowhere")


def test_another_format(saved, user_error):
    folder, _ = saved
    rewrite(folder, edit=lambda config: config.update(spectralmoe=99))
    with user_error("format 99", "reads format 1"):
        load(folder)


@pytest.mark.parametrize("foreign", [{"architectures": ["Bert"]}, [1], "spectralmoe", 5, None])
def test_a_config_of_another_program_is_left_alone(saved, user_error, foreign):
    folder, layer = saved
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "config.json").write_text(json.dumps(foreign))
    with user_error("another program", "choose another folder"):
        save(perturb(layer), folder)
    with user_error("another program"):
        load(folder)
    assert json.loads((folder / "config.json").read_text()) == foreign
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("text", ["", "{", "\xff", "{" * 10, "[" * 200_000, '{"a":' * 200_000, "9" * 5000, "NaN"])
def test_text_that_is_no_model(saved, user_error, text):
    folder, _ = saved
    (folder / "config.json").write_text(text, encoding="latin-1")
    with user_error("config.json"):
        load(folder)
    with user_error("config.json"):
        save(make_layer(), folder)


# Things in the way


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("thing", ["folder", "loop", "dangling", "pipe"])
def test_a_folder_or_a_loop_where_a_file_should_be(saved, user_error, name, thing):
    folder, layer = saved
    path = folder / name
    path.unlink()
    if thing == "folder":
        path.mkdir()
    elif thing == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if thing == "loop" else folder / "nothing")
    with user_error("not a model folder"):
        load(folder)
    if thing == "folder" or (thing, name) == ("pipe", "model.safetensors"):
        with user_error(name):
            save(layer, folder)
        assert {p.name for p in folder.iterdir()} <= {"config.json", "model.safetensors"}
    elif name == "model.safetensors":
        save(layer, folder)
        same(load(folder), layer)


def test_a_folder_that_is_none(saved, user_error, tmp_path):
    _, layer = saved
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("file", "file/below", "loop", "loop/below"):
        with user_error(name):
            save(layer, tmp_path / name)
        with user_error(name, "not a model folder"):
            load(tmp_path / name)


# Hostile folders


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("write", [lambda trap, path: path.write_bytes(pickle.dumps(trap)), torch.save])
def test_a_pickle_is_never_run(saved, user_error, tmp_path, write):
    folder, _ = saved
    write(Trap(tmp_path / "mark"), folder / "model.safetensors")
    rewrite(folder)
    with user_error("not a whole safetensors file"):
        load(folder)
    assert not (tmp_path / "mark").exists()


def test_no_module_is_imported_for_a_config(saved, user_error, tmp_path, monkeypatch):
    folder, _ = saved
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Layer: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewrite(folder, edit=lambda config: config.update(model={"type": "trap:Layer"}))
    with user_error("'trap:Layer'", "not allowed"):
        load(folder)
    assert not (tmp_path / "mark").exists()
    assert "trap" not in sys.modules


def put(value, *path):
    """An edit of a config: ``value`` at ``path`` of its model."""

    def edit(config):
        place = config["model"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


HOSTILE = {
    "function": put({"type": "os:system", "command": "touch mark"}, "shared"),
    "eval": put({"type": "builtins:eval", "source": "1"}, "router", "scorer"),
    "path": put({"type": "../../etc/passwd"}, "experts"),
    "type of a wrong type": put({"type": ["topk"]}, "router", "selector"),
    "torch class": put({"type": "torch.nn.modules.linear:Linear", "in_features": 8, "out_features": 8}, "shared"),
    "wide": put(10**12, "router", "scorer", "dim"),
    "wider": put(10**300, "experts", "hidden"),
    "many": put(10**9, "experts", "num_experts"),
    "negative": put(-(10**12), "experts", "dim"),
    "float": put(1e12, "experts", "dim"),
    "all as large as the file": lambda config: [
        put(1500, "experts", n)(config) for n in ("dim", "hidden", "num_experts")
    ],
    "long list": put({"type": "modules", "modules": [{"type": "topk", "k": 1}] * 10**6}, "experts"),
    "unknown argument": put(1, "router", "scorer", "__class__"),
    "missing argument": put({"type": "topk_"}, "router", "selector"),
    "part of another kind": put({"type": "topk", "k": 2}, "router"),
    "not a network": lambda config: config.update(model={"type": "loop"}),
    "a list": lambda config: config.update(model=[config["model"]]),
    "nested": lambda config: config.update(model=nested(400)),
    "tied to nothing": lambda config: config.update(tied={"x": "y"}),
    "tied to itself": lambda config: config.update(tied={"x": "x"}),
    "tied to a list": lambda config: config.update(tied={"experts.up": ["experts.up"]}),
    "tied badly": lambda config: config.update(tied=["ab", "c"]),
    "no tied": lambda config: config.pop("tied"),
    "no layers": lambda config: config.update(layers={}),
    "more layers": lambda config: config["layers"].update({"a\nb": None, "c\nd": {}}),
}


def nested(depth):
    spec = {"type": "topk", "k": 1}
    for _ in range(depth):
        spec = {"type": "capacity", "selector": spec, "factor": 1.0}
    return spec


class Made(TorchDispatchMode):
    """What a load makes: modules, and the numbers of the largest tensor that has memory."""

    modules = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_configs(saved, user_error, edit, tmp_path, monkeypatch):
    folder, _ = saved
    monkeypatch.chdir(tmp_path)
    rewrite(folder, edit=edit)
    made = Made()
    start = nn.Module.__init__

    def counted(module, *args, **kwargs):
        made.modules += 1
        start(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__init__", counted)
    with made, user_error():
        load(folder)
    assert made.modules < 5_000
    assert made.largest <= 2**12
    assert not (tmp_path / "mark").exists()


def test_a_weight_of_another_kind(saved, user_error):
    folder, _ = saved
    tensors = load_file(folder / "model.safetensors")
    for dtype in (torch.int64, torch.bool):
        rewrite(folder, tensors={**tensors, "experts.up": tensors["experts.up"].to(dtype)})
        with user_error("does not describe a model"):
            load(folder)


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["topk", "linear", "moe", "sr_moe", "os:system", "auto", "softmax", "conv_stem"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["type", "k", "dim", "router", "selector", "x"]) | st.text(max_size=5), inner),
    max_leaves=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    save(
        sr_moe(
            3, width=8, hidden=4, num_experts=3, router=lambda d, e: Router(EigenbasisScorer(d, e, rank=2), Balanced(2))
        ),
        folder,
    )
    return folder, json.loads((folder / "config.json").read_text())


def test_any_value_anywhere_in_a_config(network_folder, request):
    folder, config = network_folder
    examples = 400 if request.config.getoption("--full") else 60
    settings(max_examples=examples)(given(st.data())(lambda data: try_values(folder, copy.deepcopy(config), data)))()


def try_values(folder, config, data):
    """Put any JSON in one or two places: a model comes back, or one line."""
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(sorted(places(config), key=str)))
        value = data.draw(JSON)
        place = config
        for key in path[:-1]:
            place = place[key]
        if not path:
            config = value
        elif data.draw(st.integers(0, 5)) == 0:
            del place[path[-1]]
        else:
            place[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    result = load_or_error(folder)
    assert isinstance(result, nn.Module) or len(str(result).splitlines()) == 1


# Crashes and full disks


def in_child(action):
    """Run ``action`` in a forked process; its exit status. Killed after 60 seconds."""
    return end_of_child(start_child(action))


def start_child(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    return pid


def end_of_child(pid):
    for _ in range(6000):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError


STEPS = [(os, "fsync"), (Path, "replace"), (Path, "chmod"), (tempfile, "mkdtemp"), (Path, "write_text")]


def break_step(patch, number, after, fail):
    """Call ``fail`` before (or after) the ``number``-th of the steps that saving takes; returns a counter."""
    calls = []

    def breaking(step):
        def call(*args, **kwargs):
            calls.append(step)
            if len(calls) == number and not after:
                fail()
            result = step(*args, **kwargs)
            if len(calls) == number and after:
                fail()
            return result

        return call

    for owner, name in STEPS:
        patch.setattr(owner, name, breaking(getattr(owner, name)))
    return calls


def count_steps(layer, folder):
    with pytest.MonkeyPatch.context() as patch:
        calls = break_step(patch, 0, False, None)
        save(layer, folder)
    return len(calls)


CHANGES = {"os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir", "fcntl.flock", "os.fsync", "save_file"}
"""Audit events of what saving does to the file system; the interpreter announces all but the last two."""


def is_change(event, args):
    return event in CHANGES or (event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR)))


def killed_at(number, model, folder, name):
    """Save in a process that ends just before its ``number``-th call of the file system; whether it came so far."""

    def announced(event, function):
        def call(*args, **kwargs):
            sys.audit(event)
            return function(*args, **kwargs)

        return call

    def save_and_die():
        model_folder.save_file, os.fsync = announced("save_file", save_file), announced("os.fsync", os.fsync)
        count = iter(range(1, 10**6))
        sys.addaudithook(lambda event, args: is_change(event, args) and next(count) == number and os._exit(77))
        save(model, folder, meta={"name": name})

    return in_child(save_and_die) == 77


@pytest.mark.parametrize("first", first_of(1, [False, True]), ids=["over a model", "new folder"])
def test_a_save_killed_anywhere_leaves_the_old_model_or_the_new(tmp_path, first):
    old, new = perturb(make_layer()), perturb(make_layer())
    outcomes, number = [], 1
    while True:
        folder = tmp_path / str(number)
        if not first:
            save(old, folder, meta={"name": "old"})
        if not killed_at(number, new, folder, "new"):
            break
        result = load_or_error(folder)
        if isinstance(result, UserError):
            assert str(folder) in str(result)
            outcomes.append("none")
        else:
            outcomes.append(read_config(folder)["meta"]["name"])
            same(result, {"old": old, "new": new}[outcomes[-1]])
        save(old, folder, meta={"name": "next"})  # nothing stops the next save, which clears up
        same(load(folder), old)
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        number += 1
    before = "none" if first else "old"
    change = outcomes.index("new")  # one call turns one into the other
    assert outcomes == [before] * change + ["new"] * (number - 1 - change)
    assert change > 10


def test_processes_that_save_to_one_folder_at_once(tmp_path):
    """Each of them loads whole models meanwhile, and config and weights of the last are of one save."""
    folder, start = tmp_path / "model", tmp_path / "start"

    def save_and_load(who):
        layer = filled(who)
        with start.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # until all are there
        for _ in range(20):
            save(layer, folder, meta={"who": who})
            assert is_filled(load(folder))

    with start.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        children = [start_child(lambda who=who: save_and_load(who)) for who in (1.0, 2.0, 3.0)]
        fcntl.flock(file, fcntl.LOCK_UN)
    assert [end_of_child(child) for child in children] == [0, 0, 0]
    same(load(folder), filled(read_config(folder)["meta"]["who"]))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def filled(value):
    """A layer with one number everywhere."""
    layer = make_layer()
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(value)
    return layer


def is_filled(layer):
    return len({float(x) for tensor in layer.state_dict().values() for x in tensor.flatten()}) == 1


def test_another_save_between_any_two_calls_of_one(tmp_path, monkeypatch):
    """Two saves, the second whole at each point of the first: config and weights are of the one that ended last."""
    one, two = perturb(make_layer()), perturb(make_layer())
    steps = count_steps(one, tmp_path / "count")
    winners = set()
    for number in range(1, steps + 1):
        folder = tmp_path / str(number)
        other = lambda folder=folder: in_child(lambda: save(two, folder, meta={"name": "two"}))  # noqa: E731
        monkeypatch.setattr(model_folder, "_PATIENCE", 0.0)  # a child that waited would wait for its parent
        with pytest.MonkeyPatch.context() as patch:
            break_step(patch, number, False, other)
            save(one, folder, meta={"name": "one"})
        winners.add(read_config(folder)["meta"]["name"])
        same(load(folder), {"one": one, "two": two}[read_config(folder)["meta"]["name"]])
    assert winners == {"one"}


def test_a_reader_that_meets_a_save_reads_again(tmp_path, monkeypatch):
    """A model is saved between the reading of config and weights, and again between their hash and their numbers."""
    models = [perturb(make_layer()) for _ in range(3)]
    save(models[0], tmp_path)
    read, waiting = model_folder.load_file, models[1:]

    def meanwhile(file):
        if waiting:
            save(waiting.pop(0), tmp_path)
        return read(file)

    monkeypatch.setattr(model_folder, "load_file", meanwhile)
    same(load(tmp_path), models[2])


def test_a_save_waits_for_another_and_says_so_in_the_end(tmp_path, user_error, monkeypatch):
    old, new = perturb(make_layer()), perturb(make_layer())
    save(old, tmp_path)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    monkeypatch.setattr(model_folder, "_PATIENCE", 0.05)
    with user_error("another process", str(tmp_path), "choose another folder"):
        save(new, tmp_path)
    same(load(tmp_path), old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(model_folder, "_PATIENCE", 60)
    threading.Timer(0.1, os.close, [handle]).start()
    save(new, tmp_path)
    same(load(tmp_path), new)


@pytest.mark.parametrize(("name", "reason"), [("a\0b", "null character"), ("x" * 300, "File name too long")])
def test_names_that_no_file_system_has(saved, user_error, tmp_path, name, reason):
    for action in (lambda path: save(saved[1], path), load, read_config):
        with user_error(reason):
            action(tmp_path / name)


@pytest.mark.parametrize("digest", ["../../secret", "a" * 64, 5, None, ["a"]])
def test_a_hash_names_no_other_file(saved, user_error, digest):
    folder, _ = saved
    rewrite(folder, edit=lambda config: config.update(sha256=digest))
    with user_error("is not the file that config.json describes"):
        load(folder)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_failure_leaves_no_temporary_file(tmp_path, user_error, error):
    old, new = perturb(make_layer()), perturb(make_layer())
    folder = tmp_path / "model"
    for number in range(1, count_steps(new, tmp_path / "count") + 1):
        save(old, folder)

        def fail():
            raise error

        with pytest.MonkeyPatch.context() as patch:
            break_step(patch, number, False, fail)
            if isinstance(error, OSError):
                with user_error(str(folder), "No space left on device"):
                    save(new, folder)
            else:
                with pytest.raises(KeyboardInterrupt):
                    save(new, folder)
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("limit", [0, 100, 3000])
def test_a_full_disk(tmp_path, limit):
    """The system refuses to write beyond ``limit`` bytes: before the weights, within them, within the config."""
    old, new, folder = perturb(make_layer()), perturb(make_layer()), tmp_path / "model"
    save(old, folder)

    def attempt():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(UserError, match=r"cannot write [^\n]*$"):
            save(new, folder)

    assert in_child(attempt) == 0
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    same(load(folder), old)


def test_files_are_readable_as_the_umask_says(saved):
    folder, _ = saved
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "router.scorer.weight" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("into", [False, True])
def test_arguments_that_an_older_folder_does_not_know(into, tmp_path):
    """A layer had no placement and no memory once."""

    def earlier(spec):
        if not isinstance(spec, dict):
            return spec
        return {name: earlier(value) for name, value in spec.items() if name not in ("placement", "memory")}

    layer, x = MoE(Router(LinearScorer(D, E), Soft()), FeedForward(E, D, 8)).eval(), torch.randn(5, D)
    save(layer, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(earlier(json.loads(path.read_text()))))
    assert '"memory"' not in path.read_text()
    twin = load(tmp_path, into=MoE(Router(LinearScorer(D, E), Soft()), FeedForward(E, D, 8)) if into else None)
    assert torch.equal(twin(x), layer(x))

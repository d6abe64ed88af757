"""Routers by name and arguments: every entry of every table runs in a comparison, and mistakes are one line."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from small_parts import needed_by

from spectralmoe.data.image_data import load_data
from spectralmoe.experiments.compare.settings import Cell, CompareSettings
from spectralmoe.experiments.compare.setup import Setup, Tuned
from spectralmoe.experts import EXPERTS
from spectralmoe.layers import moe_layers
from spectralmoe.moe import MoE
from spectralmoe.naming import own_names, read_table, shown
from spectralmoe.optim import make_optimizer
from spectralmoe.presets import PRESETS, Preset, find_preset
from spectralmoe.recorder import record
from spectralmoe.regularizers import REGULARIZERS, cluster_variance
from spectralmoe.rows import Trial
from spectralmoe.scorers import SCORERS
from spectralmoe.selectors import SELECTORS
from spectralmoe.spec import parameters_of
from spectralmoe.terms import penalty
from spectralmoe.torch_private import hooks_before_step
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Network, parse
from spectralmoe.training.tasks.images import ImageTask
from spectralmoe.units import Sample
from spectralmoe.vision import BranchSpec

SIZES = {"width": 12, "num_experts": 4, "hidden": 8}

NEEDED = {
    "eigenbasis": {"rank": 6},
    "expert_choice": {"capacity": 1.0},
    "topp": {"p": 0.7},
    "capacity": {"factor": 1.25},
    "cluster_dropout": {"groups": 2},
    "group_limited": {"groups": 2, "groups_on": 1},
    "eigen": {"rank": 3},
    "multilinear": {"rank": 3},
}
"""What an entry needs besides its name."""

TOGETHER = {"basis": {"scorer": {"type": "basis", "score": "energy"}, "experts": "eigen", "rank": 3}}
"""Entries that work with certain others alone."""

NOT_HERE = {"context", "spectrum", "modules", "heterogeneous", "conv", "ermoe-context", "moce-ir", "phyg-moe"}
"""Entries that need more than tokens or names: side information, modules that are given, maps, attention."""


def part(kind, table, name):
    """An entry by name; one that wraps another of its kind gets the first of the table."""
    inner = {kind: next(iter(table))} if kind in parameters_of(table[name]) else {}
    return {kind: {"type": name, **inner}, **NEEDED.get(name, {})}


def rows():
    """Each preset, each scorer with top-k, each selector, bank and term with a linear scorer."""
    yield from sorted(PRESETS.keys() - NOT_HERE)
    for kind, table in (("scorer", SCORERS), ("selector", SELECTORS), ("experts", EXPERTS)):
        for name in sorted(table.keys() - NOT_HERE):
            yield shown(TOGETHER.get(name) or {"scorer": "linear", **part(kind, table, name)})
    for name in REGULARIZERS:
        yield shown({"scorer": "linear", "terms": {name: {"weight": 0.1, **needed_by(name)}}})


@pytest.fixture(scope="module")
def task():
    return ImageTask(load_data("digits").subset(60))


def setup_of(task, tmp_path, *names, depth=1, **changes):
    settings = CompareSettings(data="digits", routers=names, depths=(depth,), seeds=1)
    network = settings.network.model_copy(update={**SIZES, **changes})
    settings = settings.model_copy(
        update={
            "network": network,
            "optimization": settings.optimization.model_copy(update={"epochs": 1, "batch_size": 30}),
        }
    )
    settings.check()
    return Setup(settings, task, tmp_path, torch.device("cpu"))


@pytest.mark.parametrize("row", sorted(rows()))
def test_every_entry_of_the_tables_trains_in_a_comparison_by_name(row, task, tmp_path):
    across = any(term.scope == "model" for term in find_preset(row).terms.values())
    setup = setup_of(task, tmp_path, row, depth=2 if across else 1)
    (cell,) = setup.settings.cells()
    network, run, terms, optimizer = setup.recipe(cell, Tuned())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    history = train(network, task, run.optimization, terms=terms, optimizer=optimizer)
    assert history.epochs[0]["loss"] > 0
    assert not torch.equal(before["head.weight"], network.head.weight)
    layer = next(iter(moe_layers(network).values()))
    assert layer.router.num_experts == layer.experts.num_experts == (1 if find_preset(row).dense else 4)
    for kind, table in (("scorer", SCORERS), ("selector", SELECTORS)):
        preset = find_preset(row)
        spec = preset.soft if preset.dense and kind == "selector" else getattr(preset, kind)
        assert type(getattr(layer.router, kind)) is table[spec["type"]]


def test_a_row_of_parts_is_the_router_of_these_parts(task, tmp_path):
    row = '{scorer = "prototype", selector = "topp", p = 0.7, temperature = 0.5, terms = {router_z = 1e-3}}'
    setup = setup_of(task, tmp_path, row)
    network, _, terms, _ = setup.recipe(setup.settings.cells()[0], Tuned(strength=3.0))
    (layer,) = moe_layers(network).values()
    router = layer.router
    assert (router.scorer.temperature, router.scorer.scale, router.selector.p) == (0.5, 1.0, 0.7)
    with record(network.eval()) as tape:
        network(task.labelled("test")[0][:9])
    for logits, chosen in zip(tape[0].routing.logits, tape[0].routing.indices, strict=True):
        values = sorted(logits.softmax(-1).tolist(), reverse=True)
        used = next(n for n in range(1, 5) if sum(values[:n]) >= 0.7 - 1e-6)
        assert int((chosen >= 0).sum()) == used
    extra, parts = penalty(tape, terms)
    z = torch.stack([row.exp().sum().log() ** 2 for row in tape[0].routing.logits]).mean()
    torch.testing.assert_close(parts["router_z"], z)
    torch.testing.assert_close(extra, 3e-3 * z)


def test_a_row_may_name_an_optimizer(task, tmp_path, user_error):
    """Around the one of all rows, with loose arguments too; or its own."""
    row = '{preset = "omoe", phase = 1, alpha = 1e-2, terms = {router_z = 1e-3}}'
    setup = setup_of(task, tmp_path, row)
    network, run, terms, optimizer = setup.recipe(setup.settings.cells()[0], Tuned())
    assert optimizer == {"type": "orthogonal_experts", "phase": 1, "alpha": 1e-2}
    made = make_optimizer("muon", network, run.optimization, row=optimizer)
    assert [hook.__self__.phase for hook in hooks_before_step(made)] == [1]
    assert [type(part).__name__ for part in made.parts] == ["Muon", "AdamW"]
    results = []
    for changed in (optimizer, {**optimizer, "phase": 9}, None):  # of two steps: one is projected, or none
        network = setup.recipe(setup.settings.cells()[0], Tuned()).network
        train(network, task, run.optimization, terms=terms, optimizer=changed)
        results.append(network.stages[0].moe.experts.up.detach().clone())
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[2])
    assert find_preset('{preset = "omoe", optimizer = "muon"}').optimizer == {"type": "muon"}
    with user_error("scorer and optimizer both take rank"):
        find_preset('{preset = "omoe", scorer = "eigenbasis", rank = 3}')
    with user_error("one expert", "no others"):
        setup_of(task, tmp_path, "omoe", num_experts=1, k=1)


def test_keys_are_laid_over_the_preset_that_a_row_starts_from():
    known, changed = find_preset("sr-moe"), find_preset('{preset = "sr-moe", rate = 0.5, terms = {router_z = 1}}')
    assert changed.scorer == known.scorer
    assert changed.selector == {**known.selector, "rate": 0.5}
    assert changed.soft == {**known.soft, "rate": 0.5}
    assert changed.terms["spectral_penalty"] == known.terms["spectral_penalty"]
    stronger = find_preset({"preset": "sr-moe", "terms": {"spectral_penalty": {"weight": 7, "bound": 2.0}}})
    term = stronger.terms["spectral_penalty"]
    assert (term.weight, term.reduce, term.fn.keywords) == (7, "sum", {"bound": 2.0})
    assert find_preset('{preset = "synergy", terms = {activation_overlap = {kind = "output"}}}').terms[
        "activation_overlap"
    ].keeps == ("output",)
    assert find_preset({"preset": changed.summary}).selector == changed.selector
    assert find_preset('{preset = "emoe-faithful", branch = {norm = true}}').branch == {
        "tokens": "patches",
        "norm": True,
        "start": "authors",
    }


@pytest.mark.parametrize(
    ("row", "k", "selector"),
    [
        ("linear", 2, ("topk", 2)),
        ("linear", "soft", ("soft", None)),
        ("linear+balanced", 2, ("balanced", 2)),
        ("linear+balanced", 4, ("soft_balanced", None)),
        ("linear+balanced", "soft", ("soft_balanced", None)),
        ('{preset = "linear+balanced", k = 1}', "soft", ("balanced", 1)),
        ('{preset = "linear", k = "soft"}', 2, ("soft", None)),
        ('{scorer = "linear", selector = {type = "topk", k = 3}}', 2, ("topk", 3)),
        ('{scorer = "linear", selector = "topp", p = 1.0}', "soft", ("topp", None)),
        ('{preset = "sr-moe", selector = "expert_choice", capacity = 1.0}', 4, ("expert_choice", None)),
    ],
)
def test_experts_a_token_are_one_word(row, k, selector):
    built = find_preset(row).make_router(8, 4, k=k).selector
    assert (type(built), getattr(built, "k", None)) == (SELECTORS[selector[0]], selector[1])


def test_values_follow_from_the_sizes_of_the_network():
    row = '{scorer = {type = "eigenbasis", rank = "= max(2, dim // num_experts) - 1"}, k = 1}'
    assert find_preset(row).make_router(24, 4, k=2).scorer.rank == 5
    assert find_preset("prototype").make_router(16, 4, k=2).scorer.scale == 0.25
    terms = find_preset('{preset = "moec", terms = {cluster_variance = {form = 0}}}').terms
    routers = [find_preset("moec").make_router(16, experts, k=1) for experts in (2, 4, 8, 64)]
    assert [router.selector.groups for router in routers] == [1, 1, 2, 16]
    for router in routers[1:]:
        routing, groups = router(torch.randn(9, 16)), router.selector.groups
        assert terms["cluster_variance"].fn(SimpleNamespace(routing=routing)) == cluster_variance(
            routing, groups=groups, form=0
        )
    assert [find_preset("emoe-faithful").make_router(dim, 4, k=2).scorer.rank for dim in (16, 200)] == [16, 128]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("liner", ("unknown router 'liner'", "did you mean 'linear'?")),
        ("{scorer = prototype}", ("does not read as a table", "names in quotes")),
        ('{scorer = "linear"}\nx = 1', ("is not a table",)),
        ("{}", ("has no scorer", 'scorer = "linear"')),
        ('{preset = "liner"}', ("unknown router 'liner'",)),
        ("{preset = [1]}", ("router [1] is neither a name nor a table",)),
        ('{scorer = "prototyp"}', ("unknown scorer 'prototyp'", "did you mean 'prototype'?")),
        ('{scorer = "topk"}', ("scorer 'topk'", "a name of the selectors", "the scorers are linear")),
        ('{scorer = "linear", experts = "linear"}', ("a name of the scorers", "feed_forward")),
        ('{scorer = "linear", experts = "modules"}', ("'modules' needs the argument 'modules'",)),
        ("{scorer = 3}", ("scorer = 3", "neither a name nor a table")),
        ("{scorer = {bias = true}}", ("does not say its type",)),
        ('{scorer = {type = "linear", dim = 3}}', ("dim comes from the network",)),
        ('{scorer = {type = "linear", bais = true}}', ("'linear' 'bais'", "did you mean 'bias'?")),
        ('{scorer = "linear", bais = true}', ("unknown key 'bais'", "did you mean 'bias'?")),
        ('{scorer = "linear", selector = "topp"}', ("'topp' needs the argument 'p'",)),
        ('{scorer = "linear", selector = "capacity", factor = 1.0}', ("'capacity' needs the argument 'selector'",)),
        ('{scorer = "linear", selector = {type = "capacity", factor = 1.0, selector = "tpk"}}', ("selector 'tpk'",)),
        ('{scorer = "linear", experts = "feed_forward", bias = true}', ("scorer and experts both take bias",)),
        ('{scorer = "linear", k = 0}', ("k = 0", "soft")),
        ('{scorer = "linear", k = true}', ("k = true", "soft")),
        ('{scorer = "linear", terms = {load_balence = 0.1}}', ("unknown term", "did you mean 'load_balance'?")),
        ('{scorer = "linear", terms = {load_balance = {}}}', ("'load_balance' needs a weight",)),
        ('{scorer = "linear", terms = {load_balance = nan}}', ("'load_balance' needs a weight",)),
        ('{scorer = "linear", terms = {load_balance = "much"}}', ("'load_balance' needs a weight",)),
        ('{scorer = "linear", terms = {spectral_norm = {weight = 1, bond = 2}}}', ("'bond'", "did you mean 'bound'?")),
        ('{scorer = "linear", terms = {router_z = {weight = 1, reduce = "max"}}}', ("reduce", "mean, sum")),
        ('{scorer = "linear", terms = {cluster_variance = 1.0}}', ("'cluster_variance' needs the argument 'groups'",)),
        ('{scorer = "linear", terms = 3}', ("terms is no table",)),
        ('{scorer = "linear", branch = {token = "all"}}', ("unknown key of branch 'token'", "did you mean 'tokens'?")),
    ],
)
def test_a_row_that_cannot_be_is_one_line(row, words, user_error):
    with user_error(*words):
        find_preset(row)


@pytest.mark.parametrize(
    ("row", "k", "words"),
    [
        ('{scorer = "linear", selector = "topk"}', "soft", ("'topk' takes a number of experts",)),
        ('{scorer = "eigenbasis", rank = 13}', 2, ("rank R", "D=12")),
        ('{scorer = "eigenbasis", rank = "= dims"}', 2, ("'= dims'", "did you mean 'dim'?")),
        ('{scorer = "linear", k = 5}', 2, ("k=5", "E=4")),
        ("moec", 4, ("ClusterDropout", "soft")),
        ('{preset = "moec", terms = {cluster_variance = {groups = 3}}}', 2, ("groups=3", "E=4")),
        ('{scorer = "linear", terms = {output_overlap = 1}}', 1, ("output_overlap", "K=1")),
        ('{scorer = "basis"}', 2, ("EigenExperts", "FeedForward")),
        ('{scorer = "linear", experts = "conv", channels = 12}', 2, ("unit=Token", "rows of shape")),
        ('{scorer = "context"}', 2, ("ContextScorer reads 'severity'", "this network gives none")),
        ("ermoe-context", 2, ("router 'ermoe-context'", "BasisScorer reads 'attended'", "this network gives none")),
        ('{preset = "mumoe", out = 5}', 2, ("5 numbers a token", "D=12")),
        ("synergy", 2, ("router 'synergy'", "neighbouring layers", "two or more")),
        ('{scorer = "linear", experts = {type = "feed_forward", activation = "gulu"}}', 2, ("did you mean 'gelu'?",)),
    ],
)
def test_what_does_not_fit_the_network_shows_before_anything_runs(row, k, words, task, tmp_path, user_error):
    with user_error(*words):
        setup_of(task, tmp_path, row, k=k)


def test_text_networks_give_what_their_attention_gave(user_error):
    sizes = {"width": 12, "num_experts": 4, "hidden": 8}
    CompareSettings(data="text:pydoc", routers=("ermoe", "ermoe-context"), network=Network(**sizes)).check()
    with user_error("ContextScorer reads 'severity'", "this network gives attended"):
        CompareSettings(data="text:pydoc", routers=('{scorer = "context"}',), network=Network(**sizes)).check()


def test_a_bank_without_spare_units_is_not_asked_for_them(user_error):
    with user_error("'adapter' have no spare units"):
        find_preset({"scorer": "linear", "experts": "adapter"}).make_experts(4, 8, 16, spare=2)


OWN = """
import torch
from spectralmoe import LinearScorer, Scorer, TopK, FeedForward
from spectralmoe.presets import find_preset

class Norms(Scorer):
    "Without parameters: the token's coordinates in turn."
    def forward(self, x, *, context=None):
        return x[:, : self.num_experts].abs()

class First(TopK): pass
class Bank(FeedForward): pass
class Scaled(LinearScorer):
    def __init__(self, dim, num_experts, *, factor):
        super().__init__(dim, num_experts)
        self.factor = factor

def term(record, *, power=1):
    return record.routing.logits.square().mean() ** power

ROW = {"scorer": "prototype", "terms": {"router_z": 1e-3}, "summary": "a row of mine"}
PRESET = find_preset("cosine")
def row():
    return {"preset": "linear", "k": 1}
def broken():
    return {"scorer": unknown}
SIZE = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_of_presets.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "mine_of_presets"
    sys.modules.pop("mine_of_presets", None)


@pytest.mark.parametrize(
    "row",
    [
        "{m}:Norms",
        "{m}:ROW",
        "{m}:row",
        "{m}:PRESET",
        '{{scorer = "{m}:Norms", selector = "{m}:First"}}',
        '{{scorer = "{m}:Scaled", factor = 2.0, experts = "{m}:Bank"}}',
        '{{preset = "{m}:ROW", terms = {{mine = {{type = "{m}:term", weight = 0.1, power = 2}}}}}}',
    ],
)
def test_rows_of_your_own(row, mine, task, tmp_path):
    setup = setup_of(task, tmp_path, row.format(m=mine))
    network, run, terms, optimizer = setup.recipe(setup.settings.cells()[0], Tuned())
    assert train(network, task, run.optimization, terms=terms, optimizer=optimizer).epochs[0]["loss"] > 0


def test_objects_of_your_own_that_do_not_fit(mine, user_error):
    with user_error(f"'{mine}:SIZE'", "not a subclass of spectralmoe.Scorer", "nor a preset"):
        find_preset(f"{mine}:SIZE")
    with user_error(f"selector '{mine}:Norms' is not a subclass of spectralmoe.Selector"):
        find_preset({"scorer": "linear", "selector": f"{mine}:Norms"})
    with user_error("term", "is not a function"):
        find_preset({"scorer": "linear", "terms": {"mine": {"type": f"{mine}:SIZE", "weight": 1}}})
    with user_error(f"'{mine}:broken' fails when it is called", "unknown"):
        find_preset(f"{mine}:broken")
    with user_error("needs the argument 'factor'"):
        find_preset(f"{mine}:Scaled")


def test_all_names_of_your_own_are_found_for_the_question_of_trust():
    row = {"preset": "a:b", "scorer": {"type": "c:D"}, "terms": {"t": {"type": "e.f:g"}}, "k": 2, "x": ["no name: h"]}
    assert own_names(row) == own_names(shown(row)) == ["a:b", "c:D", "e.f:g"]
    assert own_names(None) == own_names("linear") == []
    assert read_table(shown(row)) == row


def test_a_row_whose_experts_take_maps(user_error):
    preset = find_preset("moce-ir")
    maps = Trial(torch.zeros(2, 16, 4, 4), unit=Sample())
    preset.check("moce-ir", 16, 4, 8, k=1, trial=maps, depth=1)
    bank = preset.make_experts(4, 16, 8)
    assert [(mixer.rank, mixer.window) for mixer in bank.experts] == [(2, 2), (4, 4), (8, 8), (16, 16)]
    assert bank.costs().tolist() == sorted(set(bank.costs().tolist()))
    with user_error("moce-ir", "PatchMixer takes maps", "Sample"):
        preset.check("moce-ir", 16, 4, 8, k=1, trial=Trial(torch.zeros(2, 16)), depth=1)
    with user_error("moce-ir", "are 4", "asks for 8", "num_experts = 4"):
        preset.check("moce-ir", 16, 8, 8, k=1, trial=maps, depth=1)


def test_presets_are_plain_values():
    assert all(type(find_preset(name)) is Preset for name in PRESETS)
    for name, row in PRESETS.items():
        assert read_table(shown(row)) == row, name
        assert find_preset(shown(row)) == find_preset(name)


def test_a_comparison_takes_tables_and_names_their_folders():
    table = {"scorer": {"type": "linear", "bias": True}, "k": 1}
    settings = parse(CompareSettings, {"routers": ["linear", table, {**table, "k": 2}]}, "F.toml")
    assert settings.routers[1] == '{scorer = {type = "linear", bias = true}, k = 1}'
    names = [Cell(router, 2, 0).name for router in settings.routers]
    assert names[0] == "linear-depth2-seed0"
    assert re.fullmatch(r"scorer_type_linear_bias_true_k_1-[0-9a-f]{8}-depth2-seed0", names[1])
    assert len(set(names)) == 3
    settings.check()
    assert len(Cell(shown({"scorer": "x" * 500}), 2, 0).name) < 100


def test_a_dense_row_is_one_expert_as_wide_as_those_of_a_token():
    dense = find_preset("dense")
    assert [dense.sizes(8, 32, k) for k in (1, 2, "soft")] == [(1, 32), (1, 64), (1, 256)]
    assert find_preset("linear").sizes(8, 32, 2) == (8, 32)
    assert find_preset('{preset = "dense", terms = {router_z = 1e-3}}').dense
    layer = MoE(dense.make_router(6, 1, k=2), dense.make_experts(1, 6, 64))
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), layer.experts.expert(x, 0))
    branch = BranchSpec.of("dense", k=2, experts=4, bottleneck=8).make_moe(6)
    assert tuple(branch.experts.up.shape) == (1, 16, 6)

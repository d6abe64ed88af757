"""The public names. A change here is a change that users see: say so in CHANGELOG.md."""

from __future__ import annotations

import inspect

import pytest

import spectralmoe
from spectralmoe.dispatch import DISPATCHES
from spectralmoe.experts import EXPERTS, Experts
from spectralmoe.regularizers import REGULARIZERS
from spectralmoe.scorers import SCORERS, Scorer
from spectralmoe.selectors import SELECTORS, Selector
from spectralmoe.units import UNITS, Unit

NAMES = [
    "Adapter",
    "Balanced",
    "BasisScorer",
    "Capacity",
    "Context",
    "ContextScorer",
    "CosineScorer",
    "Dense",
    "Dispatch",
    "EigenExperts",
    "EigenbasisScorer",
    "ExpertChoice",
    "Experts",
    "FeedForward",
    "Grouped",
    "LinearScorer",
    "Loop",
    "MoE",
    "ModuleExperts",
    "Monitor",
    "NoisyTopK",
    "Placement",
    "PrincipalScorer",
    "PrototypeScorer",
    "Record",
    "Recordable",
    "Router",
    "Routing",
    "SaturatedScorer",
    "Scorer",
    "Selector",
    "Soft",
    "SoftBalanced",
    "Tape",
    "Term",
    "TopK",
    "TopP",
    "UserError",
    "__version__",
    "after_step",
    "attach",
    "feed",
    "load",
    "param_groups",
    "penalty",
    "record",
    "retract",
    "save",
    "shard_routers",
]

TABLES = {
    "scorers": (SCORERS, "basis context cosine eigenbasis linear monte_carlo principal prototype saturated", Scorer),
    "selectors": (
        SELECTORS,
        "balanced capacity cluster_dropout entmax expert_choice group_limited noisy_topk soft soft_balanced topk topp",
        Selector,
    ),
    "experts": (
        EXPERTS,
        "adapter confident conv eigen feed_forward heterogeneous modulated modules mpo multilinear",
        Experts,
    ),
    "units": (UNITS, "pixel sample token", Unit),
    "dispatch": (DISPATCHES, "dense grouped loop", object),
}


def test_names():
    assert sorted(spectralmoe.__all__) == sorted(NAMES)
    assert all(hasattr(spectralmoe, name) for name in NAMES)


@pytest.mark.parametrize("folder", TABLES)
def test_tables(folder):
    table, names, base = TABLES[folder]
    assert set(names.split()) <= set(table)  # names of saved models stay
    assert all(issubclass(part, base) for part in table.values())
    assert len(set(table.values())) == len(table)


def test_regularizers():
    names = (
        "activation_overlap cluster_variance complexity_balance expected_cost importance_cv2 load_balance "
        "orthonormality output_overlap path_coupling router_z score_variance severity_balance spectral_norm "
        "spectral_penalty stable_rank"
    )
    assert set(names.split()) <= set(REGULARIZERS)
    assert all(function.__name__ == name for name, function in REGULARIZERS.items())


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_documented(name):
    if name != "__version__":
        assert inspect.getdoc(getattr(spectralmoe, name))


@pytest.mark.parametrize("folder", ["scorers", "selectors"])
def test_table_entries_keep_their_arguments(folder, make_scorer, make_selector):
    """A spec is read back from the constructor's signature."""
    for name, part in TABLES[folder][0].items():
        made = make_scorer(name) if folder == "scorers" else make_selector(name)
        own = made.spec_arguments() if hasattr(made, "spec_arguments") else {}
        for argument in list(inspect.signature(part.__init__).parameters)[1:]:
            assert argument in own or hasattr(made, argument), (name, argument)

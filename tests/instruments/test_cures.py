"""Cures that are commands: for the model that was looked at, and such as the command line takes."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer

from spectralmoe.cli.app import app
from spectralmoe.instruments.cures import CURES, cures_for
from spectralmoe.instruments.problems import find_problems

SOURCE = "./my models/Mixtral"
OURS = {"library": "spectralmoe", "source": SOURCE}
THEIRS = {"library": "transformers", "source": SOURCE}
VERBS = typer.main.get_command(app).commands


def layer(dead: float = 0.0, experts: int = 8, **more: Any) -> dict[str, Any]:
    """A layer of a document, as far as cures read it."""
    return {"experts": experts, "top_k": 2, "load": {"dead": {"value": dead}}, **more}


def commands(text: str) -> list[list[str]]:
    """The commands that a cure names."""
    return [shlex.split(each) for each in re.findall(r"spectralmoe (?:(?!; ).)*", text)]


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (OURS, []),
        (THEIRS, []),
        (THEIRS, [layer(2.0), layer(3.0)]),
        (THEIRS | {"groups": 2}, [layer(3.0)]),
        (THEIRS, [layer(2.0, stack="decoder")]),
    ],
)
def test_every_command_is_one_that_the_command_line_takes(model, layers):
    cures = cures_for(model, layers)
    assert cures.keys() == CURES.keys()
    for _, verb, *words in (command for text in cures.values() for command in commands(text)):
        VERBS[verb].make_context(verb, words)  # reads the options, runs nothing


@pytest.mark.parametrize("facts", [{"swapped": True}, {"stack": "decoder"}])
def test_commands_that_the_model_cannot_take_are_not_named(facts):
    """Swapped routers cannot be swapped again, nor pruned; prune and finetune read no encoders."""
    layers = [layer(2.0, stack=facts.get("stack", ""))]
    named = [words for text in cures_for(THEIRS | facts, layers).values() for words in commands(text)]
    assert {words[1] for words in named} == ({"inspect", "finetune"} if "swapped" in facts else {"inspect"})
    assert not any("--router" in words for words in named)


def test_what_cannot_be_said_as_a_command_stays():
    assert cures_for({}, []) == cures_for({"library": "", "source": "gates.safetensors"}, [layer()]) == CURES


def test_the_model_is_named_as_it_was_given():
    for model in (OURS, THEIRS):
        named = [words for text in cures_for(model, [layer(1.0)]).values() for words in commands(text)]
        assert all(SOURCE in words for words in named if words[1] != "train")
        assert {words[1] for words in named} >= ({"train", "inspect"} if model is OURS else {"finetune", "prune"})


@pytest.mark.parametrize(
    ("layers", "groups", "keep"),
    [
        ([layer(3.0), layer(2.0)], 1, "6"),  # as many as all layers can spare
        ([layer(3.0), layer(0.0)], 1, None),
        ([layer(6.0)], 1, None),  # no choice would be left
        ([layer(3.0)], 2, "6"),  # whole in both groups
        ([layer(7.0, experts=12)], 4, "8"),
        ([layer(2.0), layer(2.0, experts=4)], 1, None),
    ],
)
def test_dead_experts_may_be_left_out(layers, groups, keep):
    named = commands(cures_for(THEIRS | {"groups": groups}, layers)["dead_experts"])
    prunes = [words for words in named if words[1] == "prune"]
    assert [words[words.index("--keep") + 1] for words in prunes] == ([] if keep is None else [keep])


def test_findings_carry_the_cure_of_their_model():
    sick = {"name": "layers.0.mlp", "layer": 0, "stack": "", "finite": True, **layer(3.0)}
    sick["load"] |= {name: {"value": 0.0} for name in ("concentration", "max_vio", "dropped")}
    sick["load"]["dead"] |= {"data": 1000, "unit": "slots"}
    facts = {"router_aux_loss_coef": 0.1, "output_router_logits": False, "computes_aux_loss": True}
    training = {"training": facts | {"correction_bias": False}}
    for model in (THEIRS, {}):
        findings = find_problems({"model": model | training, "layers": [sick]})
        cures = {item["kind"]: item["cure"] for item in findings}
        assert {"dead_experts", "balance_off"} <= cures.keys()
        for kind in ("dead_experts", "balance_off"):
            assert cures[kind] == cures_for(model, [sick])[kind]
            assert bool(commands(cures[kind])) == bool(model)

"""The commands of cures run as far as the model or the settings that they name."""

from __future__ import annotations

import re
import shlex

import pytest

from spectralmoe.instruments.cures import cures_for

LAYERS = [{"experts": 8, "top_k": 2, "load": {"dead": {"value": 3.0}}}]


def test_only_the_model_and_the_settings_are_missing(refused, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    gone, settings, text = tmp_path / "gone", tmp_path / "F.toml", tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n")
    both = [cures_for({"library": library, "source": str(gone)}, LAYERS) for library in ("transformers", "spectralmoe")]
    texts = [*both[0].values(), both[1]["imbalance"]]
    named = {command for cure in texts for command in re.findall(r"spectralmoe (?:(?!; ).)*", cure)}
    assert {command.split()[1] for command in named} == {"inspect", "finetune", "prune", "train"}
    for number, command in enumerate(sorted(named)):
        given = {"FILE": text, "DIR": tmp_path / str(number), "F.toml": settings}
        line = refused(*(given.get(word, word) for word in shlex.split(command)[1:]))
        assert f"{gone}: no such model" in line or f"{settings}: no such file" in line, (command, line)

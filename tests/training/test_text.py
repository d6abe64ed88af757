"""The task of language models: windows, bits per byte, settings, and a comparison end to end."""

from __future__ import annotations

import math
import random

import pytest
import torch
from seeds import shifted
from torch import nn

from spectralmoe import load
from spectralmoe.cli.app import run
from spectralmoe.data.text_data import TEXT_PARTS, TextData
from spectralmoe.data.text_sources import Document
from spectralmoe.data.vocabulary import Vocabulary
from spectralmoe.experiments.compare import CompareSettings
from spectralmoe.experiments.compare.columns import COLUMNS, columns_of
from spectralmoe.json_files import read_json
from spectralmoe.saving import read_config
from spectralmoe.training.loop import train
from spectralmoe.training.settings import parse
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.settings.text import Text
from spectralmoe.training.tasks import TextTask, open_task
from spectralmoe.training.tasks.text_verbs import TextMeta
from spectralmoe.training.tasks.windows import cut_windows

WORDS = {"code": ["def", "x", "(", ")", ":", "return", "1"], "prose": ["the", "cat", "sat", "on", "a", "mat"]}
SMALL = {"text": {"length": 16, "heads": 2}, "network": {"width": 16, "hidden": 8, "num_experts": 4}}


def corpus(counts=(("code", 30), ("prose", 30)), words=20):
    draw = random.Random(shifted(0))
    parts = {
        part: [
            Document(domain, " ".join(draw.choice(WORDS[domain]) for _ in range(words)))
            for domain, count in counts
            for _ in range(count if part == "train" else max(2, count // 5))
        ]
        for part in TEXT_PARTS
    }
    return TextData("text:made", tuple(domain for domain, _ in counts), parts)


def test_windows_follow_each_other_through_all_documents():
    documents = [Document("a", "abcd"), Document("b", "xyz"), Document("b", "pq")]
    windows = cut_windows(documents, ("a", "b"), Vocabulary(), 4)
    assert [bytes(row) for row in windows.tokens.tolist()] == [b"\0abcd", b"d\0xyz"]
    assert windows.domains.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]


def by_hand(task, part, model):
    """Bits per byte, in all and by domain, one token after the other."""
    bits, size = {}, {}
    for tokens, domains in zip(task.parts[part].tokens, task.parts[part].domains, strict=True):
        scores = model(tokens[None, :-1].long())[0].double().log_softmax(-1)
        for t, domain in enumerate(domains.tolist()):
            target = int(tokens[t + 1])
            bits[domain] = bits.get(domain, 0.0) - float(scores[t, target]) / math.log(2)
            size[domain] = size.get(domain, 0) + len(task.vocabulary.tokens[target])
    return sum(bits.values()) / sum(size.values()), [bits[d] / size[d] for d in sorted(bits)]


@pytest.mark.parametrize("vocab", ["bytes", 270])
def test_bits_per_byte_are_those_of_a_count_by_hand(vocab):
    if vocab != "bytes":
        pytest.importorskip("tokenizers")
    task = TextTask(corpus((("code", 40), ("prose", 20))), Text(length=16, vocab=vocab))
    settings = parse(TrainSettings, {"data": "text:made", "depth": 1, **SMALL}, "test")
    model = task.build(settings).train()
    with torch.no_grad():
        every, (code, prose) = by_hand(task, "test", model)
    scores = task.score(model, "test")
    assert model.training
    assert scores == pytest.approx({"bits_per_byte": every, "bits_per_byte_code": code, "bits_per_byte_prose": prose})
    assert [metric.key for metric in task.metrics] == list(scores)
    assert every < 12


def test_a_uniform_model_has_8_bits_for_each_byte():
    class Uniform(nn.Linear):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, 256)

    task = TextTask(corpus(), Text(length=16))
    assert task.score(Uniform(1, 1), "validation") == pytest.approx(
        dict.fromkeys(("bits_per_byte", "bits_per_byte_code", "bits_per_byte_prose"), 8.0)
    )
    assert float(
        task.loss(Uniform(1, 1), task.batch(torch.arange(4), None).part(slice(0, 4), torch.device("cpu")))
    ) == (pytest.approx(math.log(256)))


def test_training_windows_come_in_equal_numbers_from_each_domain_as_far_as_they_last():
    whole = TextTask(corpus((("code", 100), ("prose", 10))), Text(length=16))
    counts = whole.parts["train"].domains[:, 0].long().bincount().tolist()
    for size in (7, counts[1], 2 * counts[1], 2 * counts[1] + 9, whole.size):
        task = TextTask(corpus((("code", 100), ("prose", 10))), Text(length=16), train_size=size)
        taken = task.parts["train"].domains[:, 0].long().bincount(minlength=2).tolist()
        assert sum(taken) == size
        assert taken[1] == min(counts[1], size // 2) or taken == counts


def test_a_part_is_measured_on_so_many_windows_of_each_domain():
    task = TextTask(corpus(), Text(length=16, measured=3))
    assert task.parts["test"].domains[:, 0].long().bincount().tolist() == [3, 3]
    assert TextTask(corpus(), Text(length=16)).fingerprint != task.fingerprint
    assert TextTask(corpus(), Text(length=16, measured=3)).fingerprint == task.fingerprint


def test_many_domains_have_no_metrics_of_their_own():
    data = corpus()
    parts = {
        part: [Document(f"{i % 12:02}", document.text) for i, document in enumerate(documents)]
        for part, documents in data.parts.items()
    }
    ordered = {part: sorted(documents) for part, documents in parts.items()}
    many = TextData("text:many", tuple(f"{i:02}" for i in range(12)), ordered)
    assert [metric.key for metric in TextTask(many, Text(length=16)).metrics] == ["bits_per_byte"]


def test_text_that_does_not_do_is_an_error_of_one_line(user_error):
    with user_error("validation part is shorter than one window of 5000"):
        TextTask(corpus((("code", 400),)), Text(length=5000))
    with user_error("cannot take 100000 training windows of 'text:made'"):
        TextTask(corpus(), Text(length=16), train_size=100000)
    data = corpus()
    parts = {**data.parts, "test": [document for document in data.parts["test"] if document.domain == "code"]}
    with user_error("test part has no text of domain 'prose'"):
        TextTask(TextData("text:made", data.domains, parts), Text(length=16))


def test_text_has_defaults_of_its_own_and_images_keep_theirs():
    text, images = CompareSettings(data="text:pydoc"), CompareSettings()
    assert (text.network.width, text.network.hidden, text.network.k, text.optimization.epochs) == (128, 128, 2, 2)
    assert (images.network.width, images.network.hidden, images.optimization.batch_size) == (64, 32, 128)
    assert "text" not in images.model_dump()
    assert "text" not in TrainSettings(data="digits").model_dump()
    changed = parse(
        CompareSettings, {"data": "text:pydoc", "network": {"width": 64}, "optimization": {"lr": 1e-3}}, "x"
    )
    assert (changed.network.width, changed.network.hidden, changed.optimization.lr) == (64, 128, 1e-3)
    assert changed.optimization.batch_size == text.optimization.batch_size
    assert CompareSettings.model_validate(text.model_dump()) == text
    run_of = text.run_of(text.cells()[0])
    assert parse(TrainSettings, run_of.model_dump(mode="json"), "again") == run_of
    assert "image_size" not in run_of.model_dump()


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (TrainSettings, {"data": "digits", "text": {"length": 8}}, ["[text] is about text", "'digits'"]),
        (CompareSettings, {"data": "digits", "text": {"vocab": 300}}, ["[text] is about text"]),
        (TrainSettings, {"data": "text:pydoc", "hold_out": "7"}, ["hold_out is about images", "'text:pydoc'"]),
        (CompareSettings, {"data": "text:pydoc", "image_size": 8}, ["image_size is about images"]),
        (CompareSettings, {"data": "text:pydoc", "backbone": {"name": "vit"}}, ["backbone is about images"]),
        (TrainSettings, {"data": "text:pydoc", "optimization": {"mixup": 0.1}}, ["optimization.mixup is about images"]),
        (TrainSettings, {"data": "text:pydoc", "text": {"lenght": 8}}, ["unknown key 'lenght'", "'length'"]),
        (TrainSettings, {"data": "text:pydoc", "text": {"vocab": 100}}, ["text.vocab", "greater than 256", "bytes"]),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_do_not_go_together_are_errors_of_one_line(kind, values, words, user_error):
    with user_error("F.toml", *words):
        parse(kind, values, "F.toml")


def test_it_learns_and_saves_what_is_needed_to_read_text(tmp_path):
    task = TextTask(corpus(), Text(length=16))
    settings = parse(TrainSettings, {"data": "text:made", "router": "linear", "depth": 1, **SMALL}, "test")
    model = task.build(settings)
    before = task.score(model, "test")["bits_per_byte"]
    history = train(model, task, settings.optimization.model_copy(update={"lr": 1e-2}))
    assert history.validation < before - 2
    meta = TextMeta.model_validate(task.meta(settings, {"test_bits_per_byte": 1.23456}, {}))
    assert (meta.data, meta.domains, meta.length, meta.router) == ("text:made", ("code", "prose"), 16, "linear")
    assert Vocabulary.of_json(meta.vocabulary).encode("cat") == [99, 97, 116]


def test_the_columns_of_text_are_its_metrics_and_a_look_at_the_choices():
    keys = [column.key for column in columns_of(TextTask(corpus(), Text(length=16)))]
    assert keys[:3] == ["bits_per_byte", "bits_per_byte_code", "bits_per_byte_prose"]
    assert {"max_vio", "dead_experts", "entropy", "output_overlap", "noise_flips", "active_parameters"} < set(keys)
    assert keys[-1] == "per_second"
    assert not {"interference", "success", "accuracy"} & set(keys)
    assert "entropy" not in {column.key for column in COLUMNS}


@pytest.mark.slow
def test_routers_are_compared_on_text_from_a_folder(tmp_path, capsys):
    for part, documents in corpus((("code", 60), ("prose", 60)), words=30).parts.items():
        for i, document in enumerate(documents):
            folder = tmp_path / "texts" / document.domain
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{part}{i}.txt").write_text(document.text)
    line = (
        f"compare --data text:{tmp_path / 'texts'} --routers linear,dense --depths 1 --seeds 1 --epochs 1 "
        f"--experts 4 --train-size 60 --vocab 280 --processes 1 --set text.length=16 --set text.heads=2 "
        f"--set network.width=16 --set network.hidden=8 --out {tmp_path / 'out'}"
    )
    pytest.importorskip("tokenizers")
    assert run(line.split()) == 0
    shown = capsys.readouterr().out
    assert "bits/byte prose" in shown
    results = read_json(tmp_path / "out" / "results.json")
    linear, dense = results["cells"]
    for cell in (linear, dense):
        assert 1 < cell["bits_per_byte"] < 9
        assert cell["bits_per_byte_code"] != cell["bits_per_byte_prose"]
        assert cell["per_second"] > 0
    assert linear["active_parameters"] < linear["parameters"]
    assert abs(dense["active_parameters"] - linear["active_parameters"]) == 3 * 16
    assert dense["active_parameters"] == dense["parameters"]
    assert 0 <= linear["noise_flips"] <= 1
    assert dense["output_overlap"] is None
    folder = tmp_path / "out" / "models" / "linear-depth1-seed0"
    model, meta = load(folder), TextMeta.model_validate(read_config(folder)["meta"])
    vocabulary = Vocabulary.of_json(meta.vocabulary)
    tokens = torch.tensor([vocabulary.encode("the cat")])
    assert vocabulary.decode(model.generate(tokens, 5)[0].tolist()).startswith("the cat")
    task = open_task(parse(CompareSettings, results["settings"], "again").run_of(CompareSettings().cells()[0]))
    assert task.metric.key == "bits_per_byte"

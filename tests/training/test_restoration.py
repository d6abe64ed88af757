"""The task of restoration: pairs, PSNR and SSIM, settings, and the verbs end to end."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from seeds import generator, shifted
from torch.nn import functional as F

from spectralmoe import load
from spectralmoe.cli.app import run
from spectralmoe.data.degradations import KINDS, Pairs
from spectralmoe.data.image_files import read_image
from spectralmoe.data.photos import PHOTO_PARTS, Photo, PhotoData
from spectralmoe.experiments.cards.small_runs import small_restoration
from spectralmoe.experiments.compare import CompareSettings
from spectralmoe.experiments.compare.columns import columns_of
from spectralmoe.instruments.samples import Place
from spectralmoe.json_files import read_json
from spectralmoe.training.loop import train
from spectralmoe.training.settings import parse
from spectralmoe.training.settings.restoration import Restore
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks import RestorationTask
from spectralmoe.training.tasks.restoration_scores import psnr, restoration_scores, ssim

pytest.importorskip("skimage")

RESTORE = {"patch": 16, "measured": 2, "scale": 4, "stem": 4}
SMALL = {"restore": RESTORE, "network": {"width": 8, "hidden": 8, "num_experts": 3}}


@cache
def photo(number, side=64):
    """A smooth picture."""
    drawn = torch.rand(1, 1, side // 8, side // 8, generator=generator(number))
    return F.interpolate(drawn, side, mode="bicubic").clamp(0, 1)[0]


def photos():
    counts = dict(zip(PHOTO_PARTS, ((0, 4), (4, 5), (5, 7)), strict=True))
    return PhotoData("made", {part: [Photo(str(i), photo(i)) for i in range(*ends)] for part, ends in counts.items()})


def task_of(**restore):
    return RestorationTask(photos(), Restore(**{**RESTORE, **restore}), train_size=40)


def settings_of(**changes):
    optimization = {"seed": shifted(0), **changes.pop("optimization", {})}
    values = {"data": "restore:photos", "router": "linear", **SMALL, **changes, "optimization": optimization}
    return parse(TrainSettings, values, "test")


def test_psnr_by_hand_and_as_a_loop():
    images, truths = torch.rand(2, 1, 5, 4, generator=generator(1)), torch.rand(2, 1, 5, 4, generator=generator(2))
    for got, image, truth in zip(psnr(images, truths), images.double(), truths.double(), strict=True):
        error = sum((a - b) ** 2 for a, b in zip(image.flatten().tolist(), truth.flatten().tolist(), strict=True)) / 20
        assert float(got) == pytest.approx(-10 * math.log10(error))
    assert psnr(truths, truths).tolist() == [100.0, 100.0]


def test_ssim_of_equal_and_of_plain_images():
    image = photo(1)[None]
    assert float(ssim(image, image)) == pytest.approx(1)
    a, b = torch.full((1, 1, 16, 16), 0.25), torch.full((1, 1, 16, 16), 0.75)
    light = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)  # no contrast, no structure: the rest is 1
    assert float(ssim(a, b)) == pytest.approx(light)


def test_scores_are_those_of_each_kind_and_their_mean():
    pairs = task_of().parts["test"]
    scores = restoration_scores(pairs.images, pairs)
    for place, kind in enumerate(KINDS):
        own = pairs[pairs.kinds == place]
        assert scores[f"psnr_{kind}"] == pytest.approx(float(psnr(own.images, own.truths).mean()))
        assert scores[f"ssim_{kind}"] == pytest.approx(float(ssim(own.images, own.truths).mean()))
    for key in ("psnr", "ssim"):
        assert scores[key] == pytest.approx(sum(scores[f"{key}_{kind}"] for kind in KINDS) / 5)


def test_pairs_are_the_same_every_time_and_parts_have_all_kinds():
    task, again = task_of(), task_of()
    assert task.fingerprint == again.fingerprint
    assert task.fingerprint != RestorationTask(photos(), Restore(**RESTORE), train_size=41).fingerprint
    assert (task.size, len(task.parts["test"]), tuple(task.example().shape)) == (40, 10, (1, 1, 16, 16))
    one = task_of(kinds=["noise"])
    assert one.parts["train"].kinds.unique().tolist() == [KINDS.index("noise")]
    assert torch.equal(one.parts["test"].images, task.parts["test"].images)
    everything = RestorationTask(photos(), Restore(**RESTORE)).parts["train"]
    seen = {
        (truth.numpy().tobytes(), int(kind)) for truth, kind in zip(everything.truths, everything.kinds, strict=True)
    }
    assert len(seen) == len(everything) > 100  # each patch once in each kind
    test = task.parts["test"]
    of_kinds = [test.truths[test.kinds == place] for place in range(len(KINDS))]
    assert all(torch.equal(truths, of_kinds[0]) for truths in of_kinds)
    few = task.parts["train"].truths
    assert len({truth.numpy().tobytes() for truth in few}) == len(few)


def test_a_network_gets_the_severity_of_its_pairs_and_learns(tmp_path):
    task, settings = task_of(), settings_of(router={"scorer": {"type": "context", "width": 4}, "k": 1})
    model = task.build(settings)
    before = task.score(model, "test")
    batch = task.batch(torch.arange(8), np.random.default_rng(shifted(0)))
    assert float(task.loss(model, batch).detach()) == pytest.approx(float((batch.images - batch.truths).abs().mean()))
    pairs = task.parts["test"]
    for key, value in restoration_scores(pairs.images, pairs).items():
        assert before[key] == pytest.approx(value)  # an untrained network changes nothing
    history = train(model, task, settings.optimization.model_copy(update={"epochs": 6, "batch_size": 8, "lr": 1e-2}))
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    assert bool((model.blocks[0].moe.router.scorer.weight.grad != 0).any())


def test_restoration_has_defaults_of_its_own_and_others_keep_theirs():
    compared, trained = CompareSettings(data="restore:photos"), TrainSettings(data="restore:photos")
    assert (compared.depths, compared.network.width, compared.train_size) == ((1,), 32, 4000)
    assert (trained.depth, trained.network.num_experts, trained.restore) == (1, 4, Restore())
    assert "restore" not in CompareSettings().model_dump()
    assert "restore" not in TrainSettings(data="digits").model_dump()
    assert "restore" not in TrainSettings(data="text:pydoc").model_dump()
    assert CompareSettings.model_validate(compared.model_dump()) == compared
    run_of = compared.run_of(compared.cells()[0])
    assert parse(TrainSettings, run_of.model_dump(mode="json"), "again") == run_of
    assert not {"image_size", "text"} & set(run_of.model_dump())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data": "digits", "restore": {}}, ["[restore] is about photographs", "'digits'"]),
        ({"data": "restore:photos", "hold_out": "7"}, ["hold_out is not for restoration"]),
        ({"data": "restore:photos", "backbone": {"name": "vit"}}, ["backbone is not for restoration"]),
        ({"data": "restore:photos", "optimization": {"mixup": 0.1}}, ["optimization.mixup is about classes"]),
        ({"data": "restore:photos", "restore": {"kinds": ["fog"]}}, ["unknown degradation 'fog'", "haze"]),
        ({"data": "restore:photos", "restore": {"patch": 20, "scale": 8}}, ["divides the patch of 20, got 8"]),
        ({"data": "restore:photos", "restore": {"unit": "row"}}, ["restore.unit", "'pixel'"]),
        ({"data": "restore:photos", "restore": {"unit": "sample"}, "network": {"spare": 1}}, ["network.spare"]),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_errors_of_one_line(values, words, user_error):
    with user_error("F.toml", *words):
        parse(TrainSettings, values, "F.toml")


def test_rows_are_tried_with_the_unit_of_the_run(user_error):
    of_maps = '{scorer = "linear", experts = {type = "conv", channels = "= dim"}}'
    of_severity = '{scorer = {type = "context", width = 4}}'
    sizes = {**SMALL, "data": "restore:photos", "routers": ["linear", "dense", of_severity]}
    for unit, more in (("pixel", "ermoe"), ("token", "emoe"), ("sample", of_maps)):
        values = {**sizes, "restore": {**RESTORE, "unit": unit}, "routers": [*sizes["routers"], more]}
        parse(CompareSettings, values, "x").check()
    with user_error("ConvExperts takes rows of 3 dimensions"):
        parse(CompareSettings, {**sizes, "routers": [of_maps]}, "x").check()
    with user_error("reads 'attended' from the context", "severity, map"):
        parse(CompareSettings, {**sizes, "routers": ["ermoe-context"]}, "x").check()


def test_the_columns_of_restoration_are_its_metrics_for_every_kind():
    keys = [column.key for column in columns_of(task_of())]
    assert keys[:6] == ["psnr", *(f"psnr_{kind}" for kind in KINDS)]
    assert keys[6:12] == ["ssim", *(f"ssim_{kind}" for kind in KINDS)]
    assert {"max_vio", "active_flops", "active_parameters"} < set(keys)


def test_a_part_without_a_patch_is_an_error_of_one_line(user_error):
    data = photos()
    plain = PhotoData("made", {**data.parts, "test": [Photo("plain", torch.full((1, 64, 64), 0.5))]})
    with user_error("no patch of 16 x 16 in the test photographs shows anything"):
        RestorationTask(plain, Restore(**RESTORE))


def test_the_run_that_cards_share_takes_settings_of_both_sections():
    run_of = small_restoration(100, 2, unit="sample", network={"k": 2})
    assert (run_of.train_size, run_of.optimization.epochs, run_of.restore.unit) == (100, 2, "sample")
    assert (run_of.network.k, run_of.network.width) == (2, 32)


@pytest.mark.slow
def test_routers_are_compared_evaluated_and_used_on_photographs_of_a_folder(tmp_path, capsys, user_error):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "photos").mkdir()
    for i in range(4):
        np.save(tmp_path / "photos" / f"{i}.npy", photo(shifted(i)).numpy()[0])
    colours = (torch.rand(20, 17, 3, generator=generator(9)) * 255).byte().numpy()
    image.fromarray(colours).save(tmp_path / "colour.png")
    line = (
        f"compare --data restore:folder:{tmp_path / 'photos'} --routers linear,dense --seeds 1 --epochs 1 --k 1 "
        f"--experts 3 --train-size 10 --processes 1 --set restore.patch=16 --set restore.scale=4 "
        f"--set restore.measured=1 --set restore.unit=sample --set network.width=8 --set network.hidden=8 "
        f"--columns psnr_haze --out {tmp_path / 'out'}"
    )
    assert run(line.split()) == 0
    assert "PSNR haze" in capsys.readouterr().out
    linear, dense = read_json(tmp_path / "out" / "results.json")["cells"]
    assert linear["active_flops"] - dense["active_flops"] == 2 * 8 * (3 - 1)  # one expert of three, and the gate
    assert linear["output_overlap"] is None
    assert (tmp_path / "out" / "restored.png").stat().st_size > 1000
    folder = str(tmp_path / "out" / "models" / "linear-depth1-seed0")
    assert run(["evaluate", folder]) == 0
    assert "mixture: " in capsys.readouterr().out
    assert run(["inspect", folder, "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert inspected["data"]["source"].startswith("5 test patches of restore:")
    assert {example["text"] for example in inspected["layers"][0]["examples"][0]} <= set(KINDS)
    assert run(["predict", folder, str(tmp_path / "colour.png"), "--out", str(tmp_path / "made")]) == 0
    place = tmp_path / "made" / "colour-restored.png"
    assert str(place) in capsys.readouterr().out
    given, restored = (read_image(path, channels=3, size=(20, 17)) for path in (tmp_path / "colour.png", place))
    with torch.no_grad():
        want = load(folder).eval()(given[None])[0].clamp(0, 1)
    torch.testing.assert_close(restored, want, rtol=0, atol=0.5 / 255 + 1e-4)


def test_held_out_patches_are_looked_at_with_their_severity(tmp_path):
    task, settings = task_of(), settings_of(router={"scorer": {"type": "context", "width": 4}, "k": 1})
    held = task.held_out()
    network = task.build(settings)
    assert network(held.inputs, **held.beside).shape == held.inputs.shape
    assert torch.equal(held.beside["severity"], task.parts["test"].severity)
    whole, corner = (held.describe(0, Place(0, 0, length)) for length in (1, 16))
    assert whole["text"] == corner["text"] == KINDS[0]
    assert len(whole["image"]) > len(corner["image"])


def test_predictions_that_cannot_be_made_are_errors_of_one_line(tmp_path, user_error):
    task, settings = task_of(), settings_of(router={"scorer": {"type": "context", "width": 4}})
    with user_error("read the severity, which is not known of a file"):
        task.predict(task.build(settings), None, ["a.png"])
    model = task.build(settings_of())
    with user_error("two of the images would be written to", "a-restored.png"):
        task.predict(model, None, ["a.png", "a.npy"])
    with user_error("none.png"):
        task.predict(model, None, [str(tmp_path / "none.png")])


def test_the_example_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "restoration.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names = {}
    exec(compile(example, "restoration.md", "exec"), names)
    assert names["restored"].shape == (10, 1, 32, 32)


def test_pairs_go_to_a_device_in_parts():
    pairs = task_of().parts["train"]
    part = pairs.part(slice(3, 7), torch.device("cpu"))
    assert isinstance(part, Pairs)
    assert torch.equal(part.severity, pairs.severity[3:7])

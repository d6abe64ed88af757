"""The training loop: an undisturbed run is the reference for every interrupted one."""

import math

import pytest
import torch
from grids import one_of_each

from spectralmoe import Term, UserError
from spectralmoe.data.image_data import ImageData, Split, load_data
from spectralmoe.diagnostics import evaluate
from spectralmoe.json_files import read_json
from spectralmoe.presets import PRESETS, find_preset
from spectralmoe.regularizers import output_overlap, spectral_norm
from spectralmoe.selectors import Balanced
from spectralmoe.training.loop import Diverged, train
from spectralmoe.training.network import build_network
from spectralmoe.training.settings import Network, Optimization
from spectralmoe.training.tasks import ImageTask

SMALL = Network(width=16, num_experts=4, hidden=8, k=2)
BUDGET = Optimization(epochs=2, batch_size=64, seed=3)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data("digits").subset(300)


@pytest.fixture(scope="module")
def task(data) -> ImageTask:
    return ImageTask(data)


def bits(model: torch.nn.Module) -> list[bytes]:
    return [value.numpy().tobytes() for value in model.state_dict().values()]


class Stop(Exception):
    pass


@one_of_each(
    router=["eigenbasis", "linear+balanced", "sr-moe", '{preset = "moec", interval = 2}'], stop_at=[1, 4, 5, 7]
)
def test_resumed_run_ends_with_the_same_bits(data, task, router, stop_at, tmp_path, monkeypatch):
    monkeypatch.setattr("spectralmoe.training.loop._CHECKPOINT_SECONDS", 0.0)  # a checkpoint after every step
    undisturbed = build_network(data, SMALL, router, 2, seed=0)
    train(undisturbed, task, BUDGET)
    calls = 0

    def stop(share: float) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stop

    path = tmp_path / "training.safetensors"
    with pytest.raises(Stop):
        train(build_network(data, SMALL, router, 2, seed=0), task, BUDGET, checkpoint=path, progress=stop)
    torch.manual_seed(99)
    resumed = build_network(data, SMALL, router, 2, seed=77)  # other initial weights: all must come from the file
    history = train(resumed, task, BUDGET, checkpoint=path)
    assert bits(resumed) == bits(undisturbed)
    assert len(history.epochs) == BUDGET.epochs


def test_training_is_deterministic_and_learns(data, task):
    first, second = (build_network(data, SMALL, "sr-moe", 2, seed=1) for _ in range(2))
    before = evaluate(first, data.test.images, data.test.labels).accuracy
    budget = Optimization(epochs=15, batch_size=32, seed=1)
    for network in (first, second):
        train(network, task, budget)
    assert bits(first) == bits(second)
    assert evaluate(first, data.test.images, data.test.labels).accuracy > before + 40


def test_the_test_part_is_never_read(data):
    hidden = Split(torch.full_like(data.test.images, torch.nan), data.test.labels)
    network = build_network(data, SMALL, "linear", 1, seed=0)
    train(network, ImageTask(ImageData(data.name, data.train, data.validation, hidden, data.classes)), BUDGET)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


def test_learning_rate_warms_up_and_falls_to_zero(data, task, monkeypatch):
    rates = []
    network = build_network(data, SMALL, "linear", 1, seed=0)
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(network, task, Optimization(epochs=4, batch_size=30, lr=1e-2, warmup=0.25))
    n, warm = 40, 10
    expected = [
        1e-2 * (i + 1) / (warm + 1) if i < warm else 5e-3 * (1 + math.cos(math.pi * (i - warm) / 30)) for i in range(n)
    ]
    assert rates == pytest.approx(expected)


def test_terms_take_part(data, task):
    networks = [build_network(data, SMALL, "prototype", 1, seed=0) for _ in range(2)]
    budget = Optimization(epochs=20, batch_size=64)
    train(networks[0], task, budget)
    train(networks[1], task, budget, terms={"sigma": Term(spectral_norm, 10.0)})
    plain, bound = (torch.linalg.matrix_norm(n.stages[0].moe.router.scorer.prototypes, 2) for n in networks)
    assert bound < plain
    assert bound < 1.05


def test_a_term_gets_the_tensors_that_it_reads(data, task):
    networks = [build_network(data, SMALL, "linear", 2, seed=1) for _ in range(2)]
    for network, weight in zip(networks, (0.0, 1.0), strict=True):
        train(network, task, BUDGET, terms={"overlap": Term(output_overlap, weight)})
    assert bits(networks[0]) != bits(networks[1])


def test_a_step_that_the_scaler_leaves_out_counts_with_the_next(data, task, monkeypatch):
    bad, counted = [False, True, True, False, False, False], []

    class Scaler(torch.amp.GradScaler):
        def scale(self, loss):
            return super().scale(loss) * (torch.inf if bad.pop(0) else 1)

    monkeypatch.setattr(Balanced, "update", lambda _, counts: counted.append(int(counts.sum())))
    monkeypatch.setattr("spectralmoe.training.loop.loss_scaler", lambda *_: Scaler("cpu", init_scale=2.0))
    network = build_network(data, SMALL, "linear+balanced", 1, seed=0)
    settings = Optimization(epochs=1, batch_size=-(-task.size // 6))
    train(network, task, settings)
    sizes = [len(part) for part in torch.arange(task.size).split(settings.batch_size)]
    each = counted[0] // sizes[0]
    assert counted == [each * size for size in (sizes[0], sum(sizes[1:4]), *sizes[4:])]


def test_diverged_loss_names_the_step_and_keeps_the_last_checkpoint(data, task, tmp_path, monkeypatch):
    monkeypatch.setattr("spectralmoe.training.loop._CHECKPOINT_SECONDS", 0.0)
    path = tmp_path / "training.safetensors"
    weight = Term(spectral_norm, lambda step: float("nan") if step == 6 else 0.0)
    network = build_network(data, SMALL, "linear", 1, seed=0)
    with pytest.raises(Diverged, match=r"step 6 .*nan.*checkpoint is kept in .*training.safetensors") as caught:
        train(network, task, BUDGET, terms={"sigma": weight}, checkpoint=path)
    assert "\n" not in str(caught.value)
    fresh = build_network(data, SMALL, "linear", 1, seed=0)
    train(fresh, task, BUDGET, checkpoint=path)  # goes on from step 6 without the broken term
    undisturbed = build_network(data, SMALL, "linear", 1, seed=0)
    train(undisturbed, task, BUDGET)
    assert bits(fresh) == bits(undisturbed)


@pytest.mark.parametrize("router", [n for n in PRESETS if n not in ("ermoe-context", "moce-ir", "phyg-moe")])
def test_absurd_learning_rate_stops_with_one_line(data, task, router):
    network = build_network(data, SMALL, router, 2, seed=0)
    with pytest.raises(Diverged, match=r"training diverged at step \d+ \(epoch 1\)") as caught:
        train(network, task, Optimization(epochs=1, batch_size=8, lr=1e30, warmup=0), terms=find_preset(router).terms)
    assert "\n" not in str(caught.value)


def test_checkpoint_never_holds_broken_weights(data, task, tmp_path, monkeypatch):
    monkeypatch.setattr("spectralmoe.training.loop._CHECKPOINT_SECONDS", 0.0)
    path = tmp_path / "training.safetensors"
    network = build_network(data, SMALL, "linear", 1, seed=0)

    def poison(share: float) -> None:
        if share == 0.5:
            network.head.weight.data[0, 0] = float("inf")

    with pytest.raises(Diverged, match=r"head\.weight is not finite"):
        train(network, task, BUDGET, checkpoint=path, progress=poison)
    good = build_network(data, SMALL, "linear", 1, seed=0)
    train(good, task, BUDGET, checkpoint=path)
    assert all(torch.isfinite(value).all() for value in good.state_dict().values())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x10\0\0\0\0\0\0\0{}" + b" " * 14])
def test_broken_checkpoint_is_one_clear_line(data, task, tmp_path, content):
    path = tmp_path / "training.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"training.safetensors is not a checkpoint of this run") as caught:
        train(build_network(data, SMALL, "linear", 1, seed=0), task, BUDGET, checkpoint=path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_checkpoint_of_another_network_is_refused(data, task, tmp_path):
    path = tmp_path / "training.safetensors"
    train(build_network(data, SMALL, "linear", 1, seed=0), task, BUDGET, checkpoint=path)
    with pytest.raises(UserError, match="is not a checkpoint of this run"):
        train(build_network(data, SMALL, "prototype", 1, seed=0), task, BUDGET, checkpoint=path)


def test_read_json_says_what_is_wrong(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not a readable JSON file"):
        read_json(tmp_path / "x.json")

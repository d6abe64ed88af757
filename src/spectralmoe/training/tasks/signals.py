"""Classification of signals: which jammers a record of radio interference holds, and the operations that this takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Context
from spectralmoe.data.interference import CLASSES, Interference, synthetic_interference
from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.digests import sha256_of_tensors
from spectralmoe.errors import UserError, one_of
from spectralmoe.instruments.samples import Place
from spectralmoe.models import SignalMoE, signal_experts, signal_moe
from spectralmoe.models.signal import HOP, WINDOW
from spectralmoe.moe import MoE
from spectralmoe.naming import shown
from spectralmoe.recorder import record
from spectralmoe.rows import Trial
from spectralmoe.tape import Tape
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks.base import Metric, Part, Task, rounded
from spectralmoe.training.tasks.classification import ACCURACY, CLASSIFICATION, class_scores
from spectralmoe.training.tasks.shown import HeldOut, Predictions, Shown
from spectralmoe.training.tasks.signal_verbs import SignalMeta, classify_records, read_signal_meta
from spectralmoe.units import Sample

__all__ = ["SignalTask", "Signals"]

NAME, LENGTH, JNR = "signals:interference", 512, (0.0, 20.0)
TRAINED, MEASURED = 4_200, {"validation": 1_050, "test": 2_100}
_SEEDS = {"train": 0, "validation": 1, "test": 2}
_NOT_HERE = ("image_size", "hold_out", "backbone")
_TOGETHER = 256

SINGLE, PAIR = "one jammer", "two jammers"
METRICS = (
    *CLASSIFICATION[:1],
    Metric("accuracy_single", "accuracy, one", f"{ACCURACY.meaning}, of records of {SINGLE}", "higher", unit="%"),
    Metric("accuracy_pair", "accuracy, two", f"{ACCURACY.meaning}, of records of {PAIR}", "higher", unit="%"),
    *CLASSIFICATION[2:],
    Metric("expert_mflop", "experts", "operations of the chosen experts, mean over records", "lower", unit="MFLOP"),
    Metric("cost_single", "cost, one", f"the same over that of the dearest experts, records of {SINGLE}", "lower", "%"),
    Metric("cost_pair", "cost, two", f"the same over that of the dearest experts, records of {PAIR}", "lower", "%"),
)


@dataclass(frozen=True, slots=True)
class Signals:
    """Signals (B, T) with their classes (B,)."""

    signals: Tensor
    labels: Tensor

    def part(self, chosen: slice, device: torch.device) -> Signals:
        """Some of them, on ``device``."""
        return Signals(self.signals[chosen].to(device), self.labels[chosen].to(device))


class SignalTask(Task):
    """Name the jammers of a record: 21 classes of ``synthetic_interference``, at 0 to 20 dB over the noise.

    Records have 512 samples. The three parts are made under seeds of their own, whatever the seed of a run is.

    Args:
        train_size: training records; None: 4,200. The other parts have 1,050 and 2,100.
        label_smoothing: of the targets, see ``ImageTask``.

    Raises:
        UserError: train_size < 21, so that a class has no record.

    >>> task = SignalTask(train_size=42)
    >>> task.size, tuple(task.example().shape), task.metric.key
    (42, (1, 512), 'accuracy')
    """

    metrics = METRICS
    does = "classifies signals"
    unit = "record"

    def __init__(self, train_size: int | None = None, *, label_smoothing: float = 0.0) -> None:
        size = TRAINED if train_size is None else train_size
        if size < len(CLASSES):
            raise UserError(f"{NAME}: train_size must be at least {len(CLASSES)}, one record a class, got {size}")
        self.name, self.label_smoothing = NAME, label_smoothing
        sizes = {"train": size, **MEASURED}
        self.parts: dict[str, Interference] = {
            part: synthetic_interference(count, jnr=JNR, seed=_SEEDS[part], length=LENGTH)
            for part, count in sizes.items()
        }

    @classmethod
    def open(cls, settings: TrainSettings, data_dir: Path | None = None, download: bool = False) -> Self:
        _check(settings.data)
        for key in _NOT_HERE:
            if getattr(settings, key) is not None:
                raise UserError(f"{key} is not about signals, but the data are {NAME!r}; leave it out")
        if settings.optimization.mixup:
            raise UserError(f"optimization.mixup is about images, but the data are {NAME!r}; leave it out")
        return cls(settings.train_size, label_smoothing=settings.optimization.label_smoothing)

    @property
    def size(self) -> int:
        return len(self.parts["train"].labels)

    @property
    def fingerprint(self) -> str:
        parts = self.parts.values()
        return sha256_of_tensors(("", values) for data in parts for values in (data.signals, data.labels))[:16]

    def build(self, settings: TrainSettings) -> SignalMoE:
        """The untrained network: ``[network]`` has C, E, H and k, the depth is the number of blocks. Its experts grow
        from an eighth of H to H; those of a row with a bank of its own are what the row says.
        """
        network, preset = settings.network, settings.preset
        num_experts, hidden = preset.sizes(network.num_experts, network.hidden, network.k)
        if network.spare:
            raise UserError(f"{NAME}: the experts of signals have no spare units; leave spare at 0")
        torch.manual_seed(settings.optimization.seed)
        return signal_moe(
            len(CLASSES),
            width=network.width,
            depth=settings.depth,
            num_experts=num_experts,
            hidden=hidden,
            experts=signal_experts if preset.experts is None else preset.make_experts,
            router=preset.routers(network.k),
        )

    @classmethod
    def trial(cls, settings: TrainSettings) -> Trial:
        """Two maps with their signals; convolutions of one width stand for the experts of unequal width."""
        maps = torch.zeros(2, settings.network.width, WINDOW // 4, LENGTH // HOP // 4)
        side = Context(samples={"map": torch.zeros(2, LENGTH, dtype=torch.complex64)})
        return Trial(maps, side, Sample(), {"type": "conv", "channels": "= dim"})

    def batch(self, indices: Tensor, draw: np.random.Generator) -> Signals:
        train = self.parts["train"]
        return Signals(train.signals[indices], train.labels[indices])

    def loss(self, model: nn.Module, batch: Signals) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits(model, batch), batch.labels, label_smoothing=self.label_smoothing)

    def logits(self, model: nn.Module, batch: Signals) -> Tensor:
        """What the network says of a batch: (B, 21) fp32."""
        logits: Tensor = model(batch.signals).float()
        return logits

    @torch.no_grad()
    def score(self, model: nn.Module, part: Part) -> dict[str, float]:
        data, device = self.parts[part], next(model.parameters()).device
        records, said, paid, dearest = Signals(data.signals, data.labels), [], [], []
        with evaluation_mode(model):
            for start in range(0, len(data.labels), _TOGETHER):
                with record(model, keep=("input",)) as tape:
                    batch = records.part(slice(start, start + _TOGETHER), device)
                    said.append(self.logits(model, batch).cpu())
                spent, most = _costs(tape)
                paid.append(spent)
                dearest.append(most)
        logits = torch.cat(said)
        cost, most = torch.cat(paid), torch.cat(dearest)
        whole = class_scores(logits, data.labels)
        scores = {metric.key: whole[metric.key] for metric in METRICS if metric.key in whole}
        right = logits.argmax(1) == data.labels
        for name, here in (("single", data.components == 1), ("pair", data.components == 2)):
            scores[f"accuracy_{name}"] = 100 * float(right[here].double().mean())
            scores[f"cost_{name}"] = 100 * float(cost[here].sum() / most[here].sum())
        return {**scores, "expert_mflop": float(cost.mean()) / 1e6}

    def example(self) -> Tensor:
        return self.parts["test"].signals[:1]

    def inputs(self, part: Part) -> Tensor:
        return self.parts[part].signals

    def meta(
        self, settings: TrainSettings, results: Mapping[str, float], loads: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        meta = SignalMeta(
            data=self.name,
            classes=CLASSES,
            length=LENGTH,
            router=shown(settings.row),
            settings=settings.model_dump(mode="json"),
            results=rounded(results, loads),
        )
        return meta.model_dump(mode="json")

    @classmethod
    def read_meta(cls, network: nn.Module, values: Any, folder: Path) -> SignalMeta:
        return read_signal_meta(network, values, folder)

    @classmethod
    def reopen(
        cls, meta: SignalMeta, name: str | None = None, data_dir: Path | None = None, download: bool = False
    ) -> Self:
        _check(name or meta.data)
        return cls(meta.settings.get("train_size"))

    @classmethod
    def predict(cls, network: nn.Module, meta: SignalMeta, inputs: Sequence[str], **options: Any) -> Predictions:
        return Predictions(classify_records(network, meta, inputs))

    def summary(self, scores: Mapping[str, float]) -> Shown:
        records = len(self.parts["test"].labels)
        text = (
            f"{scores['accuracy']:.2f}% of {records} test records of {self.name} are right: "
            f"{scores['accuracy_single']:.2f}% of {SINGLE}, {scores['accuracy_pair']:.2f}% of {PAIR}; "
            f"{scores['expert_mflop']:.3g} MFLOP a record in the experts"
        )
        return Shown({"records": records, **scores}, text)

    def held_out(self) -> HeldOut:
        test = self.parts["test"]

        def describe(index: int, place: Place) -> dict[str, Any]:
            return {"text": CLASSES[int(test.labels[index])]}

        return HeldOut("records", test.signals, test.labels, CLASSES, describe)


def _costs(tape: Tape) -> tuple[Tensor, Tensor]:
    """Operations of each record's chosen experts (B,), and of the K most expensive ones, over all layers."""
    spent, dearest = list[Tensor](), list[Tensor]()
    for item in tape:
        assert isinstance(item.layer, MoE)
        costs = item.layer.experts.costs(item.input.shape[1:])
        indices = item.routing.indices.cpu()
        filled = (indices >= 0) & (indices < len(costs))
        spent.append(torch.where(filled, costs[indices.clamp(0, len(costs) - 1)], 0).sum(1))
        dearest.append(costs.topk(min(indices.shape[1], len(costs))).values.sum().expand(len(indices)))
    return torch.stack(spent).sum(0), torch.stack(dearest).sum(0)


def _check(data: str) -> None:
    if data != NAME:
        raise one_of("signals", data, [NAME])

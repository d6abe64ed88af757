"""Restoration of photographs: the degraded one in, the true one out; PSNR and SSIM for each degradation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Context
from spectralmoe.data.degradations import DEGRADATIONS, KINDS, Pairs
from spectralmoe.data.image_data import Split
from spectralmoe.data.photos import PHOTO_PARTS, PhotoData, PhotoPart, load_photos, patches_of
from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.digests import sha256_of_tensors
from spectralmoe.errors import UserError
from spectralmoe.models import RestorationMoE, restoration_moe
from spectralmoe.naming import shown
from spectralmoe.rows import RELU, Trial
from spectralmoe.training.settings import parse
from spectralmoe.training.settings.restoration import Restore, is_restore
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks.base import Part, Task, rounded
from spectralmoe.training.tasks.image_verbs import patch
from spectralmoe.training.tasks.restoration_scores import PSNR, RESTORATION, restoration_scores
from spectralmoe.training.tasks.restoration_verbs import RestoreMeta, draw_restored, read_restore_meta, restore_files
from spectralmoe.training.tasks.shown import HeldOut, Predictions, Shown
from spectralmoe.units import UNITS

__all__ = ["RestorationTask"]

_TOGETHER = 2**18
_SEEDS: dict[PhotoPart, int] = {"train": 0, "validation": 1, "test": 2}
CONV = {"type": "conv", "channels": "= dim"}


class RestorationTask(Task):
    r"""Restore photographs.

    A sample is a grey patch, degraded once and for all: under every seed a run sees the same pairs. Sample i of a part
    is its patch i, from the first again after the last, degraded in the kind whose turn it is, so that kinds come in
    equal numbers. The loss is the mean absolute difference to the true patch.

    ``psnr`` is the mean over patches of :math:`-10 \log_{10} \mathrm{mean}(x - \hat x)^2`, in decibels, ``ssim`` the
    mean structural similarity (scikit-image's, with the Gaussian window of Wang et al., 2004). Both are given for
    every kind, as ``psnr_blur``, and as the mean over kinds.

    Args:
        data: photographs.
        restore: patches, kinds, and how many are measured.
        train_size: training samples; None: each training patch in each kind.

    Raises:
        UserError: a part without a patch in which anything is to be seen; scikit-image is not installed.
    """

    metrics = RESTORATION
    does = "restores photographs"
    options = ("out",)
    unit = "image"

    def __init__(self, data: PhotoData, restore: Restore | None = None, *, train_size: int | None = None) -> None:
        self.data, self.restore = data, restore or Restore()
        self.name, self.notes = f"restore:{data.name}", data.notes
        self.parts: dict[PhotoPart, Pairs] = {}
        for part in PHOTO_PARTS:
            kinds = self.restore.kinds if part == "train" else KINDS
            patches = patches_of(data.parts[part], self.restore.patch)
            if not len(patches):
                raise UserError(
                    f"{self.name!r}: no patch of {self.restore.patch} x {self.restore.patch} in the {part} photographs "
                    "shows anything; add photographs, or choose a smaller [restore] patch"
                )
            everything = len(patches) * len(kinds)
            wanted = train_size if part == "train" else self.restore.measured * len(kinds)
            numbers = torch.arange(wanted or everything)
            turn, kind = numbers // len(kinds), numbers % len(kinds)
            # all kinds are measured on the same patches; few training samples are of as many patches as can be
            apart = -(-len(patches) // len(kinds)) if part == "train" else 0
            self.parts[part] = Pairs.of(patches[(turn + apart * kind) % len(patches)], kinds, _SEEDS[part])

    @classmethod
    def open(cls, settings: TrainSettings, data_dir: Path | None = None, download: bool = False) -> Self:
        data = load_photos(settings.data.partition(":")[2])
        return cls(data, settings.restore, train_size=settings.train_size)

    @property
    def size(self) -> int:
        return len(self.parts["train"])

    @property
    def fingerprint(self) -> str:
        parts = self.parts.values()
        return sha256_of_tensors(("", values) for pairs in parts for values in (pairs.images, pairs.truths))[:16]

    def build(self, settings: TrainSettings) -> RestorationMoE:
        """The untrained network: ``[network]`` has D, E, H and k, the depth is the number of blocks."""
        network, preset = settings.network, settings.preset
        num_experts, hidden = preset.sizes(network.num_experts, network.hidden, network.k)
        unit = UNITS[self.restore.unit]()
        torch.manual_seed(settings.optimization.seed)
        return restoration_moe(
            width=network.width,
            depth=settings.depth,
            num_experts=num_experts,
            hidden=hidden,
            stem=self.restore.stem,
            scale=self.restore.scale,
            severities=len(DEGRADATIONS),
            unit=unit,
            experts=partial(preset.make_experts, spare=network.spare, default=CONV if unit.pooled else RELU),
            router=preset.routers(network.k),
        )

    @classmethod
    def trial(cls, settings: TrainSettings) -> Trial:
        restore, dim = settings.restore or Restore(), settings.network.width
        unit, coarse = UNITS[restore.unit](), restore.patch // restore.scale
        maps = torch.zeros(2, dim, coarse, coarse)
        side = {"severity": torch.zeros(2, len(DEGRADATIONS)), "map": torch.zeros(2, 1, restore.patch, restore.patch)}
        return Trial(
            maps.movedim(1, -1) if restore.unit == "token" else maps,
            Context(samples=side),
            unit,
            CONV if unit.pooled else RELU,
        )

    def batch(self, indices: Tensor, draw: np.random.Generator) -> Pairs:
        return self.parts["train"][indices]

    def loss(self, model: nn.Module, batch: Pairs) -> Tensor:
        """Mean absolute difference."""
        return F.l1_loss(model(batch.images, severity=batch.severity).float(), batch.truths)

    def score(self, model: nn.Module, part: Part) -> dict[str, float]:
        pairs = self.parts[part]
        return restoration_scores(self.restored(model, pairs), pairs)

    @torch.no_grad()
    def restored(self, model: nn.Module, pairs: Pairs) -> Tensor:
        """What the network makes of degraded images: (N, 1, H, W) in [0, 1], on the CPU."""
        device, many = next(model.parameters()).device, max(1, _TOGETHER // self.restore.patch**2)
        with evaluation_mode(model):
            batches = [pairs.part(slice(start, start + many), device) for start in range(0, len(pairs), many)]
            made = [model(batch.images, severity=batch.severity).float().clamp(0, 1).cpu() for batch in batches]
        return torch.cat(made)

    def example(self) -> Tensor:
        return self.parts["test"].images[:1]

    def inputs(self, part: Part) -> Tensor:
        return self.parts[part].images

    def beside(self, part: Part) -> dict[str, Tensor]:
        """The severity of each image."""
        return {"severity": self.parts[part].severity}

    def meta(
        self, settings: TrainSettings, results: Mapping[str, float], loads: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        meta = RestoreMeta(
            data=self.name,
            router=shown(settings.row),
            settings=settings.model_dump(mode="json"),
            results=rounded(results, loads),
        )
        return meta.model_dump(mode="json")

    @classmethod
    def read_meta(cls, network: nn.Module, values: Any, folder: Path) -> RestoreMeta:
        return read_restore_meta(network, values, folder)

    @classmethod
    def reopen(
        cls, meta: RestoreMeta, name: str | None = None, data_dir: Path | None = None, download: bool = False
    ) -> Self:
        if not is_restore(name or meta.data):
            raise UserError(
                f"{name!r} does not fit the model, which {cls.does}: name restore:photos or restore:folder:PATH"
            )
        restore = parse(Restore, meta.settings.get("restore", {}), "the model's meta")
        return cls(load_photos((name or meta.data).partition(":")[2]), restore, train_size=1)

    @classmethod
    def predict(cls, network: nn.Module, meta: RestoreMeta, inputs: Sequence[str], **options: Any) -> Predictions:
        return restore_files(network, [Path(name) for name in inputs], **options)

    def summary(self, scores: Mapping[str, float]) -> Shown:
        before = restoration_scores(self.parts["test"].images, self.parts["test"])
        lines = [f"{PSNR.named(scores[PSNR.key])} on the test part of {self.name}, {PSNR.show(before['psnr'])} before"]
        for kind in KINDS:
            psnr, ssim = f"psnr_{kind}", f"ssim_{kind}"
            lines.append(
                f"  {kind}: {PSNR.show(scores[psnr])} (before {PSNR.show(before[psnr])}), "
                f"SSIM {scores[ssim]:.3f} (before {before[ssim]:.3f})"
            )
        return Shown({"images": len(self.parts["test"]), **scores, "before": before}, "\n".join(lines))

    def held_out(self) -> HeldOut:
        pairs = self.parts["test"]
        describe = partial(patch, Split(pairs.images, pairs.kinds), KINDS)
        return HeldOut("patches", pairs.images, pairs.kinds, KINDS, describe, beside=self.beside("test"))

    def pictures(self, networks: Iterable[tuple[str, nn.Module]], folder: Path) -> list[Path]:
        """``restored``: of every kind the first test patch, what each network makes of it, and the truth."""
        pairs = self.parts["test"][: len(KINDS)]
        made = {name: self.restored(network, pairs) for name, network in networks}
        return draw_restored(folder / "restored", pairs, made)

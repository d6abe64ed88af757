"""Language modelling: the next token of a window of text, in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.data.text_data import TEXT_PARTS, TextData, TextPart, load_text
from spectralmoe.data.vocabulary import Vocabulary
from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.digests import sha256_of_tensors
from spectralmoe.errors import UserError
from spectralmoe.models import LanguageMoE, language_moe
from spectralmoe.naming import shown
from spectralmoe.training.settings import parse
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.settings.text import Text, is_text
from spectralmoe.training.tasks.base import Metric, Part, Task, rounded
from spectralmoe.training.tasks.shown import HeldOut, Predictions, Shown
from spectralmoe.training.tasks.text_verbs import TextMeta, continue_texts, held_out_windows, read_text_meta
from spectralmoe.training.tasks.windows import Windows, cut_windows, in_turns, measured

__all__ = ["TextTask"]

BITS = Metric(
    "bits_per_byte", "bits/byte", "negative log-likelihood of the text over its bytes", "lower", unit="", digits=3
)
OWN_METRICS = 8
"""Up to so many domains have metrics of their own."""
_TOKENS = 2**14


class TextTask(Task):
    r"""Predict the next token.

    A sample is a window of S tokens; an epoch shows every window of the training part once. Windows follow each other
    without a gap or an overlap through all documents of a part, domain by domain, with a separator between two
    documents; the rest of a part that fills no window is left out.

    ``bits_per_byte`` is :math:`\sum_t -\log_2 p(x_t) / \sum_t b(x_t)`, b the bytes of a token, over the windows that
    are measured; the separator counts as a byte. So vocabularies of different sizes are compared on the same scale.
    ``bits_per_byte_DOMAIN`` is the same over the tokens of one domain, where there are 2 to ``OWN_METRICS`` of them.

    Args:
        data: training, validation and test documents.
        text: window, vocabulary, and how many windows are measured.
        train_size: training windows, in equal numbers from each domain as far as they last; None: all.
        vocabulary: of a model that there is already; None: as ``text`` says.

    Raises:
        UserError: more windows than there are; a part too short for a window; a domain without text in a part.

    >>> from spectralmoe.data.text_data import load_text
    >>> task = TextTask(load_text("pydoc"), train_size=100)
    >>> task.size, tuple(task.example().shape), task.metric.key
    (100, (1, 256), 'bits_per_byte')
    """

    unit = "token"
    gives = ("attended",)

    does = "continues text"
    options = ("tokens", "temperature", "seed")

    def __init__(
        self,
        data: TextData,
        text: Text | None = None,
        *,
        train_size: int | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.data, self.text, self.name, self.notes = data, text or Text(), data.name, data.notes
        size = self.text.vocab
        train = data.parts["train"]
        self.vocabulary = vocabulary or (
            Vocabulary() if size == "bytes" else Vocabulary.learn((document.text for document in train), size)
        )
        self.reported = data.domains if 1 < len(data.domains) <= OWN_METRICS else ()
        self.metrics = (BITS, *map(_metric_of, self.reported))
        self.parts = {part: self._windows(part) for part in TEXT_PARTS}
        if train_size is not None:
            if not 1 <= train_size <= self.size:
                raise UserError(f"cannot take {train_size} training windows of {self.name!r}, which has {self.size}")
            self.parts["train"] = in_turns(self.parts["train"], train_size)

    @classmethod
    def open(cls, settings: TrainSettings, data_dir: Path | None = None, download: bool = False) -> Self:
        data = load_text(settings.data.partition(":")[2], data_dir, download)
        return cls(data, settings.text, train_size=settings.train_size)

    @property
    def size(self) -> int:
        return len(self.parts["train"])

    @property
    def units(self) -> int:
        return self.text.length

    @property
    def fingerprint(self) -> str:
        merges, parts = (repr(self.vocabulary.merges), torch.empty(0)), self.parts.values()
        values = (("", each) for windows in parts for each in (windows.tokens, windows.domains))
        return sha256_of_tensors([merges, *values])[:16]

    def build(self, settings: TrainSettings) -> LanguageMoE:
        """The untrained model: ``[network]`` has D, E, H and k, the depth is the number of blocks."""
        network, preset = settings.network, settings.preset
        num_experts, hidden = preset.sizes(network.num_experts, network.hidden, network.k)
        torch.manual_seed(settings.optimization.seed)
        return language_moe(
            self.vocabulary.size,
            width=network.width,
            depth=settings.depth,
            heads=self.text.heads,
            num_experts=num_experts,
            hidden=hidden,
            experts=partial(preset.make_experts, spare=network.spare, default=SWIGLU),
            router=preset.routers(network.k),
        )

    def batch(self, indices: Tensor, draw: np.random.Generator) -> Windows:
        return self.parts["train"][indices]

    def loss(self, model: nn.Module, batch: Windows) -> Tensor:
        """Mean cross-entropy."""
        return token_losses(model, batch).mean()

    @torch.no_grad()
    def score(self, model: nn.Module, part: Part) -> dict[str, float]:
        windows, device = self.parts[part], next(model.parameters()).device
        lengths, domains = self.vocabulary.lengths.to(device), len(self.data.domains)
        bits = torch.zeros(domains, dtype=torch.float64, device=device)
        size = bits.clone()
        with evaluation_mode(model):
            for start in range(0, len(windows), many := max(1, _TOKENS // self.text.length)):
                batch = windows.part(slice(start, start + many), device)
                place = batch.domains.flatten()
                bits.index_add_(0, place, token_losses(model, batch).flatten().double() / math.log(2))
                size.index_add_(0, place, lengths[batch.tokens[:, 1:]].flatten().double())
        scores = {BITS.key: float(bits.sum() / size.sum())}
        for metric in self.metrics[1:]:
            domain = self.data.domains.index(metric.key.removeprefix(f"{BITS.key}_"))
            scores[metric.key] = float(bits[domain] / size[domain])
        return scores

    def example(self) -> Tensor:
        return self.parts["test"].tokens[:1, :-1].long()

    def inputs(self, part: Part) -> Tensor:
        return self.parts[part].tokens[:, :-1].long()

    def meta(
        self, settings: TrainSettings, results: Mapping[str, float], loads: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        meta = TextMeta(
            data=self.name,
            domains=self.data.domains,
            length=self.text.length,
            vocabulary=self.vocabulary.as_json(),
            router=shown(settings.row),
            settings=settings.model_dump(mode="json"),
            results=rounded(results, loads),
        )
        return meta.model_dump(mode="json")

    @classmethod
    def read_meta(cls, network: nn.Module, values: Any, folder: Path) -> TextMeta:
        return read_text_meta(network, values, folder)

    @classmethod
    def reopen(
        cls, meta: TextMeta, name: str | None = None, data_dir: Path | None = None, download: bool = False
    ) -> Self:
        if not is_text(name or meta.data):
            raise UserError(f"{name!r} does not fit the model, which {cls.does}: name text:NAME or text:PATH")
        text = parse(Text, {**meta.settings.get("text", {}), "length": meta.length}, "the model's meta")
        data = load_text((name or meta.data).partition(":")[2], data_dir, download)
        return cls(data, text, vocabulary=Vocabulary.of_json(meta.vocabulary))

    @classmethod
    def predict(cls, network: nn.Module, meta: TextMeta, inputs: Sequence[str], **options: Any) -> Predictions:
        return Predictions(continue_texts(network, meta, inputs, **options))

    def summary(self, scores: Mapping[str, float]) -> Shown:
        windows, total = len(self.parts["test"]), BITS.named(scores[BITS.key])
        lines = [f"{total} in {windows} test windows of {self.name}"]
        for metric, domain in zip(self.metrics[1:], self.reported, strict=True):
            lines.append(f"  {domain}: {BITS.named(scores[metric.key])}")
        return Shown({"windows": windows, **scores}, "\n".join(lines))

    def held_out(self) -> HeldOut:
        domains = self.parts["test"].domains.long()
        return held_out_windows(self.inputs("test"), domains, self.data.domains, self.vocabulary)

    def _windows(self, part: TextPart) -> Windows:
        """All windows of the training part; of another part those that are measured."""
        windows = cut_windows(self.data.parts[part], self.data.domains, self.vocabulary, self.text.length)
        if not len(windows):
            raise UserError(
                f"{self.name!r}: its {part} part is shorter than one window of {self.text.length} tokens; add text, or "
                "choose a shorter [text] length"
            )
        if part == "train":
            return windows
        windows = windows[measured(windows, self.text.measured)]
        for domain in self.reported:
            if not bool((windows.domains == self.data.domains.index(domain)).any()):
                raise UserError(f"{self.name!r}: its {part} part has no text of domain {domain!r}; add documents to it")
        return windows


SWIGLU = {"type": "feed_forward", "activation": "swiglu"}


def token_losses(model: nn.Module, windows: Windows) -> Tensor:
    """Negative log-likelihood of each predicted token in nats: (B, S) fp32."""
    logits, targets = model(windows.tokens[:, :-1]).float(), windows.tokens[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def _metric_of(domain: str) -> Metric:
    meaning = f"{BITS.meaning}, domain {domain}"
    return Metric(f"{BITS.key}_{domain}", f"{BITS.title} {domain}", meaning, BITS.better, digits=BITS.digits)

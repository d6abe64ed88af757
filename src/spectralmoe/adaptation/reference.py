"""What a model does on reference data: predictions, routes, and what its experts see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from spectralmoe.adaptation.memory import shared_banks
from spectralmoe.adaptation.samples import class_numbers
from spectralmoe.adaptation.targets import logits_of
from spectralmoe.errors import UserError
from spectralmoe.recorder import record
from spectralmoe.routing import Routing

__all__ = ["BATCH", "Measured", "Reference", "Tokens", "load_reference", "measured"]

BATCH = 1000
PROTECTED_WEIGHT = 5.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One pass over some samples.

    Attributes:
        logits: (B, C).
        routes: layer -> (B, T) int64: for each sample its tokens' experts, in ascending order a token; for soft
            routing the expert with the largest weight.
        used: layer -> (B, E) bool: which experts can change the sample. All of them under soft routing, and in every
            layer where one lets a token's choice depend on other tokens.
    """

    logits: Tensor
    routes: dict[str, Tensor]
    used: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one layer saw of the reference samples.

    Attributes:
        x: (T, D) the tokens.  gates: (T, E) their combine weights.  owner: (T,) the sample of each token.
    """

    x: Tensor
    gates: Tensor
    owner: Tensor


class Reference:
    """Reference samples, and what one state of a model did with them.

    Args:
        model: what runs from the samples on.
        samples: (N, ...).  labels: (N,).
        layers: layers whose tokens are kept.
        protected: how many of them, at the end, are earlier corrections: worth more, and no part of any accuracy.

    Raises:
        UserError: tokens that cannot be told apart by sample; a label that the model does not know.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, samples: Tensor, labels: Tensor, layers: Sequence[str] = (), protected: int = 0
    ) -> None:
        self.samples, self.labels, self.protected = samples, labels, protected
        parts, kept = [], dict[str, list[Tokens]]()
        for first in range(0, len(samples), BATCH):
            part, tokens = _pass(model, samples[first : first + BATCH], layers)
            parts.append(part)
            for name, seen in tokens.items():
                kept.setdefault(name, []).append(Tokens(seen.x, seen.gates, seen.owner + first))
        self.before, self.shared = _joined(parts), shared_banks(model)
        unknown = labels[(labels < 0) | (labels >= self.before.logits.shape[1])].tolist()
        if unknown:
            last = self.before.logits.shape[1] - 1
            raise UserError(f"Guard: label {unknown[0]} is out of range; the model knows 0 to {last}")
        self.tokens = {
            name: Tokens(*(torch.cat([getattr(t, field) for t in pieces]) for field in ("x", "gates", "owner")))
            for name, pieces in kept.items()
        }

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def importance(self) -> Tensor:
        """(N,): what a sample counts when an update weighs what must stay."""
        weight = torch.ones(len(self), device=self.labels.device)
        weight[len(self) - self.protected :] = PROTECTED_WEIGHT
        return weight

    def reachable(self, touched: dict[str, int]) -> Tensor:
        """The samples (n,) that a change of the touched experts can change at all.

        A sample none of whose tokens use a touched expert keeps every activation, layer by layer; unless something
        else reads the memory of the layer's experts (``shared_banks``): then it is all samples.
        """
        if not self.shared.isdisjoint(touched):
            return torch.arange(len(self), device=self.labels.device)
        hit = torch.zeros(len(self), dtype=torch.bool, device=self.labels.device)
        for layer, expert in touched.items():
            hit |= self.before.used[layer][:, expert]
        return hit.nonzero().flatten()

    @torch.no_grad()
    def measure(self, model: nn.Module, chosen: Tensor) -> Measured:
        """A pass of the model as it is now over the ``chosen`` samples (n,)."""
        if not len(chosen):
            return _rows(self.before, chosen)
        return _joined([_pass(model, self.samples[part], ())[0] for part in chosen.split(BATCH)])


@torch.no_grad()
def measured(model: nn.Module, samples: Tensor) -> Measured:
    """A pass of ``model`` over all ``samples`` (N, ...), in the batches of ``Reference``."""
    device = next(model.parameters()).device
    return _joined([_pass(model, part.to(device), ())[0] for part in samples.split(BATCH)])


def _pass(model: nn.Module, x: Tensor, layers: Sequence[str]) -> tuple[Measured, dict[str, Tokens]]:
    with record(model, keep=("tokens",) if layers else ()) as tape:
        logits = logits_of(model, x)
    routes, used, tokens = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tokens]()
    coupled = any(item.router is None or not item.router.selector.per_token for item in tape)
    for item in tape:
        routing = item.routing
        if item.name in routes or not _by_sample(routing, len(x)):
            raise UserError(
                f"layer {item.name!r} is called more than once, or its tokens do not come sample by sample: they "
                "cannot be told apart"
            )
        chosen = routing.top_expert()[:, None] if routing.soft else routing.indices.sort(-1).values
        routes[item.name] = chosen.reshape(len(x), -1)
        used[item.name] = _used(routing, len(x), coupled)
        if item.name in layers:
            tokens[item.name] = _tokens(item.tensor("tokens"), routing, len(x))
    return Measured(logits, routes, used), tokens


def _by_sample(routing: Routing, batch: int) -> bool:
    """Whether each sample's tokens come in one block of equal size: (B, ...) tokens, or such that were flattened."""
    leading = routing.shape or ()
    return not len(routing.indices) % batch and (len(leading) < 2 or leading[0] == batch)


def _used(routing: Routing, batch: int, coupled: bool) -> Tensor:
    if routing.soft or coupled:
        return routing.indices.new_ones((batch, routing.num_experts), dtype=torch.bool)
    used: Tensor = routing.gates().ne(0).unflatten(0, (batch, -1)).any(1)
    return used


def _tokens(x: Tensor, routing: Routing, batch: int) -> Tokens:
    """The tokens that some expert got."""
    seen = (routing.indices >= 0).any(-1).nonzero().flatten()
    tokens = x[seen].float()
    return Tokens(tokens, routing.gates()[seen], seen // (len(routing.indices) // batch))


def _joined(parts: Sequence[Measured]) -> Measured:
    first = parts[0]
    return Measured(
        torch.cat([part.logits for part in parts]),
        {name: torch.cat([part.routes[name] for part in parts]) for name in first.routes},
        {name: torch.cat([part.used[name] for part in parts]) for name in first.used},
    )


def _rows(whole: Measured, chosen: Tensor) -> Measured:
    return Measured(
        whole.logits[chosen],
        {name: value[chosen] for name, value in whole.routes.items()},
        {name: value[chosen] for name, value in whole.used.items()},
    )


def load_reference(loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All samples and labels of ``loader``.

    Raises:
        UserError: it gives nothing, or something else than (inputs, labels) of equal length, inputs of one shape.
    """
    inputs, labels = list[Tensor](), list[Tensor]()
    if not isinstance(loader, Iterable | Dataset):
        raise UserError(f"Guard: takes a loader of batches (inputs, labels), got {type(loader).__name__}")
    for batch in loader:
        pair = isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor) and batch[0].dim()
        numbers = class_numbers("Guard", batch[1]) if pair else None
        if numbers is None or numbers.shape != batch[0].shape[:1]:
            raise UserError(
                "Guard: the loader must give batches (inputs, labels) of equal length; a dataset of single samples "
                "goes into a torch.utils.data.DataLoader first"
            )
        inputs.append(batch[0])
        labels.append(numbers)
    if not inputs or not sum(map(len, labels)):
        raise UserError("Guard: the loader gave no reference samples")
    if len(shapes := {tuple(part.shape[1:]) for part in inputs}) > 1:
        raise UserError(f"Guard: reference samples must have one shape, got {' and '.join(map(str, sorted(shapes)))}")
    return torch.cat(inputs), torch.cat(labels)

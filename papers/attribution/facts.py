"""A language of facts, (subject, relation) -> object, models that learn it by heart, and which experts are blocked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe import attach, load, record, save
from spectralmoe.attribution import Table, attribute_experts
from spectralmoe.experiments.cards import Desk
from spectralmoe.models import LanguageMoE, language_moe

EXPERTS, HIDDEN, DEPTH, WIDTH = 8, 64, 2, 64


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one form of the card; ``seeds`` changes no cell that is there."""

    subjects: int = 200
    relations: int = 4
    objects: int = 50
    steps: int = 400
    batch: int = 256
    lr: float = 3e-3
    seeds: int = 5


class Facts(NamedTuple):
    """All facts: tokens (N, 2), subject and relation; target (N,); relation (N,), counted from 0."""

    tokens: Tensor
    target: Tensor
    relation: Tensor

    @staticmethod
    def draw(seed: int, sizes: Sizes) -> Facts:
        """Every subject in every relation; the objects are uniform, so nothing is to be learned but facts."""
        subject, relation = torch.meshgrid(torch.arange(sizes.subjects), torch.arange(sizes.relations), indexing="ij")
        make = torch.Generator().manual_seed(seed)
        target = torch.randint(sizes.objects, (subject.numel(),), generator=make)
        first = sizes.subjects + sizes.relations
        tokens = torch.stack([subject.flatten(), sizes.subjects + relation.flatten()], 1)
        return Facts(tokens, first + target, relation.flatten())


def network(kind: str, seed: int, desk: Desk, sizes: Sizes) -> LanguageMoE:
    """The trained "moe", or its "dense" twin of equal active parameters, kept for all cells of a seed."""

    torch.set_num_threads(1)
    place = desk.kept(f"{kind}-seed{seed}", lambda folder: save(learn(kind, seed, sizes), folder))
    load(place, into=(model := build(kind, sizes)))
    return model.eval()


def build(kind: str, sizes: Sizes) -> LanguageMoE:
    """Two of eight SwiGLU experts and a shared expert of as many parameters; or one expert as wide as these three."""
    dense, vocab = kind == "dense", sizes.subjects + sizes.relations + sizes.objects
    experts, hidden = (1, 3 * HIDDEN) if dense else (EXPERTS, HIDDEN)
    blocks = {"width": WIDTH, "depth": DEPTH, "num_experts": experts, "hidden": hidden}
    model = language_moe(vocab, **blocks, tied=False)
    for part in model.blocks:
        wide = 3 * HIDDEN // 2
        up, down = nn.Linear(WIDTH, wide, bias=False), nn.Linear(wide, WIDTH, bias=False)
        part.moe.shared = None if dense else nn.Sequential(up, nn.GELU(), down)
    return model


def learn(kind: str, seed: int, sizes: Sizes) -> LanguageMoE:
    """A model that knows the facts of a seed."""
    facts = Facts.draw(seed, sizes)
    torch.manual_seed(seed)
    model = build(kind, sizes)
    optimizer = torch.optim.AdamW(model.parameters(), sizes.lr, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, sizes.lr, sizes.steps)
    draw = torch.Generator().manual_seed(seed)
    attached = attach(optimizer, model)
    for _ in range(sizes.steps):
        chosen = torch.randint(len(facts.target), (sizes.batch,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(facts.tokens[chosen])[:, -1], facts.target[chosen]).backward()
        optimizer.step()
        rates.step()
    attached.remove()
    return model


@torch.no_grad()
def log_probs(model: nn.Module, tokens: Tensor) -> Tensor:
    """log p (N, V) of what follows."""
    logits: Tensor = model(tokens)[:, -1]
    return logits.log_softmax(-1)


def accuracy(model: nn.Module, facts: Facts) -> Tensor:
    """1 for each fact that is known (N,)."""
    return (log_probs(model, facts.tokens).argmax(-1) == facts.target).float()


class Seen(NamedTuple):
    """What each expert does for each fact, gain and combine weight (N, layers, E); 0 where it does not serve."""

    layers: tuple[str, ...]
    gain: Tensor
    weight: Tensor

    @staticmethod
    def of(model: LanguageMoE, facts: Facts) -> Seen:
        table: Table = attribute_experts(model, facts.tokens, facts.target)
        with record(model) as tape, torch.no_grad():
            model(facts.tokens)
        gates = [item.routing.gates()[facts.tokens.shape[1] - 1 :: facts.tokens.shape[1]] for item in tape]
        return Seen(table.layers, table.of_experts(EXPERTS), torch.stack(gates, 1).detach())

    @property
    def used(self) -> Tensor:
        """Whether it serves (N, layers, E) bool."""
        return self.weight > 0


def one_of_the_used(row: str, seen: Seen, draw: torch.Generator) -> Tensor:
    """For each fact and layer an expert among those that serve it (N, layers), by the row's measure."""
    measure = {
        "attributed": seen.gain,
        "largest weight": seen.weight,
        "random used": torch.rand(seen.gain.shape, generator=draw),
    }
    return measure[row].masked_fill(~seen.used, -torch.inf).argmax(-1)


def same_choice(chosen: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """The different choices (layers,) among (N, layers), each with the places of its facts."""
    different, inverse = chosen.unique(dim=0, return_inverse=True)
    for number, choice in enumerate(different.tolist()):
        yield choice, (inverse == number).nonzero().flatten()


def most(row: str, count: int, seen: Seen, draw: torch.Generator) -> tuple[list[int], float]:
    """``count`` of the experts of all layers, numbered through, and the share of the slots that they hold.

    "equal usage" is another set than "attributed", the nearest of 500 random ones in the slots that they hold.
    """
    gain, usage = seen.gain.sum(0).flatten(), seen.used.float().mean(0).flatten()
    usage = usage / usage.sum()
    attributed = gain.topk(count).indices
    if row == "equal usage":
        sets = torch.rand(500, len(usage), generator=draw).argsort(-1)[:, :count]
        same = (sets.sort(-1).values == attributed.sort().values).all(-1)
        off = (usage[sets].sum(-1) - usage[attributed].sum()).abs().masked_fill(same, torch.inf)
        chosen = sets[off.argmin()]
    else:
        chosen = attributed if row == "attributed" else usage.topk(count).indices
    return chosen.tolist(), float(usage[chosen].sum())


def by_layer(experts: list[int], layers: tuple[str, ...]) -> dict[str, list[int]]:
    """Experts that are numbered through all layers, as ``block`` takes them."""
    return {name: [e % EXPERTS for e in experts if e // EXPERTS == place] for place, name in enumerate(layers)}

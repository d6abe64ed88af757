"""Smaller Hugging Face models: fewer experts in every layer, pruned or merged, saved and run by plain transformers.

Which experts stay follows from the saliencies of ``compression/saliency.py``, here of the model's own expert outputs.
Pruning as in Lasby et al., "REAP the Experts", arXiv 2510.13999; merging as in Li et al., "Merge, Then Compress"
(M-SMoE), arXiv 2310.01334. Differs: a merged expert keeps one row of the router, that of its most salient member, so
that the layout stays the family's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from spectralmoe.compression.edit import whole_number
from spectralmoe.compression.merge import group_by_affinity
from spectralmoe.compression.prune import most_salient
from spectralmoe.errors import UserError
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.load import import_transformers
from spectralmoe.hf.shrinking.calibration import Batches, Calibration
from spectralmoe.hf.shrinking.named import blocks_of, check_number, given_groups, kept_experts
from spectralmoe.hf.shrinking.smaller import Cluster, with_clusters
from spectralmoe.layers import unwrapped
from spectralmoe.recording import Recordable
from spectralmoe.sharding import is_sharded

__all__ = ["Plan", "merge_experts", "plan", "prune_experts", "unswapped_layers"]

_COUNTED = ("frequency", "random")
"""Saliencies that look at no token."""

Model = TypeVar("Model", bound=nn.Module)
Keep = int | Mapping[str, Sequence[int]]
Groups = int | Mapping[str, Sequence[Sequence[int]]]


def prune_experts(
    model: Model,
    keep: Keep,
    *,
    by: str = "frequency",
    calibration: Batches | None = None,
    tokens: int = 2048,
    seed: int = 0,
) -> Model:
    """A copy of a Hugging Face ``model`` without some of its experts, of the same class; ``model`` stays as it is.

    The layers compute what they would if the router gave the removed experts a logit of minus infinity. Tensors and
    buffers of the experts and routers lose those entries, the config says the smaller number, and ``save_pretrained``
    writes a folder that plain transformers loads. Experts stay in their order. Keeping all changes nothing.

    It takes the memory of the smaller model beside that of the old one. The old one is run once over ``calibration``;
    then experts run on the sampled tokens, one layer at a time.

    Args:
        model: of transformers, with its stock routers. All layers keep equally many experts, because the config has one
            number for them. Where experts are chosen in groups (``n_group``), every group keeps equally many.
        keep: how many experts, those of the largest saliency; or layer's name -> the experts themselves.
        by: the saliency: "frequency"; "reap": mean over the tokens of an expert of its weight times the size of its
            output; "removal": how much the layer's output changes without it, which runs all experts on every token
            looked at; "random".
        calibration: batches of tables of the model's arguments, as ``encode`` makes them of text, or of token ids
            (B, S); "random" and named experts need none.
        tokens: how many of each layer's tokens "reap" and "removal" look at, drawn evenly.
        seed: of the draw and of "random".

    Raises:
        UserError: a dense model, a family whose layout is unknown, routers that were swapped, shards or quantised
            weights; a ``keep`` larger than E, smaller than K or not whole in every group; nothing to judge by.

    >>> import pytest, torch
    >>> transformers = pytest.importorskip("transformers")
    >>> sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    >>> config = transformers.MixtralConfig(**sizes, num_hidden_layers=1, vocab_size=64, num_local_experts=4)
    >>> model = transformers.MixtralForCausalLM(config)
    >>> text = [{"input_ids": torch.randint(64, (2, 30))}]
    >>> small = prune_experts(model, 3, by="reap", calibration=text)
    >>> small.config.num_local_experts, small.model.layers[0].mlp.experts.down_proj.shape[0]
    (3, 3)
    """
    return plan("prune_experts", model, keep, by=by, calibration=calibration, tokens=tokens, seed=seed).smaller()


def merge_experts(
    model: Model,
    keep: Groups,
    *,
    by: str | None = "frequency",
    calibration: Batches | None = None,
    tokens: int = 2048,
    seed: int = 0,
) -> Model:
    r"""A copy of a Hugging Face ``model`` with ``keep`` experts in each layer, means of the old ones.

    .. math:: \theta_g = \sum_{i \in g} s_i \theta_i \Big/ \sum_{i \in g} s_i

    with s the saliency ``by`` of each expert. The ``keep`` most salient experts are the centres of the groups g; every
    other joins the centre whose logits go most like its own (``compression.group_by_affinity``), inside the groups that
    the router chooses in. The router keeps the rows of the centres. Everything else is as in ``prune_experts``.

    Args:
        keep: how many experts; or layer's name -> the groups themselves, such as ``[[0, 3], [1, 2]]``. Experts that no
            group names stay as they are, and the centre of a group is its most salient expert.
        by: as for ``prune_experts``; None, for given groups: all alike, with the first expert of each as its centre.

    Raises:
        UserError: as ``prune_experts``; groups that overlap; ``by=None`` with a number.
    """
    return plan(
        "merge_experts", model, keep, by=by, calibration=calibration, tokens=tokens, seed=seed, join=True
    ).smaller()


@dataclass(frozen=True, slots=True)
class Plan(Generic[Model]):
    """Which experts of a model become which of a smaller one.

    Attributes:
        clusters: layer's name -> what becomes of it.
        saliency: layer's name -> how much each expert matters (E,); empty where the experts were named.
        counts: layer's name -> the load of each expert (E,); empty where nothing was run.
    """

    owner: str
    model: Model
    layers: dict[str, HFLayer]
    clusters: dict[str, list[Cluster]]
    saliency: dict[str, Tensor]
    counts: dict[str, Tensor]

    def smaller(self) -> Model:
        """The smaller model, a copy."""
        return with_clusters(self.owner, self.model, list(self.layers.values()), self.clusters)


def plan(
    owner: str,
    model: Model,
    keep: Keep | Groups,
    *,
    by: str | None = "frequency",
    calibration: Batches | None = None,
    tokens: int = 2048,
    seed: int = 0,
    join: bool = False,
) -> Plan[Model]:
    """The plan of ``prune_experts``, or with ``join`` of ``merge_experts``."""
    stock: Model = unwrapped(model)  # type: ignore[assignment]
    layers = {layer.name: layer for layer in unswapped_layers(owner, stock)}
    if isinstance(keep, Mapping) and not join:
        named = kept_experts(owner, layers, keep)
        return Plan(owner, stock, layers, {n: list(map(Cluster.alone, kept)) for n, kept in named.items()}, {}, {})
    if isinstance(keep, Mapping):
        given = given_groups(owner, layers, keep)
        known = None if by is None else Calibration(owner, stock, calibration, 0 if by in _COUNTED else tokens, seed)
        saliency = {} if known is None else {name: known.saliency(str(by), name) for name in layers}
        clusters = {name: [_joined(saliency.get(name), group) for group in groups] for name, groups in given.items()}
        return Plan(owner, stock, layers, clusters, saliency, {} if known is None else known.counts)
    total = min(layer.num_experts for layer in layers.values())
    whole_number(owner, "keep", keep, 1, total)
    if by is None:
        raise UserError(f"{owner}: a number of experts needs a saliency; give by='frequency', or the groups themselves")
    for layer in layers.values():
        check_number(owner, layer, keep)
    if keep == total:
        whole = {name: list(map(Cluster.alone, range(total))) for name in layers}
        return Plan(owner, stock, layers, whole, {}, {})
    known = Calibration(owner, stock, calibration, tokens if join or by not in _COUNTED else 0, seed)
    saliency = {name: known.saliency(by, name) for name in layers}
    clusters = {}
    for name, layer in layers.items():
        blocks = blocks_of(layer)
        affinity = known.affinity(name) if join else None
        clusters[name] = [
            cluster for block in blocks for cluster in _clusters(saliency[name], affinity, block, keep // len(blocks))
        ]
    return Plan(owner, stock, layers, clusters, saliency, known.counts)


def unswapped_layers(owner: str, model: nn.Module) -> list[HFLayer]:
    """The layers of a model of transformers that its own class could build.

    Raises:
        UserError: it is none, or not as it was built.
    """
    if not isinstance(model, import_transformers().PreTrainedModel):
        raise UserError(
            f"{owner}: takes a model of transformers, got {type(model).__name__}; merge adapters into it first"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError(f"{owner}: {type(model).__name__} has quantised weights; load it without quantisation")
    layers = find_layers(model)
    for layer in layers:
        if any(isinstance(module, Recordable) for module in layer.layer.modules()):
            raise UserError(
                f"{owner}: the router of {layer.name} was swapped; undo the swap, or make a stock gate of it first "
                "(hf.fold_routers, hf.distill_to_gate)"
            )
        parameters = list(layer.layer.parameters())
        if any(is_sharded(value) or value.is_meta for value in parameters):
            raise UserError(f"{owner}: {layer.name} is sharded or not in memory; load the whole model")
    numbers = {layer.num_experts for layer in layers}
    if len(numbers) > 1:
        raise UserError(
            f"{owner}: the layers have different numbers of experts ({', '.join(map(str, sorted(numbers)))}), and the "
            "config of its family has one"
        )
    return layers


def _clusters(saliency: Tensor, affinity: Tensor | None, block: range, number: int) -> list[Cluster]:
    """``number`` experts of a group: its most salient ones, alone or with those that join them."""
    values = saliency[list(block)]
    centres = most_salient(values, number)
    if affinity is None:
        return [Cluster.alone(block[e]) for e in centres]
    groups = group_by_affinity(values, affinity[list(block)][:, list(block)], number)
    joined = [[block[e] for e in members] for members in groups]
    return [_joined(saliency, members, block[centre]) for centre, members in zip(centres, joined, strict=True)]


def _joined(saliency: Tensor | None, members: Sequence[int], centre: int | None = None) -> Cluster:
    """The mean of ``members`` by their saliency (E,), all alike where there is none or all is 0."""
    values = torch.ones(len(members), dtype=torch.float64) if saliency is None else saliency[list(members)]
    head = members[int(values.argmax())] if centre is None else centre
    shares = values if values.any() else values.new_ones(len(members))
    return Cluster(head, tuple(members), tuple((shares / shares.sum()).tolist()))

"""The MoE layers of a checkpoint, found by structure in its safetensors files and read without a model.

A layer is a routing matrix (E, D) under a name with "gate" or "router", and beside it E experts: numbered
(``experts.3.w1.weight``, ``experts.expert_3.wi.weight``) or stacked (3-D tensors with E in front). So Mixtral, Qwen,
OLMoE, DeepSeek, gpt-oss, Llama 4, GraniteMoE, Switch and their like are read as ``save_pretrained`` writes them and as
transformers holds them, and the folders of ``spectralmoe.save`` too. Shared experts are no experts.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralmoe.checkpoints.config import experts_of_config, read_model_config, top_k_of_config
from spectralmoe.checkpoints.names import CORRECTION, Block, find_blocks
from spectralmoe.checkpoints.tensor_files import FLOATS, Stored, passed_over, stored_in_file, stored_tensors
from spectralmoe.diagnostics.watch import layer_number
from spectralmoe.errors import UserError
from spectralmoe.files import exists
from spectralmoe.model_folder import weights_file
from spectralmoe.spec import build

__all__ = ["Checkpoint", "CheckpointLayer", "read_checkpoint"]

_NUMBERS = 2**22
_TRIES = 100
_ORDER = {"": 0, "encoder": 0, "decoder": 1}


@dataclass(frozen=True)
class CheckpointLayer:
    """One MoE layer of a checkpoint. Its tensors are read when asked for.

    Attributes:
        name: the layer's name in the files.
        number: the model's own layer number.
        stack: "encoder" or "decoder" in a model with both, else "".
        num_experts: E, of the experts that have weights; the router may have more rows ("zero experts").
        width: D.
        top_k: K; None where the config does not tell.
        note: why there are no ``expert_vectors``, else None.
    """

    name: str
    number: int
    stack: str
    num_experts: int
    width: int
    top_k: int | None
    note: str | None
    _block: Block = field(repr=False)
    _scorer: Mapping[str, Any] | None = field(default=None, repr=False)

    def matrix(self) -> Tensor | None:
        """The routing matrix (E, D) in fp32; None where a scorer of this library has none.

        Raises:
            UserError: it cannot be read, or does not fit the scorer's spec.
        """
        if self._scorer is not None:
            return _scorer_matrix(self.name, self._scorer, self._block.router)
        return None if self._block.matrix is None else self._block.matrix.read()

    def bias(self) -> Tensor | None:
        """The bias of the logits (E,), fp32; None where there is none."""
        return self._vector(correction=False)

    def correction_bias(self) -> Tensor | None:
        """The bias of the scores for the choice alone (DeepSeek-V3, ``Balanced``): (E,), fp32; None without."""
        return self._vector(correction=True)

    def expert_vectors(self) -> Iterator[Tensor]:
        """All weights of the experts, one row an expert, in blocks (E, P) of about four million numbers, fp32."""
        for pieces in self._block.parts.values():
            size, step = pieces[0].size, max(_NUMBERS // self.num_experts, 1)
            for first in range(0, size, step):
                count = min(step, size - first)
                block = torch.empty(self.num_experts, count)
                for row, piece in zip(block, pieces, strict=True):
                    row.copy_(piece.piece(first, count).read().flatten())
                yield block

    def _vector(self, correction: bool) -> Tensor | None:
        rows = {self.num_experts} if self._block.matrix is None else {self.num_experts, self._block.matrix.shape[0]}
        for key, stored in self._block.router.items():
            if key.endswith("bias") and stored.size in rows and correction == bool(CORRECTION.search(key)):
                return stored.read().flatten()
        return None


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint that is not run.

    Attributes:
        name: of its folder or file.
        config: its ``config.json``; empty where there is none.
        dtype: what most of its numbers are stored as: "bfloat16", "float32", ...
        parameters: how many numbers it holds; None where some are packed.
        layers: in the order of the forward, an encoder's before a decoder's.
        notes: what a reader of the results should know, a sentence each.
    """

    name: str
    config: Mapping[str, Any] = field(repr=False)
    dtype: str
    parameters: int | None
    layers: Sequence[CheckpointLayer] = field(repr=False)
    notes: Sequence[str] = ()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The MoE layers of a model folder with safetensors files, or of one such file; only headers are read yet.

    Raises:
        UserError: no safetensors files, or broken ones (``tensor_files``); an adapter without its model; no MoE layer,
            or none of a known kind; a quantised router; experts without a router that fits them; experts that lack
            tensors.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> experts = {f"layers.0.mlp.experts.{e}.up.weight": torch.randn(6, 8) for e in range(4)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"layers.0.mlp.gate.weight": torch.randn(4, 8), **experts}, f"{folder}/model.safetensors")
    ...     layer = read_checkpoint(folder).layers[0]
    >>> layer.name, layer.num_experts, layer.width
    ('layers.0.mlp', 4, 8)
    """
    path = Path(path)
    tensors, config = _read(path)
    specs = config["layers"] if "spectralmoe" in config and isinstance(config.get("layers"), dict) else {}
    if specs:
        tensors |= {alias: tensors[name] for alias, name in config.get("tied", {}).items() if name in tensors}
    try:
        blocks = find_blocks(
            tensors, [name for name, spec in specs.items() if spec], experts_of_config(config).values()
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not blocks:
        raise _no_layer(path, tensors, config)
    if not specs:
        _check_alike(path, blocks)
    layers = [_layer(block, tensors, config, specs.get(block.name), place) for place, block in enumerate(blocks)]
    kinds = Counter[str]()
    for stored in tensors.values():
        kinds[stored.kind] += stored.size
    kind = max(kinds, key=lambda kind: kinds[kind])
    return Checkpoint(
        name=path.resolve().name.removesuffix(".safetensors"),
        config=config,
        dtype=str(FLOATS.get(kind, kind)).removeprefix("torch."),
        parameters=None if any(layer.note for layer in layers) else sum(kinds.values()),
        layers=sorted(layers, key=lambda layer: (_ORDER[layer.stack], layer.number)),
        notes=[*_notes(path, [] if specs else blocks)],
    )


def _read(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Headers and config; of a folder of ``spectralmoe.save``, both of one save."""
    config = read_model_config(path) if exists(path) else {}
    if not path.is_dir() or "spectralmoe" not in config:
        return stored_tensors(path), config
    for _ in range(_TRIES):
        tensors = stored_in_file(weights_file(path, config))
        latest = read_model_config(path)
        if latest == config:
            break
        config = latest
    return tensors, config


def _no_layer(path: Path, tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> UserError:
    if any("lora_A" in key or "lora_B" in key for key in tensors):
        return UserError(
            f"{path} holds an adapter of PEFT, not a model: inspect the model that it was trained on, or merge the two "
            "(merge_and_unload) and save the result"
        )
    if counts := experts_of_config(config):
        key, count = next(iter(counts.items()))
        quantised = "quantised, or " if "quantization_config" in config else ""
        return UserError(
            f"{path}: config.json names experts ({key} = {count}), but no tensors are named and shaped as a router and "
            f"experts: {quantised}of a family that cannot be read from its weights alone; load the model to inspect it"
        )
    return UserError(f"{path} holds no MoE layer (no experts beside a router): a dense model has no router to inspect")


def _notes(path: Path, blocks: Sequence[Block]) -> Iterator[str]:
    if path.is_dir() and (leftover := passed_over(path)):
        yield leftover
    wider = [block for block in blocks if block.matrix is not None and block.matrix.shape[0] > block.num_experts > 0]
    if wider:
        more = ", ".join(sorted({str(block.matrix.shape[0] - block.num_experts) for block in wider if block.matrix}))
        count = f"{len(wider)} of {len(blocks)} layers"
        yield f"the router has {more} rows more than there are experts with weights in {count}"


def _layer(
    block: Block, tensors: Mapping[str, Stored], config: Mapping[str, Any], spec: Any, place: int
) -> CheckpointLayer:
    number, stack = layer_number(block.name), _stack(block.name, tensors)
    number = place if number is None else number
    if not spec:
        width = 0 if block.matrix is None else block.matrix.shape[1]
        return CheckpointLayer(
            block.name, number, stack, block.num_experts, width, top_k_of_config(config), block.note, block
        )
    try:
        scorer, top_k = spec["router"]["scorer"], spec["router"]["selector"].get("k")
        return CheckpointLayer(
            block.name, number, stack, block.num_experts, _width(scorer), top_k, block.note, block, scorer
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"config.json does not describe the router of {block.name}; save the model again") from error


def _width(scorer: Mapping[str, Any]) -> int:
    """D of the scorer that a spec describes; a wrapper has that of the one inside."""
    width: int = scorer["dim"] if "dim" in scorer else _width(scorer["scorer"])
    return width


def _scorer_matrix(name: str, spec: Mapping[str, Any], router: Mapping[str, Stored]) -> Tensor | None:
    """The ``matrix`` of the scorer that ``spec`` describes, with the stored weights."""
    of_scorer = {key.partition("scorer.")[2]: t for key, t in router.items() if "scorer." in key and t.kind in FLOATS}
    try:
        with torch.device("meta"):
            scorer = build(spec)
        scorer.load_state_dict({key: stored.read() for key, stored in of_scorer.items()}, strict=False, assign=True)
        matrix: Tensor | None = scorer.matrix
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{name}: config.json describes another router than the one that is stored; save the model again"
        ) from error
    if matrix is not None and matrix.is_meta:
        raise UserError(f"{name}: the router lacks tensors that config.json describes; save the model again")
    return None if matrix is None else matrix.detach().float()


def _check_alike(path: Path, blocks: Sequence[Block]) -> None:
    """Layers with one kind of name have experts of the same tensors."""
    groups: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        if block.note is None:
            groups[re.sub(r"\d+", "#", block.name)].append(block)
    for group in groups.values():
        whole = {part for block in group for part in block.parts}
        for block in group:
            if lost := sorted(whole - block.parts.keys()):
                raise UserError(
                    f"{path}: the experts of {block.name} have no {', '.join(lost)}, those of others do; fetch or "
                    "save it again"
                )


def _stack(name: str, tensors: Mapping[str, Stored]) -> str:
    """Which of the two stacks a layer is in, where the model has both."""
    for stack, other in (("encoder", "decoder"), ("decoder", "encoder")):
        root, inside, _ = f".{name}.".partition(f".{stack}.")
        if inside and any(f".{key}".startswith(f"{root}.{other}.") for key in tensors):
            return stack
    return ""

"""Finds the router and the experts of each layer among a checkpoint's tensors, by names and shapes alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from spectralmoe.checkpoints.tensor_files import FLOATS, Stored
from spectralmoe.errors import UserError

__all__ = ["CORRECTION", "Block", "find_blocks"]

_ROUTER = re.compile(r"gate|gating|wg|.*router.*")  # one component of a name
_SHARED = re.compile(r"(?:^|\.)shared")
_NUMBERED = re.compile(r"(?:^|\.)[^.]*expert[^.]*\.(?:[^.\d]\w*_)?(\d{1,6})\.(.+)$")
_STACKED = re.compile(r"(?:^|\.)[^.]*expert[^.]*\.")
_PACKED = re.compile(r"scale|zero|absmax|quant|qweight|packed|g_idx")
CORRECTION = re.compile(r"(?:correction_bias|expert_bias|selector\.bias)$")
"""Names of biases that only the choice of experts sees."""

_BIAS = re.compile(r"(?:^|[._])bias$")
_INDICES = ("I64", "BOOL")
_LISTED = 3

Named = Mapping[str, Stored]
"""Tensors by their names below the layer's, or below the expert's."""


@dataclass(frozen=True, slots=True)
class Block:
    """The tensors of one MoE layer.

    Attributes:
        name: what their names begin with.
        num_experts: E, of the experts that have weights.
        router: the router's tensors and the biases of the choice.
        matrix: the routing matrix (E, D) among them, with more rows where tokens may choose no expert ("zero experts");
            None where the router has no single matrix.
        parts: the experts' tensors by name, each as E pieces of one size; empty with a ``note``.
        note: why the experts cannot be read, else None.
    """

    name: str
    num_experts: int
    router: Named
    matrix: Stored | None
    parts: Mapping[str, Sequence[Stored]]
    note: str | None


def find_blocks(tensors: Named, scored: Collection[str] = (), counts: Collection[int] = ()) -> list[Block]:
    """The MoE layers among ``tensors``, by name.

    Args:
        scored: layers whose router may be of any tensors, with at least as many outputs as there are experts.
        counts: how many experts a layer has, as far as a config tells: a router with more rows then has choices that
            are no experts, and nothing is lost.

    Raises:
        UserError: experts without a router, or with one that does not fit them or is quantised; experts that lack
            tensors.
    """
    names = {name for key in tensors if (name := _router_owner(key)) is not None}
    below: dict[str, dict[str, Stored]] = {name: {} for name in sorted(names)}
    for key, stored in tensors.items():
        name = _owner(key, names)
        if name is not None:
            below[name][key[len(name) + 1 :] if name else key] = stored
        elif not _SHARED.search(key) and (_NUMBERED.search(key) or (_STACKED.search(key) and len(stored.shape) > 2)):
            raise UserError(
                f"{key!r} is of an expert, but no tensor beside it is named as a router is (gate, gating, wg, "
                "router): it is lost, or of a family that names it otherwise; load the model to inspect it"
            )
    blocks = (_block(name, of_layer, name in scored, counts) for name, of_layer in below.items())
    return [block for block in blocks if block is not None]


def _router_owner(key: str) -> str | None:
    """The part of a tensor's name before the router; None for tensors of no router."""
    if _SHARED.search(key) or _NUMBERED.search(key):
        return None
    parts = key.split(".")
    place = next((i for i, part in enumerate(parts) if _ROUTER.fullmatch(part)), None)
    return None if place is None else ".".join(parts[:place])


def _owner(key: str, names: Collection[str]) -> str | None:
    """The longest of ``names`` that ``key`` lies below."""
    while "." in key:
        key = key.rpartition(".")[0]
        if key in names:
            return key
    return "" if "" in names else None


def _block(name: str, tensors: Named, scored: bool, counts: Collection[int]) -> Block | None:
    """The layer ``name``; None if there are no experts beside the supposed router."""
    where = name or "the layer"
    router = {key: t for key, t in tensors.items() if _router_owner(key) == "" or CORRECTION.search(key)}
    quantised = _is_quantised(router)
    matrix = None if quantised else _matrix(router)
    rest = {key: t for key, t in tensors.items() if key not in router and not _SHARED.search(key)}
    numbered = _numbered(rest)
    stacked = {key: t for key, t in rest.items() if _is_stacked(key, t, matrix)}
    if not numbered and not stacked:
        return None
    if matrix is None and not scored:
        listed = ", ".join(f"{key} {t.kind} {list(t.shape)}" for key, t in sorted(router.items())[:_LISTED])
        what = "its router is quantised, not a floating-point matrix" if quantised else "no single matrix is its router"
        raise UserError(f"{where}: load the model to inspect it; {what}: {listed}")
    rows = 0 if matrix is None else matrix.shape[0]
    note = _note([item for of_expert in numbered.values() for item in of_expert.items()] or list(stacked.items()))
    if numbered:
        e = max(numbered) + 1
    elif note:
        e = rows
    else:
        e = min((t.shape[0] for t in stacked.values() if len(t.shape) > 2), default=rows)
    if matrix is not None and not scored and rows != e and not (rows > e and e in counts):
        raise UserError(
            f"{where}: the router has {rows} rows for {e} experts; experts are lost, or config.json does not tell "
            "that some choices are no experts"
        )
    if note:
        _refuse_gaps(where, numbered, e)
        return Block(name, e, router, matrix, {}, note)
    parts = _numbered_parts(where, numbered, e) if numbered else _stacked_parts(where, stacked, e, rows)
    return Block(name, e, router, matrix, parts, None)


def _matrix(router: Named) -> Stored | None:
    """The one matrix among a router's tensors. A bias or scale may be stored with two dimensions, (1, E) or (E, 1)."""
    flat = [t for key, t in router.items() if len(t.shape) == 2 and t.kind in FLOATS and not _is_vector_name(key)]
    wide = [t for t in flat if 1 not in t.shape] or flat
    return wide[0] if len(wide) == 1 else None


def _is_vector_name(key: str) -> bool:
    return bool(CORRECTION.search(key) or _BIAS.search(key) or _PACKED.search(key))


def _is_quantised(tensors: Named) -> bool:
    """Whether numbers are packed, or need the scales beside them. Tables of indices are 64-bit integers."""
    scaled = any("scale" in key for key in tensors)
    return any(
        len(t.shape) >= 2
        and ((t.kind not in FLOATS and t.kind not in _INDICES) or (t.kind.startswith("F8") and scaled))
        for t in tensors.values()
    )


def _numbered(tensors: Named) -> dict[int, dict[str, Stored]]:
    """Expert -> its tensors."""
    experts: dict[int, dict[str, Stored]] = defaultdict(dict)
    for key, stored in tensors.items():
        if match := _NUMBERED.search(key):
            experts[int(match[1])][match[2]] = stored
    return experts


def _is_stacked(key: str, stored: Stored, matrix: Stored | None) -> bool:
    """Below the word "expert", or 3-D with a side as wide as the router: what an expert reads or writes."""
    if _STACKED.search(key):
        return len(stored.shape) >= 2
    return len(stored.shape) == 3 and matrix is not None and matrix.shape[1] in stored.shape[1:]


def _numbered_parts(where: str, experts: Mapping[int, Named], e: int) -> dict[str, Sequence[Stored]]:
    names = sorted({part for of_expert in experts.values() for part in of_expert})
    problems = []
    for expert in range(e):
        of_expert = experts.get(expert, {})
        if lost := [part for part in names if part not in of_expert]:
            problems.append(f"expert {expert} has no {', '.join(lost)}")
        problems += [
            f"expert {expert} has {part} of shape {list(stored.shape)}, the first expert {list(experts[0][part].shape)}"
            for part, stored in sorted(of_expert.items())
            if part in experts.get(0, {}) and experts[0][part].shape != stored.shape
        ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise UserError(f"{where}: {'; '.join(problems[:_LISTED])}{more}; fetch or save the checkpoint again")
    return {part: [experts[expert][part] for expert in range(e)] for part in names if experts[0][part].shape}


def _refuse_gaps(where: str, experts: Mapping[int, Named], e: int) -> None:
    if lost := [str(expert) for expert in range(e) if experts and expert not in experts]:
        raise UserError(f"{where}: no tensor of expert {', '.join(lost[:_LISTED])}; fetch or save the checkpoint again")


def _stacked_parts(where: str, stacked: Named, e: int, rows: int) -> dict[str, Sequence[Stored]]:
    """Pieces of tensors with E in front, or as many as the router has rows; where all are 2-D, a multiple of E rows."""
    deep, rows = {key: t for key, t in stacked.items() if len(t.shape) > 2}, rows or e
    if odd := [f"{key} {list(t.shape)}" for key, t in deep.items() if t.shape[0] not in (e, rows)]:
        raise UserError(f"{where}: {e} experts, but {odd[0]}; fetch or save the checkpoint again")
    parts: dict[str, Sequence[Stored]] = {}
    for key, t in sorted(stacked.items()):
        if t.shape[0] in (e, rows) or (not deep and e and t.shape[0] % e == 0):
            size = t.size // (rows if t.shape[0] == rows else e)
            parts[key] = [t.piece(i * size, size) for i in range(e)]
    return parts


def _note(experts: Sequence[tuple[str, Stored]]) -> str | None:
    """A note on the form of the stored tensors if they are not the experts' plain weights; else None."""
    kinds = {stored.kind for _, stored in experts if stored.shape}
    if strange := sorted(kinds - FLOATS.keys()):
        return f"experts are quantised ({', '.join(strange)})"
    if any(kind.startswith("F8") for kind in kinds) and any("scale" in key for key, _ in experts):
        return "experts are quantised (8 bits with scales)"
    return None

"""Which tensors of a checkpoint are the router and the experts of which layer: told from names and shapes alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from spectralmoe.errors import UserError
from spectralmoe.surgery.tensor_files import FLOATS, Stored

__all__ = ["CORRECTION", "Block", "find_blocks"]

_ROUTER = re.compile(r"gate|gating|wg|.*router.*")  # one component of a name
_SHARED = re.compile(r"(?:^|\.)shared")
_NUMBERED = re.compile(r"(?:^|\.)[^.]*expert[^.]*\.(?:[^.\d]\w*_)?(\d{1,6})\.(.+)$")
_STACKED = re.compile(r"(?:^|\.)[^.]*expert[^.]*\.")
_PACKED = re.compile(r"scale|zero|absmax|quant|qweight|packed|g_idx")
CORRECTION = re.compile(r"(?:correction_bias|expert_bias|selector\.bias)$")
"""Names of biases that only the choice of experts sees."""

_LISTED = 3

Named = Mapping[str, Stored]
"""Tensors by their names below the layer's, or below the expert's."""


@dataclass(frozen=True, slots=True)
class Block:
    """The tensors of one MoE layer.

    Attributes:
        name: what their names begin with.
        num_experts: E.
        router: the router's tensors and the biases of the choice.
        matrix: the routing matrix (E, D) among them; None where the router is not told by one matrix.
        parts: the experts' tensors by name, each as E pieces of one size; empty with a ``note``.
        note: why the experts cannot be read, else None.
    """

    name: str
    num_experts: int
    router: Named
    matrix: Stored | None
    parts: Mapping[str, Sequence[Stored]]
    note: str | None


def find_blocks(tensors: Named, scored: Collection[str] = ()) -> list[Block]:
    """The MoE layers among ``tensors``, by name.

    Args:
        scored: layers whose router may be of any tensors, with at least as many outputs as there are experts.

    Raises:
        UserError: experts without a router, or with one that does not fit them; experts that lack tensors.
    """
    names = {name for key in tensors if (name := _router_owner(key)) is not None}
    below: dict[str, dict[str, Stored]] = {name: {} for name in sorted(names)}
    for key, stored in tensors.items():
        name = _owner(key, names)
        if name is not None:
            below[name][key[len(name) + 1 :] if name else key] = stored
        elif not _SHARED.search(key) and (_NUMBERED.search(key) or (_STACKED.search(key) and len(stored.shape) > 2)):
            raise UserError(
                f"{key!r} is of an expert, but no gate or router stands beside it; part of the checkpoint is lost"
            )
    found = (_block(name, own, name in scored) for name, own in below.items())
    return [block for block in found if block is not None]


def _router_owner(key: str) -> str | None:
    """What stands before the router in the name of one of its tensors; None for other tensors."""
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


def _block(name: str, tensors: Named, scored: bool) -> Block | None:
    """The layer ``name``; None where no experts stand beside what looked like a router."""
    where = name or "the layer"
    router = {key: t for key, t in tensors.items() if _router_owner(key) == "" or CORRECTION.search(key)}
    found = [t for key, t in router.items() if len(t.shape) == 2 and t.kind in FLOATS and not _PACKED.search(key)]
    matrix = found[0] if len(found) == 1 else None
    rest = {key: t for key, t in tensors.items() if key not in router and not _SHARED.search(key)}
    numbered = _numbered(rest)
    stacked = {key: t for key, t in rest.items() if _is_stacked(key, t, matrix)}
    if not numbered and not stacked:
        return None
    if matrix is None and not scored:
        held = ", ".join(f"{key} {t.kind} {list(t.shape)}" for key, t in sorted(router.items())[:_LISTED])
        raise UserError(
            f"{where}: load the model to inspect it; no single floating-point matrix is its router, but {held}"
        )
    if numbered:
        e = max(numbered) + 1
    else:
        e = min((t.shape[0] for t in stacked.values() if len(t.shape) > 2), default=matrix.shape[0] if matrix else 0)
    if matrix is not None and not scored and matrix.shape[0] != e:
        raise UserError(
            f"{where}: the router has {matrix.shape[0]} rows for {e} experts; part of the checkpoint is lost"
        )
    note = _note([item for own in numbered.values() for item in own.items()] or list(stacked.items()))
    parts = _numbered_parts(where, numbered, e) if numbered else _stacked_parts(where, stacked, e, note)
    return Block(name, e, router, matrix, {} if note else parts, note)


def _numbered(tensors: Named) -> dict[int, dict[str, Stored]]:
    """Expert -> its tensors."""
    found: dict[int, dict[str, Stored]] = defaultdict(dict)
    for key, stored in tensors.items():
        if match := _NUMBERED.search(key):
            found[int(match[1])][match[2]] = stored
    return found


def _is_stacked(key: str, stored: Stored, matrix: Stored | None) -> bool:
    """Below the word "expert", or 3-D with a side as wide as the router: what an expert reads or writes."""
    if _STACKED.search(key):
        return len(stored.shape) >= 2
    return len(stored.shape) == 3 and matrix is not None and matrix.shape[1] in stored.shape[1:]


def _numbered_parts(where: str, experts: Mapping[int, Named], e: int) -> dict[str, Sequence[Stored]]:
    names = sorted({part for own in experts.values() for part in own})
    problems = []
    for expert in range(e):
        own = experts.get(expert, {})
        if lost := [part for part in names if part not in own]:
            problems.append(f"expert {expert} has no {', '.join(lost)}")
        problems += [
            f"expert {expert} has {part} of shape {list(stored.shape)}, the first expert {list(experts[0][part].shape)}"
            for part, stored in sorted(own.items())
            if part in experts.get(0, {}) and experts[0][part].shape != stored.shape
        ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise UserError(f"{where}: {'; '.join(problems[:_LISTED])}{more}; fetch or save the checkpoint again")
    return {part: [experts[expert][part] for expert in range(e)] for part in names if experts[0][part].shape}


def _stacked_parts(where: str, stacked: Named, e: int, note: str | None) -> dict[str, Sequence[Stored]]:
    """Pieces of tensors with E in front; where all are 2-D, of those with a multiple of E rows."""
    deep = {key: t for key, t in stacked.items() if len(t.shape) > 2}
    if odd := [f"{key} {list(t.shape)}" for key, t in deep.items() if t.shape[0] != e]:
        raise UserError(f"{where}: {e} experts, but {odd[0]}; part of the checkpoint is lost")
    fits = {key: t for key, t in stacked.items() if t.shape[0] == e or (not deep and e and t.shape[0] % e == 0)}
    if note:
        return {}
    return {key: [t.piece(i * (t.size // e), t.size // e) for i in range(e)] for key, t in sorted(fits.items())}


def _note(experts: Sequence[tuple[str, Stored]]) -> str | None:
    """Why what is stored is not the experts' weights, if so."""
    kinds = {stored.kind for _, stored in experts if stored.shape}
    if strange := sorted(kinds - FLOATS.keys()):
        return f"experts are quantised ({', '.join(strange)})"
    if any(kind.startswith("F8") for kind in kinds) and any("scale" in key for key, _ in experts):
        return "experts are quantised (8 bits with scales)"
    return None

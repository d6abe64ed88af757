"""What the verbs do with a saved network of signals: the jammers of records in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.errors import UserError
from spectralmoe.models import SignalMoE
from spectralmoe.recorder import record
from spectralmoe.training.settings import Settings, Several, parse
from spectralmoe.training.tasks.shown import Shown

__all__ = ["SignalMeta", "classify_records", "read_record", "read_signal_meta"]


class SignalMeta(Settings):
    """What a saved network of signals needs to be used.

    Attributes:
        length: T of the records that it was trained on.
        results: measured after training.
        settings: of the run that trained it.
    """

    data: str
    classes: Several[str]
    length: int
    router: str
    results: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)


def read_signal_meta(network: nn.Module, values: Any, folder: Path) -> SignalMeta:
    """What was saved beside a network of signals.

    Raises:
        UserError: another network; values that are missing, or do not fit it.
    """
    where = f"{folder / 'config.json'}: meta"
    if not isinstance(network, SignalMoE):
        raise UserError(f"{folder} holds a {type(network).__name__}, and its meta is that of a network of signals")
    meta = parse(SignalMeta, values, where)
    if len(meta.classes) != network.num_classes:
        raise UserError(f"{where} does not fit the network")
    return meta


def read_record(file: Path, length: int) -> Tensor:
    """A complex record (T,) from a .npy file that holds (T,) complex numbers, or (2, T) real and imaginary parts.

    Raises:
        UserError: no such file, another shape or length, or numbers that are not finite.
    """
    if not file.is_file():
        raise UserError(f"there is no file {str(file)!r}; a record is a .npy file of {length} complex numbers")
    try:
        values = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{file} is no .npy file of numbers") from error
    if isinstance(values, np.ndarray) and values.shape == (2, length) and values.dtype.kind in "fiu":
        values = values[0] + 1j * values[1]
    if not isinstance(values, np.ndarray) or values.shape != (length,) or values.dtype.kind not in "cfiu":
        form = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise UserError(f"{file} holds {form}; a record has {length} complex numbers, or (2, {length}) real ones")
    if not np.isfinite(values).all():
        raise UserError(f"{file} holds numbers that are not finite")
    return torch.from_numpy(values.astype(np.complex64))


@torch.no_grad()
def classify_records(network: nn.Module, meta: SignalMeta, inputs: Sequence[str]) -> list[Shown]:
    """The most likely jammers of each file, their probability, and the expert that each layer chose.

    Raises:
        UserError: as ``read_record``.
    """
    device = next(network.parameters()).device
    signals = torch.stack([read_record(Path(given), meta.length) for given in inputs]).to(device)
    with evaluation_mode(network), record(network) as tape:
        shares = network(signals).float().softmax(-1).cpu()
    leading = {item.name: item.routing.gates().argmax(1).tolist() for item in tape}
    results = []
    for number, (given, share) in enumerate(zip(inputs, shares, strict=True)):
        best, name = float(share.max()), meta.classes[int(share.argmax())]
        experts = {layer: chosen[number] for layer, chosen in leading.items()}
        told = ", ".join(f"{layer}: {expert}" for layer, expert in experts.items())
        values = {"file": given, "class": name, "probability": round(best, 4), "experts": experts}
        results.append(Shown(values, f"{given}: {name} ({100 * best:.1f}%); experts {told}"))
    return results

"""``spectralmoe inspect`` on a network of this library: held-out samples of its task, with their classes or topics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spectralmoe.attribution import holders
from spectralmoe.cli.options import load_saved, say_notes
from spectralmoe.diagnostics import evaluation_mode, watch
from spectralmoe.diagnostics.watch import watched_layers
from spectralmoe.instruments import Inspector, inspection_document
from spectralmoe.instruments.running_text import passage
from spectralmoe.training.tasks.text_verbs import split_prompt

__all__ = ["inspect_own"]


def inspect_own(
    folder: Path,
    device: torch.device,
    *,
    data: str | None,
    data_dir: Path | None,
    download: bool,
    tokens: int,
    allow: Sequence[str] | None,
    seed: int,
    attribute: Sequence[str],
) -> dict[str, Any]:
    """The inspection document of a saved network, from the test part of its data or of other data.

    Raises:
        UserError: the model cannot be read or has no MoE layer; the data do not fit it.
    """
    kind, network, meta = load_saved(folder, device, allow)
    task = kind.reopen(meta, data, data_dir, download)
    say_notes(task.notes)
    samples = task.held_out()
    prompts = [split_prompt(network, meta, text) for text in attribute]
    order = torch.randperm(len(samples.inputs), generator=torch.Generator().manual_seed(seed))
    used = 0
    with watch(network) as seen, evaluation_mode(network), torch.no_grad():
        watched = watched_layers("inspect", network, seen)
        held = [holders(network, *prompt, [layer.name for layer in watched]) for prompt in prompts]
        seen.drain()
        inspector = Inspector(watched, labels=samples.names, seed=seed)
        for chosen in order.split(samples.batch):
            if inspector.tokens >= tokens:
                break
            beside = {name: values[chosen].to(device) for name, values in samples.beside.items()}
            network(samples.inputs[chosen].to(device), **beside)
            inspector.add(seen.drain(), samples.labels[chosen].to(device))
            used += len(chosen)
        layers = inspector.layers(lambda layer, place: samples.describe(int(order[place.sequence]), place))
        passages = []
        for title, sample, pieces in samples.running:
            network(sample.to(device))
            passages.append(passage(pieces, seen.layers, seen.drain(), title))
    model = {
        "name": folder.name,
        "source": str(folder),
        "library": "spectralmoe",
        "class": type(network).__name__,
        "mode": "run",
        "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    facts = {
        "source": f"{used} test {samples.kind} of {task.name}",
        "tokens": inspector.tokens,
        "sequences": used,
        "tokenizer": samples.tokenizer,
        "notes": [],
    }
    return inspection_document(folder.name, model, facts, layers, inspector.paths(), text=passages, holders=held)

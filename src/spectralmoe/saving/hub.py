"""Shares a ``VisionMoE`` through the Hugging Face Hub, whole or its MoE parts alone; it needs huggingface_hub.

A whole model is a folder of ``spectralmoe.save``, parts alone are one of ``save_parts``, each with a model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from spectralmoe.errors import UserError
from spectralmoe.files import write_text
from spectralmoe.json_files import dotted
from spectralmoe.model_folder import CONFIG, PARTS, WEIGHTS
from spectralmoe.saving.parts import holds_parts, load_parts, read_parts_config, save_parts
from spectralmoe.saving.whole import load, read_config, save
from spectralmoe.vision.model import VisionMoE

if TYPE_CHECKING:
    HubVisionMoE: Any

__all__ = ["HubVisionMoE", "model_card"]

_CARD = "README.md"


def model_card(model: VisionMoE, meta: Mapping[str, Any], *, parts_only: bool = False) -> str:
    """Return the text of a model card below its metadata: the model, its results and its settings."""
    results, settings = dict(meta.get("results") or {}), dict(meta.get("settings") or {})
    lines = [
        f"# {model.name} with {meta.get('router', 'MoE')} parts",
        "",
        f"The timm model `{model.name}`, {model.num_classes} classes, {len(model.parts())} mixture-of-experts parts.",
        "",
        "```python",
        *_usage(parts_only),
        "```",
    ]
    if results:
        lines += ["", "## Results", "", "| | |", "| --- | --- |", f"| data | {meta.get('data', 'not said')} |"]
        lines += [f"| {key.replace('_', ' ')} | {value} |" for key, value in results.items() if key != "loads"]
    if results.get("loads"):
        lines += ["", "Share of the test tokens that each expert got:", "", "| layer | load |", "| --- | --- |"]
        lines += [f"| `{name}` | {' '.join(f'{x:.3f}' for x in load)} |" for name, load in results["loads"].items()]
    if settings:
        lines += ["", "## Settings", "", "| | |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in dotted(settings).items()]
    return "\n".join(lines) + "\n"


def __getattr__(name: str) -> Any:
    """``HubVisionMoE`` is made when it is first asked for: its base class comes from huggingface_hub."""
    if name == "HubVisionMoE":
        return _hub_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _hub_class() -> Any:
    try:
        from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, snapshot_download
    except ImportError as error:
        raise UserError("this needs huggingface_hub; install it with 'pip install spectralmoe[vision]'") from error

    class HubVisionMoE(nn.Module, PyTorchModelHubMixin):
        """A ``VisionMoE`` with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

        ``from_pretrained(name_or_folder, backbone=None)`` reads what ``save_pretrained`` wrote. MoE parts alone need
        the backbone that they were trained on (``load_parts``). An existing ``README.md`` is not overwritten.

        Args:
            model: the network.
            meta: JSON values that are saved with it (``read_config(folder)["meta"]``), from which the card is made.
            parts_only: whether only the MoE parts and the head are shared.
        """

        def __init__(self, model: VisionMoE, meta: dict[str, Any] | None = None, *, parts_only: bool = False) -> None:
            super().__init__()
            self.model, self.meta, self.parts_only = model, dict(meta or {}), parts_only

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.model(images)
            return logits

        def save_pretrained(
            self,
            save_directory: str | Path,
            *,
            repo_id: str | None = None,
            push_to_hub: bool = False,
            model_card_kwargs: dict[str, Any] | None = None,
            **options: Any,
        ) -> str | None:
            """Write the folder, and upload it if ``push_to_hub``; the old config stays until the new one is written."""
            folder = Path(save_directory)
            self._save_pretrained(folder)
            if not (folder / _CARD).exists():
                write_text(folder / _CARD, str(self.generate_model_card(**model_card_kwargs or {})))
            if not push_to_hub:
                return None
            url: str = self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **options)
            return url

        def _save_pretrained(self, save_directory: Path) -> None:
            write = save_parts if self.parts_only else save
            write(self.model, save_directory, meta=self.meta)

        def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
            data = ModelCardData(
                library_name="spectralmoe",
                pipeline_tag="image-classification",
                tags=["timm", "mixture-of-experts", "pytorch_model_hub_mixin", "model_hub_mixin"],
            )
            text = model_card(self.model, self.meta, parts_only=self.parts_only)
            return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> HubVisionMoE:
            return cls._from_pretrained(model_id=str(pretrained_model_name_or_path), **options)

        @classmethod
        def _from_pretrained(
            cls, *, model_id: str, backbone: nn.Module | Mapping[str, Tensor] | None = None, **options: Any
        ) -> HubVisionMoE:
            """``options`` (token, revision, ...) go to ``huggingface_hub.snapshot_download``."""
            folder = Path(model_id)
            if not folder.is_dir():
                try:
                    folder = Path(snapshot_download(model_id, allow_patterns=[CONFIG, PARTS, WEIGHTS], **options))
                except Exception as error:  # no network, no such name, no right to it
                    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                    raise UserError(f"{model_id} is no folder here and could not be fetched ({reason})") from error
            if not holds_parts(folder):
                model = load(folder)
                if not isinstance(model, VisionMoE):
                    raise UserError(f"{model_id} holds a {type(model).__name__}, not a VisionMoE")
                return cls(model, read_config(folder)["meta"])
            if backbone is None:
                raise UserError(f"{model_id} holds the MoE parts alone; pass from_pretrained(..., backbone=timm model)")
            return cls(load_parts(folder, backbone), read_parts_config(folder)["meta"], parts_only=True)

    HubVisionMoE.__qualname__ = "HubVisionMoE"  # so that pickle finds it
    return HubVisionMoE


def _usage(parts_only: bool) -> list[str]:
    start = ["from spectralmoe.saving.hub import HubVisionMoE", ""]
    if not parts_only:
        return [*start, 'model = HubVisionMoE.from_pretrained("...")']
    return [*start, 'model = HubVisionMoE.from_pretrained("...", backbone=...)  # the timm model they were trained on']

"""LoRA on the experts of a Hugging Face MoE, with its routers trained whole beside it.

Edward J. Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu Wang, Weizhu Chen, "LoRA:
Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1. The adapters are those of Hugging Face's
peft (https://github.com/huggingface/peft, Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from spectralmoe.errors import UserError
from spectralmoe.hf.layer import HFLayer

__all__ = ["add_lora", "import_peft"]


def add_lora(model: nn.Module, layers: Sequence[HFLayer], rank: int, *, routers: bool = True) -> Any:
    """``model`` as a peft model: :math:`W_e + 2 B_e A_e` of rank R in every matrix of the experts, the rest frozen.

    ``merge_and_unload()`` of the result gives back a model of the family.

    Args:
        layers: the MoE layers that get adapters.
        rank: R.
        routers: train all weights of the layers' routers; the adapter's files hold them, too.

    Raises:
        UserError: peft is not installed; experts that hold no matrices.
    """
    peft = import_peft()
    stacked = [name for layer in layers for name in _names(layer, 3)]
    single = [name.removesuffix(".weight") for layer in layers for name in _names(layer, 2) if name.endswith(".weight")]
    single = single if not stacked else []  # of stacked experts, two dimensions are biases
    if not stacked and not single:
        raise UserError(f"{layers[0].name}: its experts hold no matrices that could get an adapter")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=single or None,
        target_parameters=stacked or None,
        modules_to_save=[layer.router_path for layer in layers] if routers else None,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA needs peft; install it with 'pip install spectralmoe[lora]'") from error
    return peft


def _names(layer: HFLayer, dimensions: int) -> list[str]:
    named = layer.experts.named_parameters()
    return [f"{layer.path}.experts.{name}" for name, value in named if value.dim() == dimensions]

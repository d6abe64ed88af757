"""Terms on the routers of a Hugging Face model, added to what its forward returns: ``add_terms``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError, one_of
from spectralmoe.hf.stock import recordable_layers
from spectralmoe.layers import unwrapped
from spectralmoe.recording import recomputing
from spectralmoe.regularizers import importance_cv2, load_balance
from spectralmoe.tape import EmptyTape, Tape
from spectralmoe.terms import Term, penalty

__all__ = ["AddedTerms", "add_terms"]

_BALANCE = (load_balance, importance_cv2)
_SHIFTED = ("ForCausalLM", "ForConditionalGeneration")
_IGNORED = -100


class AddedTerms:
    """What ``add_terms`` returns; ``remove()`` or the end of its ``with`` block takes the terms off again.

    Attributes:
        terms: by name.
        last: each term's unweighted value in the last forward of training, a scalar without gradient, by name.
        step: handed to weights that are functions of the step; count it up yourself.
    """

    def __init__(self, model: nn.Module, terms: Mapping[str, Term], into: Literal["loss", "aux_loss"]) -> None:
        self.terms, self.into, self.step = dict(terms), into, 0
        self.last: dict[str, Tensor] = {}
        self._module = _inside(model)
        self._names = list(inspect.signature(self._module.forward).parameters)
        self._balances = any(_function(term) in _BALANCE for term in self.terms.values())
        self._tape: Tape | None = None
        with ExitStack() as stack:
            self._layers = stack.enter_context(recordable_layers(model))
            Tape(self._layers, terms=self.terms)  # refuses terms that read what is not there
            for handle in (
                self._module.register_forward_pre_hook(self._before, with_kwargs=True),
                self._module.register_forward_hook(self._after, with_kwargs=True),
            ):
                stack.callback(handle.remove)
            self._hooks = stack.pop_all()

    def __deepcopy__(self, memo: dict[int, Any]) -> AddedTerms:
        """No copy: the hooks of a copied model end here, where it is not known."""
        return self

    def __enter__(self) -> AddedTerms:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take all hooks off the model; a second call does nothing."""
        self._seal()
        self._hooks.close()

    def _seal(self) -> None:
        if self._tape is not None:
            self._tape.seal()
        self._tape = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(module, "_is_replica", False):
            raise UserError(
                "add_terms: DataParallel runs copies of the model, which it cannot follow; run one process for each "
                "device (torchrun, accelerate launch), or show this one a single device"
            )
        if recomputing() or module is not self._module:
            return None
        self._seal()  # of a forward that failed
        if not module.training or not torch.is_grad_enabled():
            return None
        self._tape = Tape(self._layers, terms=self.terms)
        self._tape.open()
        quiet = self._balances and "output_router_logits" in self._names
        return (args, {**kwargs, "output_router_logits": False}) if quiet else None

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if recomputing() or self._tape is None or module is not self._module:
            return None
        try:
            value, self.last = penalty(self._tape, self.terms, step=self.step)
        except EmptyTape as error:
            raise UserError(
                "add_terms: the model ran without the routers that it had then; where PEFT put copies in their place "
                "(modules_to_save), call add_terms after get_peft_model"
            ) from error
        self._seal()
        if not isinstance(output, MutableMapping):
            raise UserError(f"add_terms: the forward returned a {type(output).__name__}; call it with return_dict=True")
        if self.into == "aux_loss":
            output["aux_loss"] = value
            return output
        loss = output.get("loss")
        if loss is None:
            raise UserError(
                "add_terms(into='loss'): the forward returned no loss, so that the terms would be lost; call the model "
                "with labels, or, where the loss is computed elsewhere, use into='aux_loss' and add aux_loss to it"
            )
        share = _share(module, {**dict(zip(self._names, args, strict=False)), **kwargs})
        output["loss"] = loss + share * value.to(loss)
        return output


def add_terms(model: nn.Module, terms: Mapping[str, Term], *, into: Literal["loss", "aux_loss"] = "loss") -> AddedTerms:
    r"""Add terms on the routers, stock or swapped, to the loss that a Hugging Face model returns in training.

    It works in transformers' Trainer, accelerate, ``DistributedDataParallel``, PEFT and plain loops: call it on the
    model before (with PEFT: after) it is wrapped. In evaluation mode, and without gradient, nothing is added.

    **Accumulation and ranks.** Where the forward is told ``num_items_in_batch`` M, as the Trainer does, the loss is the
    sum over its tokens divided by M, and the penalty p of these tokens counts as :math:`p \cdot m / M`, m the labels
    that count in this call. So what is trained is the mean of the penalties of the micro-batches of all steps and
    ranks, weighted by their labels (the Trainer multiplies losses by the number of ranks, which average gradients).
    For a term that reads no tokens (the spectral terms of the matrix) or is a mean over tokens (``router_z``) this is
    the penalty of one big batch; in the second case up to tokens that carry no label (padding, prompts, the first of a
    sequence), if micro-batches have unequal shares of them. A term of the statistics of a batch (``load_balance``,
    ``importance_cv2``, the spectral terms of the gates) is not linear in them: it asks each micro-batch to be balanced,
    which is more than asking it of all together. Without ``num_items_in_batch`` the whole penalty counts: divide the
    loss by the number of micro-batches, as accelerate's ``accumulate`` does. The Trainer does so, too, for a model with
    ``accepts_loss_kwargs = False``; set it for a model whose loss ignores M (Switch).

    **The model's own balance loss.** With a term of balance (``load_balance``, ``importance_cv2``), calls in training
    run with ``output_router_logits=False``, whatever config and call say, so the family adds no balance loss of its
    own and nothing counts twice. The config stays as it is. To read the logits use ``record``.

    **Losses computed elsewhere.** TRL's ``SFTTrainer`` computes its loss of log-probabilities and reads ``aux_loss``,
    times ``router_aux_loss_coef``, never ``loss``. For it, ``into="aux_loss"`` writes the penalty to
    ``output.aux_loss``, unscaled: set ``output_router_logits`` true and the coefficient to 1 in the config that it
    reads. A trainer that asks the model for no loss (label smoothing, ``compute_loss_func``) gets an error.

    Raises:
        UserError: no MoE layer, or one that cannot be read; no terms; a term that reads what the experts made, which
            models of others do not keep. At a forward in training: no loss, or a tuple, was returned; routers that were
            replaced since; what ``penalty`` raises.

    >>> class Gate(nn.Linear):
    ...     def forward(self, x):
    ...         return (z := super().forward(x)), *z.softmax(-1).topk(2)
    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate, self.experts = Gate(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    ...
    ...     def forward(self, x):
    ...         return {"loss": self.gate(x)[1].sum()}
    >>> model = Model()
    >>> with add_terms(model, {"balance": Term(load_balance, 0.01)}) as added:
    ...     more = model(torch.ones(10, 8))["loss"].item()
    >>> less = model(torch.ones(10, 8))["loss"].item()
    >>> round((more - less) / added.last["balance"].item(), 3)
    0.01
    """
    if into not in ("loss", "aux_loss"):
        raise one_of("add_terms(into=...)", into, ["loss", "aux_loss"])
    if not terms:
        raise UserError("add_terms: give at least one term, such as {'balance': Term(load_balance, 0.01)}")
    return AddedTerms(model, terms, into)


def _inside(model: nn.Module) -> nn.Module:
    """The model of transformers inside what wraps it, PEFT's model too."""
    inside = unwrapped(model)
    base = getattr(inside, "get_base_model", None)
    return inside if base is None else _inside(base())


def _function(term: Term) -> Any:
    return term.fn.func if isinstance(term.fn, partial) else term.fn


def _share(module: Any, given: Mapping[str, Any]) -> Tensor | float:
    """m / M: the labels of this call that count, as the loss counts them, of all in the batch; 1 where M is unknown."""
    total, labels = given.get("num_items_in_batch"), given.get("shift_labels")
    if labels is None:
        labels = given.get("labels")
        if labels is not None and _shifts(module):
            labels = labels[..., 1:]
    if total is None or labels is None:
        return 1.0
    counted: Tensor = (labels != _IGNORED).sum() / total
    return counted


def _shifts(module: Any) -> bool:
    """Whether the loss of a model of transformers leaves out the first label of each sequence."""
    return getattr(module, "loss_type", None) in _SHIFTED and not module.config.is_encoder_decoder

"""One MoE layer of a Hugging Face model as the instruments see it; no family is named, transformers is not imported.

A layer is a module with a child ``experts`` (stacked parameters of three dimensions, or a module for each expert) and
a router beside it. Their forwards are the models' own (https://github.com/huggingface/transformers, Apache-2.0).
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.diagnostics.watch import Watched, layer_number
from spectralmoe.errors import UserError
from spectralmoe.hf.routing import Returned, read_returned
from spectralmoe.hf.scores import Choice, Form
from spectralmoe.hf.structure import (
    correction_bias,
    count_experts,
    experts_of,
    matrix_name,
    number_of,
    required,
    stack_of,
)
from spectralmoe.layers import layer_name
from spectralmoe.routing import Routing
from spectralmoe.sharding import full

__all__ = ["HFLayer"]


class HFLayer(Watched):
    """A MoE layer of a Hugging Face model.

    Args:
        path: of the layer in the model.
        layer: the module that holds router and experts.
        router: name of the router among the layer's children.
        keep: parts of parameter names that transformers leaves in fp32 when it loads in half precision.

    Attributes:
        router: the router's module.
        router_path: its path in the model.
        experts: the experts' module.
    """

    def __init__(self, path: str, layer: nn.Module, router: str, keep: frozenset[str] = frozenset()) -> None:
        self.path, self.name, self.number = path, layer_name(path), layer_number(path) or 0
        self.stack = stack_of(path)
        self.layer, self.router, self.experts = layer, layer.get_submodule(router), layer.get_submodule("experts")
        self.num_experts = count_experts(self.experts) or 0
        self._matrix = matrix_name(self.router, self.num_experts)
        self._keep, self.router_path = keep, f"{path}.{router}".removeprefix(".")
        self._form: Form | None = None
        self._given: dict[str, Any] | None = None
        self._flat = False
        self.top_k = number_of((self.router, layer), "top_k", "num_experts_per_tok")
        if self.top_k is None:
            self.top_k = self._answered_slots()

    def _answered_slots(self) -> int | None:
        """K, the number of slots that the router returns for a token."""
        matrix = self.matrix
        return None if matrix is None or matrix.is_meta else self.returned(matrix[:1]).indices.shape[1]

    @property
    def matrix(self) -> Tensor | None:
        """The router's matrix; None where it has several layers."""
        return None if (matrix := self.live_matrix) is None else full(matrix).detach()

    @property
    def live_matrix(self) -> Tensor | None:
        """The same as a parameter, with gradient."""
        return None if self._matrix is None else self.router.get_parameter(self._matrix)

    @property
    def correction_bias(self) -> Tensor | None:
        """The bias of the scores for the choice alone (E,); None without."""
        bias = correction_bias((self.router, self.layer), self.num_experts)
        return None if bias is None else full(bias).detach().flatten()

    @property
    def groups(self) -> tuple[int, int]:
        """In how many groups of neighbours the experts are, and from how many of them a token may choose."""
        total = number_of((self.router, self.layer), "num_group", "n_group") or 1
        return total, number_of((self.router, self.layer), "topk_group") or total

    def route(self, x: Tensor, dtype: torch.dtype | None = None) -> Routing:
        """Routes by a copy of the router without hooks: an open watch sees nothing of it, and one that changes its
        own module (Switch casts the matrix) changes the copy alone.

        Where a capacity drops tokens of a sequence, each token here is a sequence of its own: none is dropped.

        Raises:
            UserError: the router returns something unknown, or needs more than tokens.
        """
        return self.routing(self.returned(x, dtype))

    def routing(self, returned: Returned) -> Routing:
        """Converts what the router returned to our ``Routing``, whose scores are what the choice was made from."""
        choice = self._choice()
        return returned.ranked(choice, self._form_of(returned, choice))

    def live_routing(self, returned: Returned) -> Routing:
        """The same with gradient, if the tensors came with it, and the scores before a selection bias."""
        return returned.routing(self._form_of(returned, self._choice()))

    def _choice(self) -> Choice:
        return Choice(self.correction_bias, *self.groups)

    def _form_of(self, returned: Returned, choice: Choice) -> Form:
        form = self._form or returned.form(choice)
        self._form = form if form.sure else None  # found once: a step of training does not wait for it
        return form

    @torch.no_grad()
    def raw_logits(self, x: Tensor) -> Tensor:
        """The router's own logits, which may be probabilities."""
        return self.returned(x).logits

    @torch.no_grad()
    def returned(self, x: Tensor, dtype: torch.dtype | None = None) -> Returned:
        """The router's output for tokens x (N, D), by role."""
        stored = next(self.experts.parameters()).dtype
        x = x.to(dtype or (stored if stored.itemsize > 1 else x.dtype))
        more = {
            name: value.to(dtype) if dtype and isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.more_inputs().items()
        }
        return self.read(self.call(self.router_copy(dtype), x, more), x)

    @staticmethod
    def call(router: nn.Module, x: Tensor, more: dict[str, Any]) -> Any:
        """What a router returns for tokens x (N, D), each a sequence of its own where a capacity counts."""
        try:
            return router(x[:, None] if hasattr(router, "expert_capacity") else x, **more)
        except ValueError:  # it unpacks (B, S, D)
            return router(x[None], **more)

    def read(self, output: Any, tokens: Tensor) -> Returned:
        """Sorts the router's ``output`` for ``tokens`` (N, D) by role.

        Raises:
            UserError: it is something unknown.
        """
        choose = getattr(self.layer, "route_tokens_to_experts", None)
        if isinstance(output, Tensor) and choose is not None:  # a router of logits alone: the layer chooses
            output = (output, *choose(output))
        returned = read_returned(output, self.num_experts, lambda: self._raw_logits(tokens), self.top_k)
        if returned is None:
            raise self._unknown(f"its router returns {_shapes(output)}, not logits, weights and indices")
        return returned

    @torch.no_grad()
    def expert(self, x: Tensor, e: int) -> Tensor:
        """Runs the experts' own forward, the plain loop of transformers: no grouped kernel, any precision."""
        experts = self.experts
        x = x.to(next(experts.parameters()).dtype)
        with evaluation_mode(experts):
            if isinstance(experts, nn.ModuleList | nn.ModuleDict):
                return cast(Tensor, experts_of(experts)[e](x))
            forward = inspect.unwrap(type(experts).forward)
            if self.weighs_inputs:
                alone: dict[str, Any] = {name: value[e : e + 1] for name, value in self.stacks().items()}
                return cast(Tensor, functional_call(experts, alone, (x,)))
            indices = torch.full((len(x), 1), e, device=x.device)
            return cast(Tensor, forward(experts, x, indices, torch.ones_like(indices, dtype=x.dtype)))

    @property
    def weighs_inputs(self) -> bool:
        """Whether each expert gets its own tokens, already times their combine weights (Llama 4)."""
        stacked = not isinstance(self.experts, nn.ModuleList | nn.ModuleDict)
        return stacked and len(inspect.signature(inspect.unwrap(type(self.experts).forward)).parameters) == 2

    def part(self, x: Tensor, weights: Tensor, e: int) -> Tensor:
        """What expert ``e`` adds to the output for tokens x (N, D) that chose it with combine weights (N,)."""
        weights = weights[:, None]
        return self.expert(x * weights.to(x), e) if self.weighs_inputs else self.expert(x, e) * weights

    def expert_weights(self, e: int) -> Tensor:
        """Its parameters by name, biases too."""
        if isinstance(self.experts, nn.ModuleList | nn.ModuleDict):
            parameters: dict[str, Tensor] = dict(experts_of(self.experts)[e].named_parameters())
        else:
            parameters = {name: full(value)[e] for name, value in self.stacks().items()}
        return torch.cat([full(parameters[name]).detach().flatten().float() for name in sorted(parameters)])

    def stacks(self) -> dict[str, nn.Parameter]:
        """The parameters of experts that are no modules of their own, by name: an entry each, then one a copy."""
        count = count_experts(self.experts)
        return {name: value for name, value in self.experts.named_parameters() if value.shape[0] == count}

    def _raw_logits(self, x: Tensor) -> Tensor | None:
        """The routing matrix on tokens; None where it reads something else."""
        matrix = self.matrix
        if matrix is None or matrix.shape[1] != x.shape[-1]:
            return None
        bias = getattr(self.router, "bias", None)
        bias = full(bias).detach().float() if isinstance(bias, Tensor) and bias.numel() == len(matrix) else None
        return F.linear(x.float(), matrix.float(), bias)

    def router_copy(self, dtype: torch.dtype | None) -> nn.Module:
        """A copy free of hooks, in evaluation mode; with ``dtype``, as a model loaded in it has it."""
        hooks = {
            id(value): type(value)()
            for module in self.router.modules()
            for name, value in vars(module).items()
            if name.endswith("_hooks") and isinstance(value, dict)
        }
        router = copy.deepcopy(self.router, hooks).eval()
        for name, value in [*router.named_parameters(), *router.named_buffers()]:
            kept = (
                dtype is not None
                and dtype.itemsize == 2
                and any(part in f"{self.router_path}.{name}" for part in self._keep)
            )
            if dtype is not None and value.is_floating_point():
                value.data = value.data.to(torch.float32 if kept else dtype)
        return router

    def remember(self, given: dict[str, Any], flat: bool) -> None:
        """Take what the model gave its router in a call: ``route`` gives it the same.

        Args:
            given: the arguments beside the tokens, by name.
            flat: the tokens of all sequences came as one list.
        """
        self._given, self._flat = given, flat

    @property
    def reroutes(self) -> bool:
        """False where the router reads more of a token than the token, or where tokens compete for a capacity."""
        return not self._of_tokens() and not (self._flat and hasattr(self.router, "expert_capacity"))

    def _of_tokens(self) -> list[str]:
        """The arguments of the last call that are tensors, but no part of the layer: they belong to its tokens."""
        tensors = {name: value for name, value in (self._given or {}).items() if isinstance(value, Tensor)}
        parts = [*self.layer.parameters(), *self.layer.buffers()] if tensors else []
        of_layer = {value.data_ptr() for value in parts}
        return [name for name, value in tensors.items() if value.data_ptr() not in of_layer]

    def more_inputs(self) -> dict[str, Any]:
        """The router's inputs beside tokens: as in the last call that was seen; before one, by name from the layer."""
        given, unknown = self._given, self._of_tokens()
        if given is None:
            parameters = inspect.signature(self.router.forward).parameters
            named = {name: getattr(self.layer, name, None) for name in parameters}
            given = {name: value for name, value in named.items() if isinstance(value, Tensor)}
            unknown = [name for name in required(self.router.forward)[1:] if name not in given]
        if unknown:
            raise self._unknown(f"its router needs {unknown[0]!r} beside the tokens")
        return given

    def _unknown(self, why: str) -> UserError:
        return UserError(f"{self.name} ({type(self.layer).__name__}) is of a model family it cannot read: {why}")


def _shapes(output: Any) -> str:
    parts = output if isinstance(output, tuple | list) else [output]
    kinds = [f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    return ", ".join(kinds).replace("torch.", "") or "nothing"

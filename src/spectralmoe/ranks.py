"""Mixture of Ranks: every rank of a low-rank adapter is an expert, and a router chooses among them for each token.

"MoR" (a mixture of ranks for image restoration, routed by the severity of a degradation), arXiv 2511.16024. The
adapter is that of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1;
experts that add nothing: Jin et al., "MoE++", arXiv 2410.07348.
Differs: the gates of the chosen ranks have the mean 1, so that with equal gates they are a plain LoRA. By default the
router reads the token; the paper's reads severity alone (``ContextScorer``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel

from spectralmoe.context import Context, Rows, rows_of, without_padding
from spectralmoe.errors import UserError
from spectralmoe.layers import plain_name, unwrapped
from spectralmoe.recording import Recordable
from spectralmoe.router import Router
from spectralmoe.scorers import LinearScorer, Scorer
from spectralmoe.selectors import TopK
from spectralmoe.sharding import is_sharded

__all__ = ["RankExperts", "RankGates", "add_ranks", "modules_of", "put_ranks", "refuse_parallel"]

Model = TypeVar("Model", bound=nn.Module)


class RankGates(TopK):
    r"""Chooses the top k and gives them weights with the mean 1: :math:`g_{tj} = k\,\mathrm{softmax}_j(s_{t,i_j})`.

    The softmax is over the k chosen. With k = 1 it is over all experts, because the router would get no gradient else.

    >>> gates = RankGates(2)
    >>> logits = torch.tensor([[1.0, 3.0, 3.0]])
    >>> gates.weigh(logits, gates.choose(logits)).tolist()
    [[1.0, 1.0]]
    """

    def __init__(self, k: int) -> None:
        super().__init__(k, normalize=k > 1)

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        return self.k * super().weigh(logits, indices)


class RankExperts(Recordable):
    r"""Adds ranks to a frozen linear layer and routes among them.

    .. math:: y = W_0 x + \sum_{j \le S} B_j A_j x + \sum_i g_i B_i A_i x

    All tokens share S ranks. i runs over the k ranks that the router chooses for a token among R ranks and Z zero
    experts, which add nothing. Like the linear layer it maps (..., D) to (..., O), and ``record`` sees it like an
    ``MoE``. All ranks are computed by two matrix products, and those not chosen are multiplied by 0. W_0 is frozen. B
    starts at zero, so the layer starts as the linear one, and in the first step only B gets a gradient.

    Args:
        linear: W_0 (O, D) with its bias.
        ranks: R, how many ranks are experts.
        shared: S, how many ranks all tokens share.
        zero: Z, the number of zero experts; the router has E = R + Z experts.
        k: how many of the R + Z experts a token gets.
        scorer: a scorer of R + Z experts; None makes a linear one that reads the token.

    Attributes:
        down: A (S + R, D), the shared ranks first, which starts uniform as in LoRA.
        up: B (O, S + R).
        router: the router, whose gates (``RankGates``) have the mean 1 over the chosen experts, zero experts included.

    Raises:
        UserError: ``linear`` is no ``nn.Linear``; ranks < 1, or shared or zero is negative; k is not 1 to R + Z; or the
            scorer has another width or number of experts.

    >>> from spectralmoe import ContextScorer
    >>> linear, x = nn.Linear(16, 8), torch.randn(2, 5, 16)
    >>> layer = RankExperts(linear, scorer=ContextScorer(16, 32 + 4, width=3))
    >>> y = layer(x, context=Context(samples={"severity": torch.rand(2, 3)}))  # one choice a sample
    >>> torch.equal(y, linear(x))
    True
    """

    router: Router

    def __init__(
        self,
        linear: nn.Linear,
        *,
        ranks: int = 32,
        shared: int = 8,
        zero: int = 4,
        k: int = 8,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise UserError(f"RankExperts: goes around an nn.Linear, got a {type(linear).__name__}; pass one")
        if ranks < 1 or shared < 0 or zero < 0:
            raise UserError(
                f"RankExperts: needs ranks >= 1, shared >= 0 and zero >= 0, got ranks={ranks}, shared={shared}, "
                f"zero={zero}"
            )
        if not 1 <= k <= ranks + zero:
            raise UserError(f"RankExperts: k must be 1 to ranks + zero = {ranks + zero}, got {k}")
        scorer = LinearScorer(linear.in_features, ranks + zero) if scorer is None else scorer
        if (scorer.dim, scorer.num_experts) != (linear.in_features, ranks + zero):
            raise UserError(
                f"RankExperts: the scorer must be for D={linear.in_features} and E=ranks + zero={ranks + zero}, got "
                f"D={scorer.dim} and E={scorer.num_experts}"
            )
        self.linear, self.ranks, self.shared, self.zero, self.k = linear.requires_grad_(False), ranks, shared, zero, k
        weight, bound = linear.weight, linear.in_features**-0.5
        self.down = nn.Parameter(weight.new_empty(shared + ranks, linear.in_features).uniform_(-bound, bound))
        self.up = nn.Parameter(weight.new_zeros(linear.out_features, shared + ranks))
        self.router = Router(scorer, RankGates(k)).to(weight.device)
        self.train(linear.training)

    @property
    def keepable(self) -> tuple[str, ...]:
        """The names of the tensors that ``record`` can keep: the tokens alone."""
        return ("tokens",)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Context | Rows | None = None) -> Tensor:
        """Run the layer on x (..., D) -> (..., O).

        Args:
            mask: (...), True for real tokens. Padding has the output 0 and no part in any gradient.
            context: side information that the scorer reads: a ``Context``, or its rows (N, ...).
        """
        mask, context, replay = self.begin(x, mask, context)
        side = rows_of(context, x, mask)
        routing = self.router(x, mask=mask, context=side, replay=replay)
        self.leave(routing, None, self.seen(x, self.names_to_keep(), streams=self.router.scorer.streams_tokens), side)
        rows = without_padding(x, mask).reshape(-1, x.shape[-1])
        hidden = F.linear(rows, self.down.to(x.dtype))
        gates = F.pad(routing.gates(self.ranks), (self.shared, 0), value=1.0)
        y = torch.addmm(self.linear(rows), hidden * gates.to(hidden.dtype), self.up.to(x.dtype).T)
        y = y if x.dim() == 2 else y.view(*x.shape[:-1], len(self.up))
        return without_padding(y, mask)

    def rank(self, x: Tensor, e: int) -> Tensor:
        """Return what rank ``e`` of the R adds for x (M, D) with the gate 1: (M, O)."""
        down, up = (part.to(x.dtype) for part in self.rank_parameters(e).values())
        return (x @ down)[:, None] * up

    def rank_parameters(self, e: int) -> dict[str, Tensor]:
        """Return views of the parameters of rank ``e`` of the R: A_e (D,) and B_e (O,)."""
        return {"down": self.down[self.shared + e], "up": self.up[:, self.shared + e]}

    @torch.no_grad()
    def merged(self, gates: Tensor) -> nn.Linear:
        r"""Return the plain linear layer that equals this one for gates g: :math:`W_0 + B\,\mathrm{diag}(1, g)\,A`.

        If the router reads only side information, such as a severity, this is the whole layer for one severity.

        Args:
            gates: g (R,), such as a row of ``routing.gates(layer.ranks)``.

        >>> layer = RankExperts(nn.Linear(6, 5), ranks=4, shared=1, zero=0, k=4)
        >>> _ = layer.router.scorer.weight.data.zero_()  # so all gates are 1
        >>> _ = layer.up.data.normal_()
        >>> x = torch.randn(3, 6)
        >>> torch.allclose(layer.merged(torch.ones(4))(x), layer(x), atol=1e-5)
        True
        """
        if gates.shape != (self.ranks,):
            raise UserError(f"RankExperts.merged: takes one gate for each of {self.ranks} ranks, got {[*gates.shape]}")
        old, wide = self.linear, torch.float64
        all_gates = F.pad(gates.to(wide), (self.shared, 0), value=1.0)
        plain = nn.Linear(old.in_features, old.out_features, old.bias is not None, old.weight.device, old.weight.dtype)
        plain.weight.copy_(old.weight.to(wide) + (self.up.to(wide) * all_gates) @ self.down.to(wide))
        if old.bias is not None:
            plain.bias.copy_(old.bias)
        return plain.train(self.training)


def add_ranks(
    model: Model,
    layers: str | Sequence[str],
    *,
    ranks: int = 32,
    shared: int = 8,
    zero: int = 4,
    k: int = 8,
    scorer: Callable[[int, int], Scorer] | None = None,
) -> Model:
    """Replace linear layers of ``model`` by ``RankExperts``, in place, and return the model.

    All other parameters are frozen, as with other adapters; unfreeze afterwards what else is to be trained. Until the
    first step the model computes what it did before. Linear layers inside routers are left alone. ``record``,
    ``penalty``, ``attach`` and ``feed`` see the new layers; ``feed(model, context=...)`` gives their scorers side
    information. ``saving.save_ranks`` and ``saving.load_ranks`` save and load them alone.

    Args:
        layers: a pattern for the names of the layers (``*`` and ``?``), or several: ``["*.q_proj", "*.v_proj"]``.
        ranks, shared, zero, k: as in ``RankExperts``.
        scorer: a function (D, E) -> scorer of E = ranks + zero experts, called for each layer; None makes linear ones.

    Raises:
        UserError: a pattern matches no layer; a layer is never called, because its parent reads its weight; the model
            is sharded or under DDP, which would not sum the gradients of the new parameters.

    >>> model = add_ranks(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), "2", ranks=6, zero=2, k=4)
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['2.down', '2.up', '2.router.scorer.weight']
    """
    refuse_parallel("add_ranks", model)
    chosen = _choose(model, [layers] if isinstance(layers, str) else list(layers))
    made: dict[nn.Linear, RankExperts] = {}
    for linear in dict.fromkeys(chosen.values()):
        own = None if scorer is None else scorer(linear.in_features, ranks + zero)
        made[linear] = RankExperts(linear, ranks=ranks, shared=shared, zero=zero, k=k, scorer=own)
    return put_ranks(model, {path: made[linear] for path, linear in chosen.items()})


def put_ranks(model: Model, layers: Mapping[str, RankExperts]) -> Model:
    """Put ``RankExperts`` at their paths in ``model``, in place, and freeze all parameters but those of ranks.

    Args:
        layers: path -> layer; the paths are those without wrappers such as DDP.
    """
    places = modules_of(model)
    for path, layer in layers.items():
        place, _, name = path.rpartition(".")
        places[place].add_module(name, layer)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, RankExperts):
            for part in (module.down, module.up, module.router):
                part.requires_grad_(True)
    return model


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of ``model`` by every path that leads to them, without the parts that wrappers add."""
    return {plain_name(path): module for path, module in unwrapped(model).named_modules(remove_duplicate=False)}


def refuse_parallel(who: str, model: nn.Module) -> None:
    """Refuse a model that is sharded or under DDP, which would not sum the gradients of new parameters.

    Raises:
        UserError: it is sharded, or under DDP.
    """
    under_ddp = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if under_ddp or any(map(is_sharded, model.parameters())):
        how = "under DDP" if under_ddp else "sharded"
        raise UserError(f"{who}: the model is {how}, and ranks that come later would not be; put them in before that")


def _choose(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that the patterns name, by every path that leads to them; those in routers and those with ranks
    are left out.
    """
    every = modules_of(model)
    inside = {part for layer in every.values() if isinstance(layer, RankExperts | Router) for part in layer.modules()}
    linear = {
        path: layer for path, layer in every.items() if isinstance(layer, nn.Linear) and path and layer not in inside
    }
    chosen = {path: layer for path, layer in linear.items() if any(fnmatch(path, pattern) for pattern in patterns)}
    for pattern in patterns:
        if not any(fnmatch(path, pattern) for path in linear):
            some = ", ".join(list(linear)[:4]) + (", ..." if len(linear) > 4 else "")
            raise UserError(f"add_ranks: layers={pattern!r} matches no linear layer; the model has: {some or 'none'}")
    for path, layer in chosen.items():
        owner = every[path.rpartition(".")[0]]
        if isinstance(layer, NonDynamicallyQuantizableLinear) or isinstance(owner, nn.TransformerEncoderLayer):
            what = "attention" if isinstance(layer, NonDynamicallyQuantizableLinear) else type(owner).__name__
            raise UserError(f"add_ranks: {path} is not always called, torch's {what} reads its weight; leave it out")
    return chosen

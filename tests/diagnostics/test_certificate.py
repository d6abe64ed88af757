"""Certified radii: sound against searches inside them, and exact where the gate's geometry is known."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from grids import one_of_each
from torch import nn

from spectralmoe import (
    Balanced,
    BasisScorer,
    Capacity,
    CosineScorer,
    EigenbasisScorer,
    EigenExperts,
    ExpertChoice,
    LinearScorer,
    NoisyTopK,
    PrincipalScorer,
    PrototypeScorer,
    Router,
    SaturatedScorer,
    Scorer,
    Soft,
    TopK,
    TopP,
)
from spectralmoe.diagnostics import attack_distance, routing_radius
from spectralmoe.diagnostics.local_bounds import travel_bound

D, E = 10, 6


def tokens(n, dim=D):
    return torch.randn(n, dim, dtype=torch.float64)


def chosen(router, x, processor=None):
    indices = router(x if processor is None else processor(x)).indices
    return torch.zeros(len(x), router.num_experts, dtype=torch.bool).scatter_(1, indices, True)


def breaks(router, x, radius, processor=None, steps=15):
    """Whether a projected gradient search in the ball of this radius (N,) around each token changes its choice (N,)."""
    before, radius = chosen(router, x, processor), radius[:, None].clamp_max(1e3)
    move, broken = torch.randn_like(x), torch.zeros(len(x), dtype=torch.bool)
    for step in range(steps):
        move = move * (radius / move.norm(dim=1, keepdim=True).clamp_min(1e-300)).clamp_max(1 if step else math.inf)
        move.requires_grad_()
        z = x + move if processor is None else processor(x + move)
        values = router.scorer(z)
        if isinstance(router.selector, Balanced):
            values = router.selector.scores(values) + router.selector.bias
        margin = values.masked_fill(~before, math.inf).amin(1) - values.masked_fill(before, -math.inf).amax(1)
        slope = torch.autograd.grad(margin.sum(), move)[0]
        move = move.detach()
        broken |= (chosen(router, x + move, processor) != before).any(1)
        move = move - radius / (1 + step / 4) * nn.functional.normalize(slope, dim=1)
    return broken


def slow_radius(router, x):
    """The formula, one pair at a time: radius (N,) and the unit step (N, D) to the nearest boundary."""
    a, b = (t.detach().double() for t in router.scorer.affine())
    s, picked = x @ a.T + b, chosen(router, x)
    best, step = torch.full((len(x),), math.inf, dtype=torch.float64), torch.zeros_like(x)
    for i, j in itertools.permutations(range(router.num_experts), 2):
        slope = (a[i] - a[j]).norm()
        distance = (s[:, i] - s[:, j]) / slope
        nearer = picked[:, i] & ~picked[:, j] & (distance < best)
        best[nearer], step[nearer] = distance[nearer], -(a[i] - a[j]) / slope
    return best, step


def affine_scorers():
    """7 kinds of gate, float64: linear without and with bias, prototypes at 5 temperatures."""
    biased = LinearScorer(D, E, bias=True)
    nn.init.normal_(biased.bias)
    return [LinearScorer(D, E), biased, *(PrototypeScorer(D, E, temperature=t) for t in (0.1, 0.3, 1.0, 3.0, 10.0))]


def test_a_hair_beyond_the_radius_an_affine_gate_flips_and_within_it_never():
    cases = 0
    for _, k in itertools.product(range(10), (1, 2, 3)):
        for scorer in affine_scorers():
            router, x = Router(scorer.double(), TopK(k)), tokens(48)
            radius = routing_radius(router, x)
            want, step = slow_radius(router, x)
            torch.testing.assert_close(radius, want, rtol=1e-10, atol=1e-12)
            before = chosen(router, x)
            assert (chosen(router, x + 1.001 * radius[:, None] * step) != before).any(1).all()
            assert (chosen(router, x + 0.999 * radius[:, None] * step) == before).all()
            assert not breaks(router, x, 0.999 * radius, steps=8).any()
            cases += len(x)
    assert cases >= 10_000


def by_hand():
    """Gates over two experts whose boundary is x_1 = x_2 near (3, 1)."""
    eye, scorers = torch.eye(2), [LinearScorer(2, 2), PrototypeScorer(2, 2, temperature=0.3), CosineScorer(2, 2)]
    for scorer, name in zip(scorers, ("weight", "prototypes", "keys"), strict=True):
        getattr(scorer, name).data = eye
    projected, basis = CosineScorer(2, 2, proj_dim=2, temperature=2.0), EigenbasisScorer(2, 2, rank=2, eps=0.1)
    projected.keys.data, projected.projection.data = eye, 3 * eye
    basis.basis.data, basis.mask_logits.data = eye, eye
    saturated = SaturatedScorer(2, 2, rank=2)
    saturated.keys.data, saturated.projection.data = eye[:, None], 3 * eye
    return [*scorers, projected, basis, saturated]


@pytest.mark.parametrize("scorer", by_hand(), ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("selector", [TopK(1), TopK(1, score="sigmoid"), NoisyTopK(1).eval()])
def test_by_hand(scorer, selector):
    radius = routing_radius(Router(scorer, selector), torch.tensor([[3.0, 1.0], [1.0, 4.0], [2.0, 2.0]]))
    assert radius.tolist() == pytest.approx([2**0.5, 3 / 2**0.5, 0], abs=1e-5)


def in_the_plane():
    made = [LinearScorer(2, 4, bias=True), PrototypeScorer(2, 4), CosineScorer(2, 4), CosineScorer(2, 4, proj_dim=3)]
    basis = EigenbasisScorer(2, 4, rank=2, eps=0.5)
    nn.init.normal_(basis.bias, std=0.1)
    return [*made, basis, SaturatedScorer(2, 4, rank=3), SaturatedScorer(2, 4, saturation="affine")]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("which", range(7))
def test_a_grid_in_the_plane_finds_the_same_distance(which, k):
    """Exact geometries, independently: the nearest of 161 x 161 points around each token that is routed otherwise."""
    router, x = Router(in_the_plane()[which].double(), TopK(k)), tokens(20, 2)
    radius = routing_radius(router, x)
    side = torch.linspace(-1.1, 1.1, 161, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    for token, r in zip(x, radius.clamp_max(1e3), strict=True):
        flips = (chosen(router, token + r * grid) != chosen(router, token[None])).any(1)
        nearest = grid[flips].norm(dim=1).min() if flips.any() else torch.tensor(math.inf)
        assert nearest >= 1
        assert nearest <= 1.04 or r == 1e3


class Sine(Scorer):
    """Smooth, neither affine nor a cone: s = sin(x W'), Lipschitz with sigma_1(W)."""

    def __init__(self, dim, num_experts, bounded=True):
        super().__init__(dim, num_experts)
        self.bounded, self.weight = bounded, nn.Parameter(torch.randn(num_experts, dim) / 4)

    def forward(self, x, *, context=None):
        return (x @ self.weight.to(x.dtype).T).sin()

    def lipschitz(self):
        return float(torch.linalg.matrix_norm(self.weight.detach(), 2)) if self.bounded else None


def eigenbasis(**options):
    scorer = EigenbasisScorer(D, E, rank=5, **options)
    nn.init.normal_(scorer.bias, std=0.02)
    nn.init.normal_(scorer.mask_logits, std=3)
    nn.init.uniform_(scorer.gain, 0.5, 1.5)
    return scorer


def skewed():
    """A basis as it is between a step and its retraction: not orthonormal."""
    scorer = eigenbasis()
    scorer.basis.data += 0.2 * torch.randn(D, 5)
    return scorer


def basis(rank, skew=0.0, dim=D):
    """Energies in the bases of a bank, which may be off their manifold."""
    bank = EigenExperts(E, dim, rank)
    bank.right.data += skew * torch.randn(E, dim, rank)
    return BasisScorer(dim, E, bank=bank, score="energy")


OTHERS = {  # name: (scorer, least median of radius / attack distance)
    "cosine": (lambda: CosineScorer(D, E), 0.99),
    "cosine, projected": (lambda: CosineScorer(D, E, proj_dim=4), 0.99),
    "saturated": (lambda: SaturatedScorer(D, E, rank=4, gain=3.0), 0.99),
    "saturated, affine": (lambda: SaturatedScorer(D, E, rank=4, saturation="affine"), 0.99),
    "saturated, anchors": (lambda: SaturatedScorer(D, E, rank=4, anchors=3), 0.05),
    "eigenbasis": (eigenbasis, 0.99),
    "eigenbasis, large eps": (lambda: eigenbasis(eps=3.0), 0.99),
    "eigenbasis, skewed": (skewed, 0.5),
    "basis, orthogonal": (lambda: basis(1), 0.99),
    "basis": (lambda: basis(3), 0.5),
    "basis, skewed": (lambda: basis(1, skew=0.3), 0.5),
    "sine": (lambda: Sine(D, E), 0.1),
}


def check(router, x, record_property, processor=None, least=0.0):
    radius, attack = (f(router, x, processor=processor) for f in (routing_radius, attack_distance))
    ratio = radius / attack
    found = attack < math.inf
    median = float(ratio[found].median())
    record_property("median of radius / attack distance", median)
    assert radius.dtype == attack.dtype == torch.float64
    assert (radius > 0).all()
    assert found.float().mean() > 0.4
    assert (ratio <= 1 + 1e-6).all(), float(ratio.max())
    assert least <= median, median
    for _ in range(3):
        assert not breaks(router, x, 0.999 * radius, processor).any()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", OTHERS)
def test_other_scorers(name, k, record_property):
    make, least = OTHERS[name]
    check(Router(make().double(), TopK(k)), tokens(200), record_property, least=least)


@pytest.mark.parametrize("make", [LinearScorer, PrototypeScorer, SaturatedScorer])
def test_balanced_with_softmax(make, record_property):
    router = Router(make(D, E).double(), Balanced(2, score="softmax"))
    router.selector.bias = 0.05 * torch.randn(E)
    check(router, tokens(200), record_property, least=0.05)


def batch_norm():
    norm = nn.BatchNorm1d(D).eval()
    for tensor in (norm.running_var, norm.weight):
        nn.init.uniform_(tensor, 0.5, 2)
    nn.init.normal_(norm.running_mean)
    return norm


def layer_norm():
    norm = nn.LayerNorm(D)
    nn.init.uniform_(norm.weight, -1.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


PROCESSORS = {
    "linear": lambda: [nn.Linear(D, D)],
    "relu": lambda: [nn.ReLU()],
    "linear, relu": lambda: [nn.Linear(D, D), nn.ReLU()],
    "wide": lambda: [nn.Linear(D, 3 * D), nn.ReLU(), nn.Linear(3 * D, D, bias=False)],
    "layer norm": lambda: [layer_norm()],
    "batch norm": lambda: [nn.Identity(), batch_norm()],
    "stage": lambda: [nn.Linear(D, D), nn.ReLU(), nn.LayerNorm(D)],
    "stage, trained": lambda: [batch_norm(), nn.Linear(D, D), nn.ReLU(), layer_norm()],
}


def farthest(processor, x, radius, steps=30):
    """How far a projected gradient ascent moves processor(x), starting on spheres of this radius around x (N, D)."""
    move, best = torch.randn_like(x), torch.zeros(len(x), dtype=x.dtype)
    for _ in range(steps):
        move = (radius * nn.functional.normalize(move, dim=1)).requires_grad_()
        distance = (processor(x + move) - processor(x).detach()).norm(dim=1)
        best = torch.maximum(best, distance.detach())
        slope = nn.functional.normalize(torch.autograd.grad(distance.sum(), move)[0], dim=1)
        move = move.detach() + radius / 2 * slope
    return best


@pytest.mark.parametrize("name", PROCESSORS)
def test_travel_is_bounded(name):
    processor, x = nn.Sequential(*PROCESSORS[name]()).double(), tokens(100)
    travel = travel_bound(processor, x)[1]
    for radius in (0.01, 0.3, 1.0, 2.5, 5.0, 30.0):
        bound = travel(torch.full_like(x[:, 0], radius))
        for _ in range(3):
            assert (farthest(processor, x, radius) <= bound * (1 + 1e-9)).all(), radius


def test_travel_of_a_layer_norm_is_that_of_a_turn():
    x = torch.tensor(
        [[2.0, -2.0, 2.0, -2.0]], dtype=torch.float64
    )  # norm 4: a ball of radius 2 is seen under 30 degrees
    travel = travel_bound(nn.Sequential(nn.LayerNorm(4, eps=0.0)).double(), x)[1]
    assert float(travel(torch.tensor([2.0]))) == pytest.approx(2 * 2 * math.sin(math.pi / 12))
    assert float(travel(torch.tensor([4.1]))) == pytest.approx(4)


@pytest.mark.parametrize("make", [PrototypeScorer, eigenbasis], ids=["prototype", "eigenbasis"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors(name, make, record_property):
    torch.manual_seed(0)  # how tight a bound is depends on the network
    scorer = make(D, E) if make is PrototypeScorer else make()
    processor = nn.Sequential(*PROCESSORS[name]()).double()
    check(Router(scorer.double(), TopK(2)), tokens(200), record_property, processor, least=0.1)


def test_a_linear_processor_by_hand():
    scorer, processor = by_hand()[0], nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    processor[0].weight.data = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    x = torch.tensor([[3.0, -9.0]])  # goes to (6, 0); the second unit wakes at distance 9 only, so sigma_1 = 2 holds
    radius = routing_radius(Router(scorer, TopK(1)), x, processor=processor)
    assert float(radius) == pytest.approx(6 / 2**0.5 / 2, rel=4e-3)


def test_a_processor_that_cannot_leave_the_cell():
    scorer, processor = LinearScorer(D, 2, bias=True), nn.Sequential(nn.LayerNorm(D))
    scorer.bias.data = torch.tensor([1000.0, 0.0])
    assert routing_radius(Router(scorer, TopK(1)), tokens(3), processor=processor).tolist() == [math.inf] * 3
    still = nn.Sequential(nn.Linear(D, D))
    nn.init.zeros_(still[0].weight)
    assert routing_radius(Router(LinearScorer(D, E), TopK(1)), tokens(3), processor=still).tolist() == [math.inf] * 3


@pytest.mark.parametrize("selector", [Soft(), TopK(E), NoisyTopK(E)])
def test_soft_routing_never_changes(selector):
    router, x = Router(PrototypeScorer(D, E), selector), torch.randn(4, D)
    for measure in (routing_radius, attack_distance):
        assert measure(router, x).tolist() == [math.inf] * 4


def test_equal_experts():
    scorer = LinearScorer(2, 3, bias=True)
    scorer.weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[3.0, 1.0]])
    for bias, k, want in (([1, 0, -9], 1, 12 / 2**0.5), ([1, 0, -9], 2, 11 / 2**0.5), ([0, 0, -9], 1, 0)):
        scorer.bias.data = torch.tensor(bias).float()
        assert float(routing_radius(Router(scorer, TopK(k)), x)) == pytest.approx(want)
    twins = EigenbasisScorer(D, 2, rank=3)
    twins.mask_logits.data[:] = 0
    assert routing_radius(Router(twins, TopK(1)), tokens(3)).tolist() == [0] * 3
    forever = LinearScorer(2, 2, bias=True)
    forever.weight.data[:], forever.bias.data = 1, torch.tensor([1.0, 0.0])
    router = Router(forever, TopK(1))  # one is always ahead, until fp32 logits no longer see by how much
    assert 1e6 < float(routing_radius(router, x)) < 2**24
    assert len(set(router(torch.tensor([[0.0, 2.0**25]])).logits[0].tolist())) == 1
    forever.weight.data[:] = 0
    assert float(routing_radius(router, x)) > 1e9


@pytest.mark.parametrize("processor", [None, nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.LayerNorm(D))])
def test_precision_and_no_tokens(processor):
    router, x = Router(PrototypeScorer(D, E), TopK(2)), torch.randn(300, D)
    for measure in (routing_radius, attack_distance):
        low, same = measure(router, x, processor=processor), measure(router, x.double(), processor=processor)
        assert low.dtype == torch.float32
        assert same.dtype == torch.float64
        grid = 1e-6 if processor is None else 3e-3  # of the halvings through a processor
        assert (low <= same * (1 + grid)).all()
        torch.testing.assert_close(low, same.float(), rtol=1e-4 + 2 * grid, atol=1e-4)  # less what fp32 rounds
        assert measure(router, x.bfloat16(), processor=processor).dtype == torch.float32
        assert measure(router, x[:0], processor=processor).shape == (0,)


def test_the_attack_is_seeded():
    router, x = Router(CosineScorer(D, E), TopK(2)), tokens(10)
    with torch.no_grad():
        first, second, other = (attack_distance(router, x, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        (NoisyTopK(2), ["NoisyTopK", "router.eval()"]),
        (ExpertChoice(2.0), ["ExpertChoice", "TopK"]),
        (TopP(0.5), ["TopP", "TopK"]),
        (Capacity(TopK(2), 1.0), ["Capacity", "TopK"]),
        (Balanced(2), ["Balanced", "softmax"]),
    ],
)
def test_choices_without_a_radius_are_refused(selector, words, user_error):
    router = Router(LinearScorer(D, E), selector)
    for measure in (routing_radius, attack_distance):
        with user_error(*words):
            measure(router, tokens(2))


def test_what_has_no_bound_is_refused(user_error):
    with user_error("Sine", "lipschitz()"):
        routing_radius(Router(Sine(D, E, bounded=False), TopK(2)), tokens(2))
    with user_error("CosineScorer", "lipschitz()", "Balanced"):
        routing_radius(Router(CosineScorer(D, E), Balanced(2, score="softmax")), tokens(2))
    router = Router(LinearScorer(D, E), TopK(2))
    for layer, word in ((nn.GELU(), "GELU"), (nn.BatchNorm1d(D), "eval()")):
        with user_error(word):
            routing_radius(router, tokens(2), processor=nn.Sequential(layer))
    with user_error("(2, 3, 10)"):
        routing_radius(router, torch.randn(2, 3, D))
    with user_error("7 wide", "D=10"):
        routing_radius(router, tokens(2, 7))


class Doubled(nn.Linear):
    """A layer of others that calls itself linear."""

    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    layer = nn.ReLU()
    layer.register_forward_hook(lambda module, args, y: 5 * y)
    return layer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Doubled(D, D), ("no bound is known for Doubled", "torch's own Linear")),
        (hooked, ("ReLU", "forward hooks")),
        (lambda: nn.utils.spectral_norm(nn.Linear(D, D)), ("Linear", "forward hooks")),
    ],
)
def test_a_layer_that_does_more_than_its_class_says_is_refused(make, words, user_error):
    with user_error("certificate", *words):
        travel_bound(nn.Sequential(make()).double(), tokens(3))


def test_a_parametrized_layer_is_bounded_by_the_weight_that_it_uses(close):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(D, D).double())
    layer.parametrizations.weight.original0.data *= 7
    bound = travel_bound(nn.Sequential(layer), tokens(1))[1](torch.ones(1, dtype=torch.float64))
    close(bound, torch.linalg.matrix_norm(layer.weight.detach(), 2)[None])


def test_what_fp32_cannot_tell_apart_has_no_radius():
    """The boundary of these two prototypes is x_1 = x_2, where -|x|^2 = -1.8e7 leaves fp32 logits a grid of 2."""
    scorer = PrototypeScorer(2, 2)
    scorer.prototypes.data = torch.eye(2)
    router, side = Router(scorer, TopK(1)), torch.arange(2990, 3010, 0.25)
    near, far, close_by = (torch.stack([x, x + t], 1) for x, t in ((side, 0.25), (side, 64.0), (side / 1e3, 0.25)))
    assert (router(near).logits.diff(dim=1) == 0).any()
    assert routing_radius(router, near).tolist() == [0] * len(side)
    assert routing_radius(router, near.double()).tolist() == pytest.approx([0.25 / 2**0.5] * len(side), rel=1e-6)
    assert routing_radius(router, close_by).tolist() == pytest.approx([0.25 / 2**0.5] * len(side), rel=1e-4)
    radius = routing_radius(router, far)
    assert (radius < 64 / 2**0.5).all()
    assert (radius > 58 / 2**0.5).all()


def biased_linear(d):
    scorer = LinearScorer(d, E, bias=True)
    nn.init.normal_(scorer.bias)
    return scorer


def sharp_eigenbasis(d):
    scorer = EigenbasisScorer(d, E, rank=min(d, 5))
    nn.init.normal_(scorer.bias, std=0.02)
    nn.init.normal_(scorer.mask_logits, std=2)
    return scorer


def trained_principal(d):
    scorer = PrincipalScorer(d, E, rank=min(d, E))
    nn.init.normal_(scorer.mean)
    nn.init.uniform_(scorer.spread, 0.3, 1)
    return scorer


GATES = {
    "linear": lambda d: Router(biased_linear(d), TopK(2)),
    "prototype": lambda d: Router(PrototypeScorer(d, E), TopK(2)),
    "prototype, scaled": lambda d: Router(PrototypeScorer(d, E, scale=d**-0.5, temperature=0.3), TopK(2)),
    "cosine": lambda d: Router(CosineScorer(d, E), TopK(2)),
    "cosine, projected": lambda d: Router(CosineScorer(d, E, proj_dim=3), TopK(2)),
    "saturated": lambda d: Router(SaturatedScorer(d, E), TopK(2)),
    "saturated, affine": lambda d: Router(SaturatedScorer(d, E, rank=3, saturation="affine"), TopK(2)),
    "saturated, anchors": lambda d: Router(SaturatedScorer(d, E, anchors=3), TopK(2)),
    "eigenbasis": lambda d: Router(sharp_eigenbasis(d), TopK(2)),
    "principal": lambda d: Router(trained_principal(d), TopK(2)),
    "basis": lambda d: Router(basis(min(d // 2, 5), dim=d), TopK(2)),
    "linear, balanced": lambda d: balanced(biased_linear(d)),
    "saturated, balanced": lambda d: balanced(SaturatedScorer(d, E, rank=3, anchors=2)),
    "prototype, balanced": lambda d: balanced(PrototypeScorer(d, E, scale=d**-0.5)),
}


def balanced(scorer):
    router = Router(scorer, Balanced(2, score="softmax"))
    router.selector.bias = 0.05 * torch.randn(E)
    return router


def in_float64(router):
    """A copy; selection biases count from the least one, in the precision in which the router counts them."""
    exact = copy.deepcopy(router)
    if isinstance(exact.selector, Balanced):
        exact.selector.bias -= exact.selector.bias.amin()
    return exact.double()


def around_ties(router, size, dim, backs, processor=None):
    """Tokens of norm about ``size`` that lie a share of the way between two others before the choice changes."""
    one, two = (size * nn.functional.normalize(tokens(20, dim), dim=1) for _ in range(2))
    before, inside, outside = chosen(router, one, processor), torch.zeros(20, 1).double(), torch.ones(20, 1).double()
    for _ in range(60):
        middle = (inside + outside) / 2
        kept = (chosen(router, one + middle * (two - one), processor) == before).all(1, keepdim=True)
        inside, outside = torch.where(kept, middle, inside), torch.where(kept, outside, middle)
    return torch.cat([one + (inside - back).clamp_min(0) * (two - one) for back in backs])


def downhill(router, x):
    """The unit step (N, D) along which the margin of the choice falls fastest."""
    x = x.clone().requires_grad_()
    logits, picked = router.scorer(x), chosen(router, x)
    values = router.selector.ranked(logits) if isinstance(router.selector, Balanced) else logits
    margin = values.masked_fill(~picked, math.inf).amin(1) - values.masked_fill(picked, -math.inf).amax(1)
    return -nn.functional.normalize(torch.autograd.grad(margin.sum(), x)[0], dim=1, eps=1e-300)


@one_of_each(precision=[torch.float32, torch.float64], name=GATES)
def test_the_router_keeps_its_choice_in_its_own_precision(name, precision):
    """Within 0.999 of the radius, at any scale and width, tokens a hair from a tie included."""
    backs, kept = (0, 1e-12, 1e-7, 1e-6, 1e-5, 1e-3, 0.1), 0
    for dim, size in itertools.product((3, 64), (1e-3, 1.0, 3e3, 1e6)):
        router = GATES[name](dim)
        exact = in_float64(router)
        x = around_ties(exact, size, dim, backs).to(precision)
        radius, step = routing_radius(router, x).double(), downhill(exact, x.double())
        sure, before = radius > 0, chosen(router, x)
        assert (before == chosen(exact, x.double())).all(1)[sure].all()
        for share, sideways in ((0.998, 0), (0.9, 0), (0.998, 0.3), (0.998, 3)):
            way = nn.functional.normalize(
                step + sideways * nn.functional.normalize(torch.randn_like(step), dim=1), dim=1
            )
            y = (x.double() + share * radius[:, None] * way).to(precision)
            within = sure & ((y.double() - x.double()).norm(dim=1) <= 0.999 * radius)
            assert (chosen(router, y) == before).all(1)[within].all(), (dim, size, share)
            kept += int(within.sum())
    assert kept > 500


@pytest.mark.parametrize("name", ["wide", "layer norm", "stage", "stage, trained"])
def test_so_it_does_behind_a_processor(name):
    kept = 0
    for size in (1e-2, 1.0, 1e3):
        router, processor = Router(PrototypeScorer(D, E), TopK(2)), nn.Sequential(*PROCESSORS[name]())
        exact, before_exact = in_float64(router), copy.deepcopy(processor).double()
        x = around_ties(exact, size, D, (0, 1e-12, 1e-7, 1e-6, 1e-5, 1e-3, 0.1), before_exact).float()
        radius, before = routing_radius(router, x, processor=processor).double(), chosen(router, x, processor)
        assert (before == chosen(exact, x.double(), before_exact)).all(1)[radius > 0].all()
        for _ in range(8):
            way = nn.functional.normalize(torch.randn_like(x), dim=1).double()
            y = (x.double() + 0.998 * radius[:, None] * way).float()
            within = (radius > 0) & ((y.double() - x.double()).norm(dim=1) <= 0.999 * radius)
            assert (chosen(router, y, processor) == before).all(1)[within].all(), size
            kept += int(within.sum())
    assert kept > 300


@pytest.mark.parametrize("name", GATES)
def test_rounding_costs_little_at_usual_scales(name):
    router, x = GATES[name](64), torch.randn(200, 64)
    low, high = routing_radius(router, x), routing_radius(router, x.double()).float()
    assert (low <= high * (1 + 1e-6)).all()
    assert float((low / high).median()) > 0.99

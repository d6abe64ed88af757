"""The teacher-student units of the soft-routed theory: the equation, moments, overlaps, merging and pruning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from spectralmoe.models import SoftRouted, overlaps, prune_units
from spectralmoe.models.soft_routed import ACTIVATIONS
from spectralmoe.optim import SphereStep

D, K = 6, 3


def test_the_equation_as_a_loop(close):
    model = SoftRouted(D, K).double()
    with torch.no_grad():
        model.amplitudes.copy_(torch.randn(K))
    x = torch.randn(4, D, dtype=torch.float64)
    y = []
    for row in x.tolist():
        total = 0.0
        for a, w, v in zip(model.amplitudes.tolist(), model.routers.tolist(), model.experts.tolist(), strict=True):
            gate = 1 / (1 + math.exp(-sum(p * q for p, q in zip(w, row, strict=True))))
            z = sum(p * q for p, q in zip(v, row, strict=True))
            total += a * gate * (z**3 - 3 * z) / math.sqrt(6)
        y.append(total)
    close(model(x), torch.tensor(y, dtype=torch.float64))


def test_gradients():
    model = SoftRouted(D, K).double()
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    parameters = tuple(model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_hermite_activations_are_orthonormal_under_a_gaussian():
    """By Gauss-Hermite quadrature, which is exact for polynomials."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    z, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    basis = {"1": torch.ones_like(z), "z": z, **{n: ACTIVATIONS[n](z) for n in ("hermite2", "hermite3")}}
    for one, p in basis.items():
        for two, q in basis.items():
            assert float((weights * p * q).sum()) == pytest.approx(float(one == two), abs=1e-9)


def test_the_sign_of_an_odd_unit_is_nobodys(close):
    teacher = SoftRouted.teacher(D, 2)
    turned = SoftRouted(D, 2)
    turned.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        turned.experts[0] *= -1
        turned.amplitudes[0] *= -1
    x = torch.randn(5, D)
    close(turned(x), teacher(x))
    for cosines in overlaps(turned, teacher):
        close(cosines, torch.eye(2))


def test_pruning_an_idle_unit_changes_nothing(close):
    model = SoftRouted(D, K)
    with torch.no_grad():
        model.amplitudes[1] = 0
    x = torch.randn(50, D)
    smaller = prune_units(model, x)
    assert smaller.units == K - 1
    close(smaller(x), model(x))


def test_units_that_are_one_are_merged_first(close):
    """Two halves of one unit, one of them turned by its sign; pruned alone, one of them would be lost."""
    one, model = SoftRouted(D, 2), SoftRouted(D, 3)
    with torch.no_grad():
        one.amplitudes.copy_(torch.tensor([1.0, 0.4]))
        model.experts.copy_(torch.stack([one.experts[0], -one.experts[0], one.experts[1]]))
        model.routers.copy_(torch.stack([one.routers[0], one.routers[0], one.routers[1]]))
        model.amplitudes.copy_(torch.tensor([0.7, -0.3, 0.4]))
    x = torch.randn(50, D)
    close(prune_units(model, x, keep=2)(x), one(x))
    assert prune_units(model, x, threshold=0.0, merge=2.0).units == 3


def test_steps_stay_on_the_sphere_and_go_down(close):
    v = nn.Parameter(torch.randn(4, D))
    target = torch.nn.functional.normalize(torch.randn(4, D), dim=1)
    optimizer = SphereStep([v], lr=0.1)
    losses = []
    for _ in range(30):
        loss = (v - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        close(v.detach().norm(dim=1), torch.ones(4))
    assert losses[-1] < losses[1]


def test_experts_lead_and_routers_follow():
    """From a start that is already on its way, as gradient flow would have it: the expert is there first."""
    teacher = SoftRouted.teacher(16, 1)
    student = SoftRouted(16, 1)
    with torch.no_grad():
        student.amplitudes.fill_(1)
        for own, other in ((student.experts, teacher.experts), (student.routers, teacher.routers)):
            rest = own - (own @ other.T) * other
            own.copy_(0.4 * other + 0.84**0.5 * torch.nn.functional.normalize(rest, dim=1))
    optimizer, reached = SphereStep([student.experts, student.routers], lr=0.1), {}
    for step in range(600):
        x = torch.randn(1024, 16)
        loss = (student(x) - teacher(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, cosines in overlaps(student, teacher)._asdict().items():
            if float(cosines) > 0.9:
                reached.setdefault(name, step)
    assert reached["experts"] < reached.get("routers", 600)


def test_misuse_is_one_line(user_error):
    with user_error("units", "0"):
        SoftRouted(4, 0)
    with user_error("hermit", "hermite3"):
        SoftRouted(4, 2, activation="hermit")
    with user_error("3 units", "D=4"):
        SoftRouted.teacher(4, 3)
    with user_error("one width"):
        overlaps(SoftRouted(4, 2), SoftRouted(5, 2))
    with user_error("keep=0"):
        prune_units(SoftRouted(4, 2), torch.zeros(3, 4), keep=0)
    with user_error("lr", "-1"):
        SphereStep([nn.Parameter(torch.ones(2))], lr=-1)
    with user_error("no direction"):
        SphereStep([nn.Parameter(torch.ones(()))])

"""The two-layer block against its equation with materialised matrices, and what every layer of the library keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from spectralmoe import LinearScorer, Router, Soft, TopK, attach, load, record, save
from spectralmoe.models import MultilinearBlock
from spectralmoe.regularizers import load_balance
from spectralmoe.selectors import Entmax

D, H, E = 6, 7, 5


@pytest.fixture(params=["cp", "tr"])
def block(request):
    router = Router(LinearScorer(D, E), Entmax())
    return MultilinearBlock(D, H, E, rank=3, form=request.param, bond=2, router=router)


def matrices(bank):
    """(E, O, D) and (E, O): the expert's answer to each unit vector, less that to 0."""
    zero = torch.stack([bank.expert(torch.zeros(1, bank.dim, dtype=torch.float64), e)[0] for e in range(E)])
    units = torch.stack([bank.expert(torch.eye(bank.dim, dtype=torch.float64), e) for e in range(E)])
    return (units - zero[:, None]).mT, zero


def slow(block, x):
    rows = []
    for row in x:
        gates = block.router(row[None]).gates()[0]
        for number, bank in enumerate((block.up, block.down)):
            matrix, bias = (sum(a * each for a, each in zip(gates, part, strict=True)) for part in matrices(bank))
            row = matrix @ row + bias
            row = row if number else F.gelu(row)
        rows.append(row)
    return torch.stack(rows)


def test_it_mixes_parameters(block, same):
    block = block.double()
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    same(block(x), slow(block, x), [x, *block.parameters()])


def test_it_is_no_sum_of_experts(block):
    """Two gates and their mean: a sum over experts would be linear in the gate."""
    block = block.double()
    x, one = torch.randn(1, D).double(), F.one_hot(torch.tensor([0, 1]), E).double()

    def under(gates):
        mixed = F.gelu(block.up.mix(x, gates[None]))
        return block.down.mix(mixed, gates[None])

    both = under(one.mean(0))
    assert not torch.allclose(both, (under(one[0]) + under(one[1])) / 2, rtol=1e-7, atol=1e-9)


def test_it_starts_with_even_gates_and_its_router_learns():
    block = MultilinearBlock(D, H, E, rank=3)
    x = torch.randn(2, 5, D)
    assert block.router(x).weights.unique().tolist() == pytest.approx([1 / E])
    (block(x) * torch.randn(2, 5, D)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in block.parameters())


def test_padding_is_inert_and_no_tokens_stay_none(block, gradients):
    x, mask = torch.randn(3, 4, D), torch.rand(3, 4) < 0.6
    mask[0, 0], mask[0, 1] = True, False
    broken = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    y = block(broken, mask=mask)
    assert not y[~mask].any()
    torch.testing.assert_close(y[mask], block(x)[mask], rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in gradients(y.square().sum(), [broken, *block.parameters()]))
    assert block(x[:0]).shape == (0, 4, D)
    block(torch.zeros(0, D)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_compiled_it_gives_the_same(close):
    block, x = MultilinearBlock(D, H, E, rank=3), torch.randn(9, D)
    torch.compiler.reset()
    close(torch.compile(block, backend="aot_eager", fullgraph=True)(x), block(x))


def test_it_is_recorded_saved_and_copied(block, tmp_path, close):
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    attach(optimizer, block)
    x = torch.randn(9, D)
    with record(block, keep="tokens") as tape:
        y = block(x)
    assert torch.equal(tape[0].tokens, x)
    assert tape[0].name == ""
    (y.square().mean() + load_balance(tape[0].routing)).backward()
    optimizer.step()
    with torch.autocast("cpu", torch.bfloat16):
        half = block(x)
    assert half.dtype == torch.bfloat16
    close(half.float(), block(x), torch.bfloat16)
    save(block, tmp_path)
    for twin in (load(tmp_path), copy.deepcopy(block)):
        assert torch.equal(twin(x), block(x))


@pytest.mark.parametrize("selector", [Soft, lambda: TopK(2)], ids=["soft", "topk"])
def test_any_router_gives_its_gates(selector, same):
    block = MultilinearBlock(D, H, E, rank=3, router=Router(LinearScorer(D, E), selector())).double()
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    same(block(x), slow(block, x), [x, *block.parameters()])


def test_a_router_of_other_sizes_is_refused(user_error):
    with user_error("MultilinearBlock", "D=8, E=5", "D=6, E=5"):
        MultilinearBlock(D, H, E, rank=3, router=Router(LinearScorer(8, E), Entmax()))

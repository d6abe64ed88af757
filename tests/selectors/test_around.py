"""Around: a wrapper that forwards everything, so that a subclass overrides one method."""

from __future__ import annotations

import inspect

import pytest
import torch

from spectralmoe import LinearScorer, Router, Selector, TopK
from spectralmoe.selectors import Around


def test_a_wrapper_that_overrides_nothing_is_what_it_wraps(make_selector, selector_name):
    plain, wrapped = make_selector(selector_name), Around(make_selector(selector_name))
    routers = [Router(LinearScorer(6, 6), selector) for selector in (plain, wrapped)]
    routers[1].load_state_dict(
        {name.replace("selector.", "selector.selector."): value for name, value in routers[0].state_dict().items()}
    )
    x, mask, context = torch.randn(40, 6), torch.rand(40) < 0.8, {"severity": 3}
    routings = []
    for router in routers:
        torch.manual_seed(0)  # for noise
        routings.append(router(x, mask=mask, context=context))
    one, two = routings
    for name in ("logits", "weights", "indices", "scores"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert (one.soft, one.full, float(one.dropped())) == (two.soft, two.full, float(two.dropped()))
    assert type(one.score) is type(two.score)
    assert torch.equal(plain.ranked(one.logits), wrapped.ranked(one.logits))


def test_every_method_and_every_fact_is_forwarded():
    """A method that ``Selector`` gains is one that ``Around`` has to forward; ``select`` reaches inside."""
    methods = {name for name, _ in inspect.getmembers(Selector, inspect.isfunction) if name in vars(Selector)}
    assert methods - {"scores", "select"} <= vars(Around).keys()
    assert all(f"self.{fact}" in inspect.getsource(Around) for fact in Selector.__annotations__)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_subclass_overrides_one_method(normalize):
    class Doubled(Around):
        def weigh(self, logits, indices):
            return 2 * super().weigh(logits, indices)

    x = torch.randn(10, 6)
    router = Router(LinearScorer(6, 6), Doubled(TopK(2, normalize=normalize)))
    plain = Router(router.scorer, TopK(2, normalize=normalize))
    assert torch.equal(router(x).weights, 2 * plain(x).weights)
    assert torch.equal(router(x).indices, plain(x).indices)

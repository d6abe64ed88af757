"""A monitor's numbers against sums over the indices that the routers returned, by hand."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import ends, start
from seeds import generator, shifted
from torch import nn
from torch.utils.checkpoint import checkpoint

from spectralmoe import Balanced, Capacity, FeedForward, LinearScorer, MoE, Router, Soft, TopK, attach, feed
from spectralmoe.instruments.monitor import Monitor
from spectralmoe.instruments.monitor_log import read_monitor
from spectralmoe.models import MultilinearBlock

N, D, E, K, DEPTH = 40, 8, 5, 2, 3
KEYS = ["kind", "step", "tokens", "max_vio", "max_vio_worst", "entropy", "dead_experts", "dropped", "near_tie"]


class Net(nn.Module):
    """Blocks that may be checkpointed: ``reentrant`` is None (not at all), False or True."""

    def __init__(self, reentrant=None, make=lambda: TopK(K), experts=E):
        super().__init__()
        self.reentrant, self.first = reentrant, nn.Linear(D, D)
        self.moes = nn.ModuleList(
            MoE(Router(LinearScorer(D, experts), make()), FeedForward(experts, D, 16)) for _ in range(DEPTH)
        )

    def forward(self, x):
        x = self.first(x)
        for moe in self.moes:
            x = x + (moe(x) if self.reentrant is None else checkpoint(moe, x, use_reentrant=self.reentrant))
        return x


class ByHand:
    """All that the routers of a model returned in training outside a recomputation, as a hook on each sees it."""

    def __init__(self, model):
        self.routings = {name: [] for name, module in model.named_modules() if isinstance(module, MoE)}
        self.on = True
        for name in self.routings:
            model.get_submodule(name).router.register_forward_hook(self.keep(name))

    def keep(self, name):
        return lambda module, _, routing: self.routings[name].append(routing) if self.on and module.training else None

    def counts(self, name):
        found = Counter(e for routing in self.routings[name] for row in routing.indices.tolist() for e in row)
        return [found[e] for e in range(E)]

    def tokens(self):
        """Of the first layer."""
        first = next(iter(self.routings.values()))
        return sum(len(item.indices) if item.mask is None else int(item.mask.sum()) for item in first)

    def vio(self):
        """MaxVio of each layer."""
        counts = [self.counts(name) for name in self.routings]
        return [max(row) / (sum(row) / E) - 1 for row in counts]

    def entropy(self):
        """Mean over the layers of the mean entropy of the tokens over log E."""
        means = []
        for routings in self.routings.values():
            probs = torch.cat([item.logits if item.mask is None else item.logits[item.mask] for item in routings])
            probs = probs.detach().double().softmax(-1)
            means.append(float(-(probs * probs.log()).sum(-1).mean() / math.log(E)))
        return sum(means) / len(means)


def lines(path, kind):
    return [line for line in read_monitor(path) if line["kind"] == kind]


def train(model, batches, monitor, hand=None, parts=1):
    """One step a batch, in ``parts`` micro-batches; ``hand`` does not look during the backward pass."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        for part in batch.chunk(parts):
            loss = model(part).square().mean()
            if hand:
                hand.on = False
            loss.backward()
            if hand:
                hand.on = True
        optimizer.step()
        monitor.step()


def batches(n, seed=0):
    return torch.randn(n, N, D, generator=generator(seed))


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_counts_are_those_of_all_indices(tmp_path, reentrant, parts):
    model, path = Net(reentrant), tmp_path / "runs" / "monitor.jsonl"
    hand = ByHand(model)
    with Monitor(model, path, every=4, layers=True, title="mine") as monitor:
        train(model, batches(4), monitor, hand, parts)
    [start] = lines(path, "start")
    assert start["title"] == "mine"
    assert start["layers"][1] == {"name": "moes.1", "layer": 1, "stack": "", "experts": E, "top_k": K}
    [step], [load] = lines(path, "step"), lines(path, "load")
    assert list(step) == KEYS
    assert (step["step"], step["tokens"]) == (4, 4 * N) == (4, hand.tokens())
    for name, shares in load["shares"].items():
        counts = hand.counts(name)
        assert sum(counts) == 4 * N * K
        assert shares == pytest.approx([count / sum(counts) for count in counts], abs=1e-6)
    assert step["max_vio"] == pytest.approx(sum(hand.vio()) / DEPTH)
    assert step["max_vio_worst"] == pytest.approx(max(hand.vio()))
    assert step["entropy"] == pytest.approx(hand.entropy())
    assert step["dropped"] == 0


def test_padding_is_left_out(tmp_path):
    model, path = Net(), tmp_path / "m.jsonl"
    mask = torch.arange(N) % 4 > 0
    hand = ByHand(model)
    with Monitor(model, path, every=3, layers=True) as monitor:
        for x in batches(3):
            x = torch.where(mask[:, None], x, 7.0)
            with feed(model, mask=mask):
                model(x).sum().backward()
            monitor.step()
    [step], [load] = lines(path, "step"), lines(path, "load")
    assert step["tokens"] == 3 * int(mask.sum()) == hand.tokens()
    assert step["max_vio_worst"] == pytest.approx(max(hand.vio()))
    assert step["entropy"] == pytest.approx(hand.entropy())
    counts = hand.counts("moes.2")
    assert load["shares"]["moes.2"] == pytest.approx([count / sum(counts) for count in counts], abs=1e-6)


def test_evaluation_in_between_is_left_out(tmp_path):
    model, path = Net(), tmp_path / "m.jsonl"
    with Monitor(model, path, every=2) as monitor:
        for x in batches(2):
            model.train()(x)
            model.eval()(x)
            model.moes[1].train()(x)  # a layer in training mode counts
            monitor.step()
    [step] = lines(path, "step")
    assert step["tokens"] == 4 * N
    assert not any(sink.chain for moe in model.moes for sink in moe.sinks)


def test_dropped_slots_are_counted_in_every_step(tmp_path):
    model, path = Net(make=lambda: Capacity(TopK(K), 0.5)), tmp_path / "m.jsonl"
    hand = ByHand(model)
    with Monitor(model, path, every=20) as monitor:
        train(model, batches(20), monitor)
    [step] = lines(path, "step")
    shares = [1 - sum(hand.counts(name)) / (20 * N * K) for name in hand.routings]
    assert step["dropped"] == pytest.approx(sum(shares) / DEPTH)
    assert step["dropped"] > 0.3
    kinds = [line["finding"]["kind"] for line in lines(path, "finding")]
    assert kinds.count("dropped_slots") == DEPTH


def test_soft_layers_count_by_their_largest_weight(tmp_path):
    model, path = Net(make=Soft), tmp_path / "m.jsonl"
    hand = ByHand(model)
    with Monitor(model, path, every=5, layers=True) as monitor:
        train(model, batches(5), monitor)
    [load] = lines(path, "load")
    tops = torch.cat([item.weights.argmax(-1) for item in hand.routings["moes.0"]])
    assert load["shares"]["moes.0"] == pytest.approx((tops.bincount(minlength=E) / len(tops)).tolist(), abs=1e-6)


def test_entropy_and_near_ties_are_those_of_the_first_256_tokens(tmp_path):
    model, path, x = Net(), tmp_path / "m.jsonl", batches(10)
    with Monitor(model, path, every=10) as monitor:
        hand = ByHand(model)
        for i in range(10):
            hand.on = i * N < 256
            model(x[i])
            monitor.step()
    [step] = lines(path, "step")
    assert hand.tokens() == 280
    assert step["tokens"] == 10 * N
    assert step["entropy"] == pytest.approx(hand.entropy())
    ties = []
    for routings in hand.routings.values():
        scores = torch.cat([item.scores for item in routings]).double().sort(-1, descending=True).values
        ties.append(float(((scores[:, K - 1] - scores[:, K]) <= 0.01 * scores[:, K - 1]).double().mean()))
    assert step["near_tie"] == pytest.approx(sum(ties) / DEPTH)


def test_layers_of_other_sizes_and_zero_experts(tmp_path):
    layers = [
        MoE(Router(LinearScorer(D, 7), Capacity(TopK(3), 7.0)), FeedForward(5, D, 16)),  # two zero experts
        MoE(Router(LinearScorer(D, 3), TopK(1)), FeedForward(3, D, 16)),
    ]
    model, path, x = nn.Sequential(*layers), tmp_path / "m.jsonl", batches(1)[0]
    with Monitor(model, path, every=1, layers=True) as monitor:
        model(x)
        monitor.step()
    [load], [step] = lines(path, "load"), lines(path, "step")
    first = layers[0].router(x).indices
    counts = [int((first == e).sum()) for e in range(5)]
    second = layers[1].router(layers[0](x)).indices
    assert load["shares"]["0"] == pytest.approx([count / sum(counts) for count in counts], abs=1e-6)
    assert load["shares"]["1"] == pytest.approx([float((second == e).double().mean()) for e in range(3)], abs=1e-6)
    assert step["dropped"] == 0


def test_a_model_without_a_layer_to_watch_is_refused(tmp_path, user_error):
    model = nn.Sequential(MultilinearBlock(D, 4, E, rank=2))
    with user_error("Sequential has no layer to watch", "MultilinearBlock", "record(model)"):
        Monitor(model, tmp_path / "lines.jsonl").__enter__()
    assert not (tmp_path / "lines.jsonl").exists()
    assert not model[0].watching


def test_windows_end_at_multiples_and_the_last_one_is_written(tmp_path):
    model, path = Net(), tmp_path / "m.jsonl"
    with Monitor(model, path, every=4) as monitor:
        train(model, batches(10), monitor)
        assert monitor.last["step"] == 8
    assert [(line["step"], line["tokens"]) for line in lines(path, "step")] == [(4, 160), (8, 160), (10, 80)]
    assert monitor.last["step"] == 10
    assert all(line["entropy"] is not None for line in lines(path, "step"))


def test_little_data_is_no_data(tmp_path):
    model, path = Net(), tmp_path / "m.jsonl"
    with Monitor(model, path, every=1) as monitor:
        model(torch.randn(3, D))
        monitor.step()
        monitor.step()
    first, second = lines(path, "step")
    assert (first["tokens"], second["tokens"]) == (3, 0)
    assert {first[key] for key in KEYS[3:]} == {second[key] for key in KEYS[3:]} == {None}
    assert not lines(path, "finding")


def collapse(model, on):
    """All tokens to the same experts, or to each as many."""
    with torch.no_grad():
        for moe in model.moes:
            moe.router.scorer.weight.zero_()
            moe.router.scorer.weight[:K, 0] = 9.0 if on else 0.0
            if not on:
                moe.router.scorer.weight.copy_(torch.randn(E, D, generator=generator(1)))


def test_a_finding_is_written_when_it_arises_and_again_after_it_was_gone(tmp_path):
    model, path = Net(), tmp_path / "m.jsonl"
    model.first.weight.data, model.first.bias.data = torch.eye(D), torch.zeros(D)
    for moe in model.moes:
        moe.experts.down.data.zero_()  # the same tokens for every layer
    x = batches(1)[0]
    x[:, 0] = 1.0
    current = []
    with Monitor(model, path, every=2) as monitor:
        for step, on in enumerate([True] * 4 + [False] * 4 + [True] * 4, 1):
            collapse(model, on)
            model(x)
            monitor.step(step)
            if step % 2 == 0:
                current.append({(item.kind, item.name) for item in monitor.findings})
    found = lines(path, "finding")
    want = {(kind, f"moes.{i}") for kind in ("collapse", "dead_experts") for i in range(DEPTH)}
    assert current == [want, want, set(), set(), want, want]
    assert {(line["step"], line["finding"]["kind"], line["finding"]["name"]) for line in found} == {
        (step, *item) for step in (2, 10) for item in want
    }
    assert len(found) == 2 * len(want)
    assert found[0]["finding"]["cure"]
    assert found[0]["finding"]["severity"] == "severe"
    [first, *_] = [line for line in lines(path, "step") if line["step"] == 2]
    assert (first["dead_experts"], first["max_vio_worst"]) == (DEPTH * (E - K), E / K - 1)


def test_no_data_does_not_make_a_finding_go_away(tmp_path):
    model, path = Net(), tmp_path / "m.jsonl"
    x = batches(1)[0]
    with Monitor(model, path, every=1) as monitor:
        for moe in model.moes:
            moe.router.scorer.weight.data.zero_()  # ties: the first experts
        for given in (x, x[:2], x):
            model(given)
            monitor.step()
    assert {line["step"] for line in lines(path, "finding")} == {1}
    assert monitor.findings


def test_a_run_that_goes_on_appends(tmp_path):
    path, whole = tmp_path / "m.jsonl", tmp_path / "whole.jsonl"
    model = Net()
    with Monitor(model, whole, every=2, layers=True) as monitor:
        for x in batches(8):
            model(x)
            monitor.step()
    with Monitor(model, path, every=2, layers=True) as monitor:
        for x in batches(8)[:6]:  # stopped after 6, with a checkpoint of step 4
            model(x)
            monitor.step()
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert len(lines(path, "step")) == 3  # the half line is no trouble
    with Monitor(model, path, every=2, layers=True) as monitor:
        for step, x in enumerate(batches(8)[4:], 5):
            model(x)
            monitor.step(step)
    assert path.read_text() == whole.read_text()


def test_unnumbered_steps_go_on_from_the_file(tmp_path):
    path, model = tmp_path / "m.jsonl", Net()
    for _ in range(2):
        with Monitor(model, path, every=2) as monitor:
            for x in batches(4):
                model(x)
                monitor.step()
    assert [line["step"] for line in lines(path, "step")] == [2, 4, 6, 8]
    assert len(lines(path, "start")) == 1


def test_lines_are_there_at_once_and_hooks_go_with_an_exception(tmp_path):
    path, model = tmp_path / "m.jsonl", Net()
    with pytest.raises(ZeroDivisionError), Monitor(model, path, every=2) as monitor:  # noqa: PT012
        for x in batches(3):
            model(x)
            monitor.step()
        assert [line["step"] for line in lines(path, "step")] == [2]
        raise ZeroDivisionError
    assert [line["step"] for line in lines(path, "step")] == [2, 3]
    assert not any(moe.sinks for moe in model.moes)


def test_it_works_beside_attach_and_inside_a_compiled_model(tmp_path):
    torch._dynamo.reset()
    model, twin = Net(make=lambda: Balanced(K)), None
    twin = Net(make=lambda: Balanced(K))
    twin.load_state_dict(model.state_dict())
    for net, told in ((model, torch.compile(model, backend="eager")), (twin, twin)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with Monitor(told, tmp_path / f"{told is twin}.jsonl", every=2, title="", layers=True) as monitor:
            attachment = attach(optimizer, net)
            for x in batches(4):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    told(x).square().mean().backward()
                optimizer.step()
                monitor.step()
            attachment.remove()
    assert (tmp_path / "True.jsonl").read_text() == (tmp_path / "False.jsonl").read_text()
    assert len(lines(tmp_path / "True.jsonl", "step")) == 2


def test_watching_changes_no_bit(tmp_path):
    model, twin = Net(False), Net(False)
    twin.load_state_dict(model.state_dict())
    with Monitor(model, tmp_path / "m.jsonl", every=1) as monitor:
        train(model, batches(4), monitor)

    class Nobody:
        def step(self):
            pass

    train(twin, batches(4), Nobody())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_errors_of_use(tmp_path, user_error):
    model, path = Net(), tmp_path / "m.jsonl"
    with user_error("every must be at least 1, got 0"):
        Monitor(model, every=0)
    with user_error("open it first"):
        Monitor(model).step()
    with user_error("holds no MoE layer"), Monitor(nn.Linear(2, 2)):
        pass
    with Monitor(model, path) as monitor:
        monitor.step(3)
        with user_error("step 3 comes after step 3"):
            monitor.step(3)
    with user_error("other MoE layers; choose another file"), Monitor(Net(experts=7), path) as monitor:
        monitor.step()
    assert len(lines(path, "step")) == 1
    path.write_text("hello\n")
    with user_error("line 1: not JSON"), Monitor(model, path):
        pass
    assert path.read_text() == "hello\n"
    assert not any(moe.sinks for moe in model.moes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "its first line is no start"),
        ('{"kind": "step", "step": 1}\n', "its first line is no start"),
        ('{"kind": "start", "format": 2}\n', "is of format 2"),
        ('{"kind": "start", "format": 1}\n{"kind"\n{"kind": "step", "step": 1}\n', "line 2: not JSON"),
        ('{"kind": "start", "format": 1}\n[1]\n', "line 2: not a line of a monitor"),
        ('{"kind": "start", "format": 1}\n{"kind": "step", "step": null}\n', "line 2: not a line of a monitor"),
    ],
)
def test_the_reader_refuses_other_files(tmp_path, user_error, text, says):
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    with user_error(says):
        read_monitor(path)
    with user_error("no such file"):
        read_monitor(tmp_path / "none.jsonl")


# ----------------------------------------------------------------------------------------------------------------------
# Two processes


def run_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    torch.manual_seed(shifted(0))
    model = Net(False)
    with Monitor(model, folder / "ranks.jsonl", every=2, layers=True) as monitor:
        for x in batches(5):
            model(x[rank::2]).sum().backward()
            monitor.step()
    (folder / f"{rank}.json").write_text(json.dumps(monitor.last))
    dist.destroy_process_group()


def test_two_ranks_write_what_one_process_writes(tmp_path):
    assert ends([start(__file__, rank, tmp_path) for rank in range(2)], seconds=300) == [0, 0]
    torch.manual_seed(shifted(0))
    model = Net(False)
    with Monitor(model, tmp_path / "one.jsonl", every=2, layers=True) as monitor:
        for x in batches(5):
            for rank in range(2):  # batches of the same size, so the same arithmetic
                model(x[rank::2]).sum().backward()
            monitor.step()
    ours, theirs = read_monitor(tmp_path / "ranks.jsonl"), read_monitor(tmp_path / "one.jsonl")
    assert [line["step"] for line in lines(tmp_path / "one.jsonl", "step")] == [2, 4, 5]
    assert len(ours) == len(theirs)
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() == other.keys()
        assert line == pytest.approx(other) if line["kind"] == "step" else line == other
    assert json.loads((tmp_path / "0.json").read_text()) == json.loads((tmp_path / "1.json").read_text())


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))


def test_a_router_that_is_no_number_is_found_and_nothing_else_said():
    model = Net()
    with torch.no_grad():
        model.moes[1].router.scorer.weight[0, 0] = float("nan")
    with Monitor(model, every=1) as monitor:
        for _ in range(2):
            model(torch.randn(100, D))
            monitor.step()
    assert [item.kind for item in monitor.findings] == ["not_finite"] * 2  # and in the layer that reads its output


def test_a_file_has_one_monitor_at_a_time(tmp_path, user_error):
    path, model = tmp_path / "monitor.jsonl", Net()
    late = Monitor(model, path, every=1)
    with late:  # entered before the first one begins
        with Monitor(model, path, every=1) as first:
            model(torch.randn(N, D))
            first.step()
            with user_error("another monitor", str(path)):
                late.step()
            with user_error("another monitor", str(path)), Monitor(model, path, every=1):
                pass
        late.step()
    assert [line["step"] for line in read_monitor(path) if line["kind"] == "step"] == [1, 2]

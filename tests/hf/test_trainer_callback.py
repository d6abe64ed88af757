"""The callback in transformers' Trainer gives the numbers of a plain loop, and those of the indices by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from grids import first_of

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from families import FAMILIES
from seeds import shifted
from torch import nn
from trainers import InOrder, batch_of, sequences
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
from spectralmoe.hf.training.callbacks import trainer_callback
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.instruments.monitor import Monitor
from spectralmoe.instruments.monitor_log import read_monitor

STEPS, BATCH, SEQUENCE, E, K, LAYERS = 6, 4, 24, 6, 2, 2


def mixtral():
    torch.manual_seed(shifted(0))
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=E,
        num_experts_per_tok=K,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config)


def samples(n=STEPS * BATCH):
    """Sequences with padding at the end, of 10 to 24 tokens."""
    return sequences(n, SEQUENCE, padded=True)


def trainer(model, folder, callbacks, **options):
    batch = {"per_device_train_batch_size": BATCH, "max_steps": STEPS, "logging_steps": 3}
    options = {**batch, "learning_rate": 1e-2, "lr_scheduler_type": "constant", **options}
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **options
    )
    return Trainer(model, arguments, train_dataset=InOrder(samples()), eval_dataset=samples(3), callbacks=callbacks)


class ByHand:
    """Counts of the indices that the routers returned, for real tokens, outside a recomputation and in training."""

    def __init__(self, model):
        self.counts = {}
        self.mask = None
        model.register_forward_pre_hook(self.see_mask, with_kwargs=True)
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self.count(name.removesuffix(".gate")))

    def see_mask(self, module, args, kwargs):
        self.mask = kwargs["attention_mask"].flatten().bool()

    def count(self, name):
        def hook(module, args, returned):
            if module.training and torch._C._current_graph_task_id() == -1:
                self.counts.setdefault(name, Counter()).update(returned[2][self.mask].flatten().tolist())

        return hook


def lines(path, kind):
    return [line for line in read_monitor(path) if line["kind"] == kind]


@pytest.mark.parametrize(
    "options",
    first_of(
        3,
        [
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {"eval_strategy": "steps", "eval_steps": 2},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            {"bf16": True},
            {},
        ],
    ),
    ids=["accumulation", "reentrant", "evaluation", "checkpointing", "bf16", "plain"],
)
def test_the_trainer_counts_every_real_token_once(tmp_path, options):
    model, path = mixtral(), tmp_path / "monitor.jsonl"
    hand, callback = ByHand(model), trainer_callback(path, every=STEPS, layers=True)
    made = trainer(model, tmp_path, [callback], **options)
    made.train()
    [step], [load] = lines(path, "step"), lines(path, "load")
    real = sum(int(item["attention_mask"].sum()) for item in samples())
    assert (step["step"], step["tokens"]) == (STEPS, real)
    assert load["shares"].keys() == hand.counts.keys()
    for name, counts in hand.counts.items():
        assert sum(counts.values()) == real * K
        assert load["shares"][name] == pytest.approx([counts[e] / (real * K) for e in range(E)], abs=1e-6)
    vios = [max(counts.values()) / (real * K / E) - 1 for counts in hand.counts.values()]
    assert step["max_vio"] == pytest.approx(sum(vios) / LAYERS)
    assert step["max_vio_worst"] == pytest.approx(max(vios))
    for name, module in model.named_modules():  # the embedding may have one of transformers' own
        assert not module._forward_pre_hooks or name == ""
        assert len(module._forward_hooks) == name.endswith("gate") or name == "model.embed_tokens"


def test_the_same_lines_as_a_plain_loop(tmp_path):
    model, twin = mixtral(), mixtral()
    callback = trainer_callback(tmp_path / "trainer.jsonl", every=2, layers=True)
    trainer(model, tmp_path, [callback], optim="sgd", max_grad_norm=0.0).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-2)
    twin.train()
    with Monitor(twin, tmp_path / "loop.jsonl", every=2, layers=True, watching=watch_transformers) as monitor:
        for i in range(STEPS):
            optimizer.zero_grad()
            twin(**batch_of(samples()[BATCH * i : BATCH * (i + 1)])).loss.backward()
            optimizer.step()
            monitor.step()
    ours, theirs = read_monitor(tmp_path / "trainer.jsonl"), read_monitor(tmp_path / "loop.jsonl")
    assert [line["step"] for line in lines(tmp_path / "loop.jsonl", "step")] == [2, 4, 6]
    assert len(ours) == len(theirs) == 7
    for line, other in zip(ours, theirs, strict=True):
        assert line == pytest.approx(other) if line["kind"] == "step" else line == other
    for one, two in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.full
def test_inside_a_compiled_model(tmp_path):
    torch._dynamo.reset()
    for name, options in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "eager"})):
        (tmp_path / name).mkdir()
        callback = trainer_callback(tmp_path / name / "m.jsonl", every=3, layers=True)
        trainer(mixtral(), tmp_path / name, [callback], **options).train()
    plain, compiled = (read_monitor(tmp_path / name / "m.jsonl") for name in ("plain", "compiled"))
    assert compiled == plain


class Listener(TrainerCallback):
    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs=None, **_):
        self.heard.append(dict(logs))


def test_the_keys_are_logged_with_the_loss(tmp_path):
    first, last = Listener(), type("Other", (Listener,), {})()
    callback = trainer_callback(tmp_path / "m.jsonl", every=1)
    made = trainer(mixtral(), tmp_path, [callback, last], eval_strategy="steps", eval_steps=2)
    made.callback_handler.callbacks.insert(0, first)
    made.train()
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    steps = [line for line in lines(tmp_path / "m.jsonl", "step") if line["step"] in (3, 6)]
    assert [entry["step"] for entry in logged] == [3, 6]
    keys = {"moe/tokens", "moe/max_vio", "moe/max_vio_worst", "moe/entropy", "moe/dead_experts", "moe/dropped"}
    for entry, heard, step in zip(logged, [item for item in last.heard if "loss" in item], steps, strict=True):
        found = {key: value for key, value in entry.items() if key.startswith("moe/")}
        assert found.keys() == keys | {"moe/near_tie"}
        assert found == {f"moe/{key}": value for key, value in step.items() if key not in ("kind", "step")}
        assert found.items() <= heard.items()
    assert not any(key.startswith("moe/") for heard in first.heard for key in heard)
    others = [entry for entry in made.state.log_history if "loss" not in entry]
    assert others
    assert not any(key.startswith("moe/") for entry in others for key in entry)


def test_no_hook_is_left_after_a_failure(tmp_path):
    model = mixtral()

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), trainer_callback(tmp_path / "m.jsonl", every=1) as callback:
        trainer(model, tmp_path, [callback, Fails()]).train()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [line["step"] for line in lines(tmp_path / "m.jsonl", "step")] == [1]


def test_a_trainer_that_goes_on_drops_the_steps_it_does_again(tmp_path):
    path, kinds = tmp_path / "m.jsonl", {"save_strategy": "steps"}
    arguments = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    arguments |= {"per_device_train_batch_size": BATCH, "max_steps": STEPS, "save_steps": 4, **kinds}

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 5 and not (tmp_path / "again").exists()
            return control

    for again in (False, True):
        made = Trainer(
            mixtral(),
            TrainingArguments(**arguments),
            train_dataset=samples(),
            callbacks=[trainer_callback(path, every=1), Stops()],
        )
        made.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4") if again else None)
        (tmp_path / "again").touch()
    assert [line["step"] for line in lines(path, "step")] == [1, 2, 3, 4, 5, 6]


def test_a_model_with_layers_of_ours(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))

        def forward(self, x):
            y = self.moe(x)
            return {"loss": y.square().mean(), "y": y}

    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", max_steps=3, disable_tqdm=True
    )
    data = [{"x": torch.randn(5, 8)} for _ in range(24)]
    callback = trainer_callback(tmp_path / "m.jsonl", every=3)
    made = Trainer(Own(), arguments, train_dataset=data, callbacks=[callback])
    made.train()
    [step] = lines(tmp_path / "m.jsonl", "step")
    assert step["tokens"] == 3 * 8 * 5
    assert not made.model.moe.sinks


def test_a_dense_model_is_refused(tmp_path, user_error):
    made = trainer(nn.Linear(2, 2), tmp_path, [trainer_callback(tmp_path / "m.jsonl")])
    with user_error("holds no"):
        made.train()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_is_watched_in_training(tmp_path, family):
    model, path = FAMILIES[family](), tmp_path / "m.jsonl"
    model.train()
    ids = torch.randint(3, 250, (3, 20))
    given = {"input_ids": ids, "attention_mask": (torch.arange(20) < torch.tensor([[20], [15], [9]])).long()}
    given |= {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with Monitor(model, path, every=2, layers=True, watching=watch_transformers) as monitor:
        for _ in range(2):
            model(**given).logits.float().square().mean().backward()
            monitor.step()
    [start], [step], [load] = (lines(path, kind) for kind in ("start", "step", "load"))
    assert step["tokens"] == 2 * (60 if model.config.is_encoder_decoder else 44)
    for layer in start["layers"]:
        assert sum(load["shares"][layer["name"]]) == pytest.approx(1, abs=1e-5)

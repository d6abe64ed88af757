"""Finetuning of a Hugging Face MoE: routers put in, terms added, experts adapted; scored on text that is held out."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from spectralmoe.diagnostics import holds_moe
from spectralmoe.errors import UserError
from spectralmoe.hf.language import TransformersModel, refuse_broken
from spectralmoe.hf.load import quiet
from spectralmoe.hf.routers.files import stock_tensors, write_routers
from spectralmoe.hf.stock_folder import refuse_unwritten
from spectralmoe.hf.training.added_terms import add_terms
from spectralmoe.hf.training.callbacks import attach_callback, trainer_callback
from spectralmoe.hf.training.corpus import Corpus, read_corpus
from spectralmoe.hf.training.frozen_prefix import after_prefix, check_prefix, without_prefix
from spectralmoe.hf.training.lora import add_lora
from spectralmoe.hf.training.quiet_trainer import follow_trainer, last_checkpoint, quiet_trainer
from spectralmoe.hf.training.resume import resume_safe
from spectralmoe.hf.training.trained_parts import chosen_layers, decoder_layers, train_only
from spectralmoe.instruments.findings import Finding
from spectralmoe.training.finetuning.routers import router_of, swap_to_row, terms_of
from spectralmoe.training.loop import Diverged, Progress
from spectralmoe.training.settings.finetuning import FinetuneSettings
from spectralmoe.training.tasks import Metric

__all__ = ["CHECKPOINTS", "MONITOR", "finetune"]

CHECKPOINTS, MONITOR, ADAPTER = "checkpoints", "monitor.jsonl", "adapter"
"""What a finetuning writes beside the model: folders and a file."""

BITS = Metric(
    "bits_per_byte", "bits per byte", "bits that the model needs for a byte of held-out text", "lower", digits=3
)


def finetune(
    loaded: TransformersModel,
    texts: Mapping[str, Sequence[str]],
    settings: FinetuneSettings,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train ``loaded.model`` in place, save it to ``out`` with what the monitor saw, and score it before and after.

    A training that was stopped goes on from its last checkpoint in ``out``, to the same weights.

    Args:
        texts: domain -> its documents, which are not empty.
        out: the folder of this run, see ``run_folder``.

    Returns:
        The history, as ``history.json`` has it: ``before`` and ``after``, bits per byte of held-out text; ``epochs``;
        ``agreement`` of the routers that were put in with the gates; ``findings`` of the monitor.

    Raises:
        UserError: a model or text that does not fit the settings; ``Diverged``.
    """
    model = loaded.model
    if model.config.is_encoder_decoder:
        raise UserError(f"{loaded.name} has an encoder; finetune trains models that continue a text")
    if model.dtype == torch.float16:
        raise UserError(f'{loaded.name} is in float16, in which steps underflow; set dtype to "bfloat16" or "float32"')
    config = model.config.get_text_config()  # of a multimodal model that of its decoder
    use_cache = config.use_cache
    corpus = read_corpus(loaded, texts, settings.length, share=settings.held_out, size=settings.domain_bytes)
    with quiet():
        with _late_layers(model, corpus, settings, progress) as corpus:
            log, findings = _train(loaded, corpus, settings, out, progress)
        config.use_cache = use_cache  # the Trainer turns it off
        model.eval().requires_grad_(True)
        with refuse_unwritten(out):
            model.save_pretrained(out, state_dict=stock_tensors(model))
            if holds_moe(model):
                write_routers(model, out)
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(out)
    return {**_history(loaded.name, log), "findings": [finding.as_json() for finding in findings]}


@contextmanager
def _late_layers(model: Any, corpus: Corpus, settings: FinetuneSettings, progress: Progress) -> Iterator[Corpus]:
    """Where only late layers are trained: the model without those before them, and the corpus as these leave it."""
    stack, first = decoder_layers(model, chosen_layers(model, settings.layers)[0])
    if settings.layers == "all" or first == 0:
        yield corpus
        return
    progress(f"running the {first} layers that are not trained", 0.0)
    check_prefix(model, stack, first, corpus.train)
    cached = corpus.map(lambda windows: after_prefix(model, stack, first, windows, settings.batch_size))
    with without_prefix(stack, first):
        yield cached


def _train(
    loaded: TransformersModel, corpus: Corpus, settings: FinetuneSettings, out: Path, progress: Progress
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The training itself; returns its log, an entry for each loss and each score, and what is wrong at its end."""
    model, rows, terms = loaded.model, settings.batch_size, terms_of(settings)
    checkpoint = last_checkpoint(out / CHECKPOINTS)
    first: dict[str, Any] = {}
    if checkpoint is None:
        with refuse_broken(loaded.name), torch.autocast(model.device.type, torch.bfloat16, enabled=settings.autocast):
            first["before"] = corpus.score(model, rows)
    torch.manual_seed(settings.seed)
    if (preset := router_of(settings)) is not None:
        progress(f"putting other routers into {loaded.name}", 0.0)
        first["agreement"] = swap_to_row(model, preset, corpus.train, rows).agreement
    train_only(model, settings.parts, settings.layers)
    trained = model if settings.lora is None else add_lora(model, chosen_layers(model, settings.layers), settings.lora)
    an_epoch = -(-len(corpus.train) // (rows * settings.accumulation))
    follow = follow_trainer(
        begin=lambda: first,
        every=an_epoch,
        score=lambda: {"held_out": corpus.score(trained, rows)},
        tell=_teller(loaded.name, progress),
    )
    with ExitStack() as stack:
        monitor = stack.enter_context(trainer_callback(out / MONITOR, every=settings.monitor_every, layers=True))
        bias = [attach_callback()] if holds_moe(model) else []
        trainer = quiet_trainer(
            trained,
            corpus.train,
            out / CHECKPOINTS,
            callbacks=[*bias, follow, monitor],
            max_steps=min(settings.steps or sys.maxsize, an_epoch * settings.epochs),
            use_cpu=model.device.type == "cpu",
            **_arguments(settings),
        )
        if terms:
            stack.enter_context(add_terms(trained, terms))
        resume_safe(trainer)
        trainer.train(resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None)
    if settings.lora is not None:
        trained.save_pretrained(out / ADAPTER)
        trained.merge_and_unload()
    return list(trainer.state.log_history), monitor.monitor.findings


def _arguments(settings: FinetuneSettings) -> dict[str, Any]:
    """The settings as ``TrainingArguments`` has them."""
    return {
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "bf16": settings.autocast,
        "save_steps": settings.checkpoint_every,
        "seed": settings.seed,
    }


def _teller(name: str, progress: Progress) -> Callable[[Any, float], None]:
    """Tells ``progress`` the loss of a step and the last score."""

    def tell(state: Any, loss: float) -> None:
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is no finite number at step {state.global_step}; start again in another folder with a "
                "smaller lr"
            )
        scores = [entry["held_out"]["all"] for entry in state.log_history if "held_out" in entry]
        text = f"finetuning {name}" + (f": {scores[-1]:.3f} bits per byte on held-out text" if scores else "")
        progress(text, state.global_step / state.max_steps, f"loss {loss:.3g}")

    return tell


def _history(name: str, log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``history.json``: the training by epochs."""
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    scores = {entry["step"]: entry["held_out"] for entry in log if "held_out" in entry}
    epochs = []
    for before, step in pairwise([0, *scores]):
        mean = sum(losses[number] for number in range(before + 1, step + 1)) / (step - before)
        epochs.append({"loss": mean, f"validation_{BITS.key}": scores[step]["all"]})
    after = scores[max(scores)]
    return {
        "title": f"finetuning of {name}",
        "metric": asdict(BITS),
        "steps": max(losses),
        "agreement": log[0].get("agreement"),
        "before": log[0]["before"],
        "after": after,
        f"test_{BITS.key}": after["all"],
        "epochs": epochs,
    }

"""Load a Hugging Face language model. transformers is imported here alone, inside functions."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from spectralmoe.checkpoints.tensor_files import stored_tensors
from spectralmoe.diagnostics.watch import Watched
from spectralmoe.errors import UserError, first_line
from spectralmoe.hf.assemble import assemble
from spectralmoe.hf.language import TransformersModel, stored_names
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.routers.files import ROUTERS, put_routers
from spectralmoe.hf.smollm2 import SMOLLM2, smollm2_file

__all__ = ["import_transformers", "load_stock", "load_transformers", "quiet"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "*.tiktoken",
)
_LISTED = 3
Admit = Callable[[Any], Sequence[Watched]]
_REPORT_LINE = re.compile(r"^(\S+)\s*\|\s*(?:MISSING|MISMATCH|CONVERSION)\b", re.MULTILINE)


def load_transformers(
    source: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    admit: Admit = find_layers,
) -> TransformersModel:
    """Load a language model with MoE, causal, sequence-to-sequence or multimodal, to be run on text.

    Weights come from safetensors, and no code of the model's author is run. The model's class in transformers chooses
    the implementation of attention and experts; the config does not, since it can name a kernel of the hub.

    Args:
        source: a folder, a name on the Hugging Face hub, or "smollm2" (see ``spectralmoe.hf.smollm2``).
        dtype: precision of the weights; None: as they were saved.
        admit: gives the MoE layers of the model, before its weights are read; raises for one that is not wanted.

    Raises:
        UserError: transformers is not installed; ``source`` is no model, holds no MoE, is of an unknown family, lacks
            tensors or is damaged. A dense model is refused before its weights are read.
    """
    tf = import_transformers()
    if source == SMOLLM2:
        return _load_smollm2(tf, dtype, device, admit)
    folder = _folder(source)
    with quiet() as log:
        config = _call(source, log, tf.AutoConfig.from_pretrained, source, trust_remote_code=False)
        config._attn_implementation = None  # sdpa, or eager for a family without it; of all parts of the config
        config._experts_implementation = "eager" if torch.device(device).type == "cpu" else None
        kind, empty = _empty_model(tf, source, config, log)
        layers = _admitted(source, empty, admit)
        stored = {} if folder is None else stored_tensors(folder)  # all files are there, and whole
        model, info = _read_weights(source, kind, config, log, dtype or "auto")
        tokenizer = _tokenizer(tf, source, folder, log)
    notes = ["no tokenizer in the model's folder: text is read as UTF-8 bytes"] if tokenizer is None else []
    if kind not in (tf.AutoModelForSeq2SeqLM, tf.AutoModelForCausalLM):
        notes.append("a multimodal model: it is run on text alone")
    if info["unexpected_keys"]:
        notes.append(f"tensors in the files that the model has no place for: {len(info['unexpected_keys'])}")
    name, model = source if folder is None else folder.resolve().name, model.to(device).eval()
    if folder is not None and (folder / ROUTERS).is_file():
        put_routers(model, folder)
        notes.append("the routers are those that save_swapped wrote beside the model")
    return TransformersModel(model, tokenizer, name, notes, stored_names(layers, stored))


def load_stock(folder: str | Path) -> Any:
    """The model in ``folder`` as plain transformers loads it, of the class that its config names, in evaluation mode.

    Raises:
        UserError: as ``load_transformers``; a config without the name of a class of transformers.
    """
    tf, source = import_transformers(), str(folder)
    _folder(source)
    with quiet() as log:
        config = _call(source, log, tf.AutoConfig.from_pretrained, source, trust_remote_code=False)
        config._attn_implementation = None  # as in load_transformers
        name = (config.architectures or [""])[0]
        kind = getattr(tf, name, None)
        if not (isinstance(kind, type) and issubclass(kind, tf.PreTrainedModel)):
            raise UserError(f"{source}: its config.json names the class {name!r}, which transformers does not have")
        return _read_weights(source, kind, config, log, "auto")[0].eval()


def _read_weights(source: str, kind: Any, config: Any, log: list[str], dtype: torch.dtype | str) -> tuple[Any, Any]:
    """The model and what transformers says of its loading; all tensors are there."""
    model, info = _call(
        source,
        log,
        kind.from_pretrained,
        source,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    _refuse(source, sorted(info["missing_keys"]))
    return model, info


def _load_smollm2(tf: Any, dtype: torch.dtype | None, device: str | torch.device, admit: Admit) -> TransformersModel:
    """The model of a GGUF file, its weights unpacked, as an ordinary one: transformers would not save what it reads."""
    file = smollm2_file()
    place, more = str(file.parent), {"gguf_file": file.name}
    with quiet() as log:
        config = _call(SMOLLM2, log, tf.AutoConfig.from_pretrained, place, **more)
        kind, empty = _empty_model(tf, SMOLLM2, config, log)
        _admitted(SMOLLM2, empty, admit)
        unpack = tf.GgufConfig(dequantize=True)
        read = _call(SMOLLM2, log, kind.from_pretrained, place, dtype=dtype, quantization_config=unpack, **more)
        model = assemble(kind, config, read.state_dict())
        model.generation_config = read.generation_config
        tokenizer = _call(SMOLLM2, log, tf.AutoTokenizer.from_pretrained, place, **more)
    return TransformersModel(model.to(device).eval(), tokenizer, SMOLLM2)


def _admitted(source: str, empty: Any, admit: Admit) -> Sequence[Watched]:
    """The MoE layers of a model without memory; errors name where it comes from."""
    try:
        return admit(empty)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _empty_model(tf: Any, source: str, config: Any, log: list[str]) -> tuple[Any, Any]:
    """The auto class that takes ``config`` as a model that reads text, and the model without memory."""
    plain = tf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else tf.AutoModelForCausalLM
    more = [getattr(tf, name, None) for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")]
    for kind in (plain, *filter(None, more)):
        try:
            with torch.device("meta"):
                return kind, _call(source, log, kind.from_config, config, trust_remote_code=False)
        except UserError as error:
            if "Unrecognized configuration class" not in str(error.__cause__):
                raise
    raise UserError(f"{source}: {config.model_type!r} is a family that transformers does not know as a language model")


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("this needs transformers; install it with 'pip install spectralmoe[hf]'") from error
    return transformers


def _folder(source: str) -> Path | None:
    """The local folder that ``source`` names; None for a name on the hub."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{source} is not a model folder: it holds no config.json")
        return path
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such model folder (a name on the hub has the form owner/model)")
    return None


def _tokenizer(tf: Any, source: str, folder: Path | None, log: list[str]) -> Any:
    if folder is not None and not any(next(folder.glob(name), None) for name in _TOKENIZER_FILES):
        return None
    return _call(source, log, tf.AutoTokenizer.from_pretrained, source, trust_remote_code=False)


def _call(source: str, log: list[str], function: Any, *args: Any, **options: Any) -> Any:
    """``function(...)`` of transformers with its many kinds of errors as one of ours, in one line."""
    try:
        return function(*args, **options)
    except Exception as error:
        _refuse(source, sorted(set(_REPORT_LINE.findall("\n".join(log)))))
        text = str(error)
        if "does not recognize this architecture" in text or "Unrecognized" in text or "contains custom code" in text:
            reason = "a model family that this version of transformers does not know; update it"
        elif "couldn't connect" in text or "is not a local folder" in text or "couldn't find them" in text:
            reason = "no such folder here, and no such model could be fetched from the hub; check the name, the network"
        else:
            reason = f"transformers could not load it: {first_line(error)}"
        raise UserError(f"{source}: {reason}") from error


def _refuse(source: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        raise UserError(
            f"{source}: tensors are missing or do not fit: {', '.join(names[:_LISTED])}{more}; the files are not whole "
            "or not of this config"
        )


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Sends messages of transformers into a list and progress bars nowhere; all is as before after the block."""
    from transformers.utils import logging as settings

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    bars = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()  # type: ignore[no-untyped-call]
    for logger in loggers:
        logger.handlers, logger.level, logger.propagate = [handler], logging.WARNING, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        for logger, values in zip(loggers, before, strict=True):
            logger.handlers, logger.level, logger.propagate = values
        if bars:
            settings.enable_progress_bar()  # type: ignore[no-untyped-call]

"""``spectralmoe prune``: a smaller Hugging Face model, by a saliency of its experts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.completion import one_among
from spectralmoe.cli.console import print_json, print_table, say, show_progress
from spectralmoe.cli.options import DeviceName, Json, Seed, TextFiles, load_stock_model, say_notes
from spectralmoe.errors import UserError, one_of

if TYPE_CHECKING:
    import torch

    from spectralmoe.hf import TransformersModel
    from spectralmoe.hf.shrinking.shrink import Plan
    from spectralmoe.hf.training.text_windows import Windows
    from spectralmoe.training.loop import Progress

__all__ = ["prune"]

_ROWS = 4  # windows of a batch
_HELD_OUT = 0.25
_BYTES = 8  # of a domain that are read, for each token that decides
_LISTED = 8


def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face MoE: folder or hub name.")],
    keep: Annotated[int, typer.Option(metavar="N", help="How many experts every layer keeps.")],
    text: TextFiles = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="New folder for the smaller model.")] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="reap|frequency|removal|random",
            help="What an expert is worth; reap by default, with --merge frequency.",
            autocompletion=one_among("reap", "frequency", "removal", "random"),
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Average the others into those that stay instead of leaving them out.")
    ] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many tokens of the text decide.")] = 8192,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window; 256 by default, if the model reads as many.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="auto|float32|bfloat16|float16", help="Precision to load the model in.")
    ] = "auto",
    device: DeviceName = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write MODEL with fewer experts in every layer to --out, as a folder that plain transformers loads.

    The text says which experts matter; bits per byte on a quarter of it, which is held out, say what that cost. Of a
    long text the beginning is read: 8 bytes for each of --tokens.

    Example: spectralmoe prune ./Mixtral-8x7B --keep 6 --by reap --text books --out runs/smaller

    Example: spectralmoe prune ./OLMoE-1B-7B --keep 32 --merge --text book.txt --out runs/merged
    """
    from spectralmoe.cli.inspect_text import DTYPES
    from spectralmoe.cli.texts import read_domains
    from spectralmoe.compression.saliency import SALIENCIES
    from spectralmoe.hf.shrinking.shrink import plan
    from spectralmoe.hf.stock_folder import make_new_folder, save_stock
    from spectralmoe.hf.training.corpus import read_corpus
    from spectralmoe.training.settings import pick_device

    by = by or ("frequency" if merge else "reap")
    for option, value, known in (("--by", by, SALIENCIES), ("--dtype", dtype, DTYPES)):
        if value not in known:
            raise one_of(option, value, known)
    if out is None:
        raise UserError("--out is missing: name a new folder for the smaller model")
    texts, notes = read_domains(text or ())
    make_new_folder(out)  # before a long run, not after it
    loaded = _load(model, DTYPES[dtype], pick_device(device))
    say_notes([*notes, *loaded.notes])
    with show_progress(quiet=json) as progress:
        corpus = read_corpus(loaded, texts, length, share=_HELD_OUT, size=_BYTES * tokens)
        batches = _batches(corpus.train, tokens, seed, progress)
        chosen = plan("prune", loaded.model, keep, by=by, calibration=batches, seed=seed, join=merge)
        progress("bits per byte before", 0.5)
        before = corpus.score(loaded.model, _ROWS)
        progress("making the smaller model", 0.7)
        small = chosen.smaller()
        progress("bits per byte after", 0.75)
        after = corpus.score(small, _ROWS)
        progress("writing the smaller model", 0.95)
        save_stock(small, loaded.tokenizer, out)
    result = {
        "model": model,
        "out": str(out),
        "experts": next(iter(chosen.layers.values())).num_experts,
        "keep": keep,
        "by": by,
        "merged": merge,
        "layers": [_layer(chosen, name, loaded) for name in chosen.layers],
        "parameters": {"before": loaded.model.num_parameters(), "after": small.num_parameters()},
        "bits_per_byte": {"before": before, "after": after},
    }
    if json:
        print_json(result)
    else:
        _show(result)


def _load(source: str, dtype: torch.dtype | None, device: torch.device) -> TransformersModel:
    """A decoder of transformers.

    Raises:
        UserError: it has an encoder; or as ``load_stock_model``.
    """
    cure = ", not of transformers; use spectralmoe.compression.prune"
    loaded = load_stock_model(source, cure, dtype=dtype, device=device)
    if loaded.model.config.is_encoder_decoder:
        raise UserError(f"{source} has an encoder, and prune reads text with decoders alone; use hf.prune_experts")
    return loaded


def _batches(windows: Windows, tokens: int, seed: int, progress: Progress) -> Iterator[torch.Tensor]:
    """Windows of the text as ids (B, S), drawn evenly from all of it, about ``tokens`` tokens."""
    import torch

    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    order = order[: -(-tokens // windows.inputs.shape[1])]
    for first in range(0, len(order), _ROWS):
        progress("running the text", 0.5 * first / len(order))
        yield windows.inputs[order[first : first + _ROWS]]


def _layer(chosen: Plan[Any], name: str, loaded: TransformersModel) -> dict[str, Any]:
    """The result for one layer, as JSON values."""
    clusters, counts = chosen.clusters[name], chosen.counts.get(name)  # nothing was run to keep all
    heads = [cluster.head for cluster in clusters]
    gone = [e for e in range(chosen.layers[name].num_experts) if e not in heads]
    saliency = chosen.saliency.get(name)
    return {
        "name": loaded.stored_names.get(name, name),
        "kept": heads,
        "gone": gone,
        "joined": [list(cluster.members) for cluster in clusters if len(cluster.members) > 1],
        "load_gone": 0.0 if counts is None else float(counts[gone].sum() / counts.sum().clamp_min(1)),
        "saliency": None if saliency is None else saliency.tolist(),
    }


def _show(result: Mapping[str, Any]) -> None:
    """Print the kept and the removed experts of each layer, and the cost."""
    rows = [
        [
            layer["name"],
            _listed([str(e) for e in layer["kept"]]),
            _listed(["+".join(map(str, group)) for group in layer["joined"]] or [str(e) for e in layer["gone"]]),
            f"{layer['load_gone']:.1%}",
        ]
        for layer in result["layers"]
    ]
    what = "merged" if result["merged"] else "left out"
    title = f"{result['keep']} of {result['experts']} experts stay in every layer (by {result['by']})"
    print_table(title, ["layer", "stay", what, "load of those that went"], rows)
    bits, parameters = result["bits_per_byte"], result["parameters"]
    scores = [
        [name, *(f"{value:.4f}" for value in (before, after)), f"{after - before:+.4f}"]
        for name, before in bits["before"].items()
        for after in [bits["after"][name]]
    ]
    print_table("bits per byte of held-out text", ["text", "before", "after", "change"], scores)
    typer.echo(f"parameters: {parameters['before']:,} before, {parameters['after']:,} after")
    out = shlex.quote(result["out"])
    say(f"written: {out}; look at it: spectralmoe inspect {out} --text FILE", indent="  ")


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:_LISTED]) + (f", ... ({len(words)})" if len(words) > _LISTED else "")

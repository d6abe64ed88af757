"""``spectralmoe upcycle``: a dense language model of Hugging Face becomes a stock mixture of experts."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.completion import one_among
from spectralmoe.cli.console import print_json, print_table, say, show_progress
from spectralmoe.cli.options import DeviceName, Json, Seed, TextFiles, load_stock_model, say_notes, split_numbers
from spectralmoe.errors import UserError, one_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["upcycle"]

_SAMPLE = "The gate of a mixture of experts reads every token, and sends it to those who know most about it."
_SAMPLE_TOKENS = 64


def upcycle(
    model: Annotated[
        str, typer.Argument(metavar="DENSE", help="A Llama, Mistral, Qwen2 or Qwen3: folder, hub name, or smollm2.")
    ],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="New folder for the MoE model.")] = None,
    experts: Annotated[int, typer.Option("--experts", metavar="E", help="Experts of a layer.")] = 4,
    k: Annotated[int, typer.Option("--k", metavar="K", help="Experts a token.")] = 2,
    target: Annotated[
        str,
        typer.Option(
            metavar="auto|mixtral|qwen3_moe|qwen2_moe|glm4_moe",
            help="What it becomes; auto: the first that fits.",
            autocompletion=one_among("auto", "mixtral", "qwen3_moe", "qwen2_moe", "glm4_moe"),
        ),
    ] = "auto",
    method: Annotated[
        str,
        typer.Option(
            metavar="copy|drop|noise|virtual",
            help="How experts are made of the MLP; take drop or noise if you train them.",
            autocompletion=one_among("copy", "drop", "noise", "virtual"),
        ),
    ] = "copy",
    ratio: Annotated[
        float | None, typer.Option(metavar="R", help="Share that drop redraws (0.5), size of the noise (0.1).")
    ] = None,
    granularity: Annotated[
        int | None, typer.Option(metavar="G", help="Shards of a copy with virtual; K by default.")
    ] = None,
    layers: Annotated[
        str, typer.Option(metavar="all|lastN|1,3", help="Layers that get experts; the others stay dense.")
    ] = "all",
    router: Annotated[
        str,
        typer.Option(
            metavar="random|prompts|principal",
            help="How routers start; the last two read --text.",
            autocompletion=one_among("random", "prompts", "principal"),
        ),
    ] = "random",
    text: TextFiles = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many tokens of the text are read.")] = 8192,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="auto|float32|bfloat16|float16", help="Precision to load the model in.")
    ] = "auto",
    device: DeviceName = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Turn the language model DENSE into a mixture of experts, and write it to --out, with DENSE's tokenizer, for plain
    transformers to load.

    With --method copy or virtual it computes what DENSE did, until it is trained. With --router prompts the router row
    of each expert starts from one domain of the text.

    Example: spectralmoe upcycle ./Llama-3.2-1B --experts 8 --method drop --out runs/moe

    Example: spectralmoe upcycle smollm2 --layers last4 --router prompts --text texts --out runs/moe
    """
    from spectralmoe.cli.inspect_text import DTYPES
    from spectralmoe.cli.texts import read_domains
    from spectralmoe.hf import encode
    from spectralmoe.hf.stock_folder import make_new_folder, save_stock
    from spectralmoe.hf.upcycling import upcycle as run_upcycling
    from spectralmoe.hf.upcycling.dense import admit_dense
    from spectralmoe.hf.upcycling.plan import router_notes
    from spectralmoe.training.settings import pick_device

    if dtype not in DTYPES:
        raise one_of("--dtype", dtype, DTYPES)
    if out is None:
        raise UserError("--out is missing: name a new folder for the MoE model")
    if text and router == "random":
        raise UserError("--text is read by --router prompts and --router principal; name one, or leave out --text")
    texts, notes = read_domains(text) if text else ({}, [])
    make_new_folder(out)  # before a long run, not after it
    with show_progress(quiet=json) as progress:
        progress(f"loading {model}", 0.0)
        cure = "; upcycle makes experts of models of transformers"
        loaded = load_stock_model(model, cure, dtype=DTYPES[dtype], device=pick_device(device), admit=admit_dense)
        say_notes([*notes, *loaded.notes])
        share = -(-tokens // max(len(texts), 1))
        calibration = [encode(loaded, "\n".join(documents), share) for documents in texts.values()]
        sample = encode(loaded, _SAMPLE, _SAMPLE_TOKENS)[0]
        expected = _logits(loaded.model, sample)
        progress("making experts", 0.4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said at the end
            moe = run_upcycling(
                loaded.model,
                target=target,
                experts=experts,
                k=k,
                method=method,
                ratio=ratio,
                granularity=granularity,
                layers=layers if layers.startswith(("all", "last")) else split_numbers("--layers", layers),
                router=router,
                calibration=calibration or None,
                seed=seed,
            )
        if moe.device.type == "cpu":  # as load_transformers: the grouped kernel refuses some widths there
            moe.set_experts_implementation("eager")
        progress("writing", 0.7)
        save_stock(moe, loaded.tokenizer, out)
    result = {
        "model": model,
        "out": str(out),
        "class": type(moe).__name__,
        "layers": [number for number, layer in enumerate(moe.model.layers) if hasattr(layer.mlp, "experts")],
        "experts": experts,
        "k": k,
        "method": method,
        "router": router,
        "parameters": {"dense": loaded.model.num_parameters(), "all": moe.num_parameters(), "active": _active(moe, k)},
        "logits": {
            "difference": float((_logits(moe, sample) - expected).abs().max()),
            "largest": float(expected.abs().max()),
        },
        "notes": router_notes(method, k),
    }
    if json:
        print_json(result)
    else:
        _show(result)


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    import torch

    with torch.no_grad():
        logits: Tensor = model(**batch, use_cache=False).logits.float()
    return logits


def _active(moe: Any, k: int) -> int:
    """The number of parameters that are used for a token."""
    experts = [layer.mlp.experts for layer in moe.model.layers if hasattr(layer.mlp, "experts")]
    idle = sum(
        value.numel() * (bank.num_experts - k) // bank.num_experts for bank in experts for value in bank.parameters()
    )
    return int(moe.num_parameters()) - int(idle)


def _show(result: Mapping[str, Any]) -> None:
    """Print the sizes of the new model, and how far its outputs are from the dense model's."""
    parameters, logits = result["parameters"], result["logits"]
    numbers: Sequence[Sequence[str]] = [
        ["parameters", f"{parameters['dense']:,}", f"{parameters['all']:,}"],
        ["of them active for a token", f"{parameters['dense']:,}", f"{parameters['active']:,}"],
    ]
    made = f"{result['class']}, {result['experts']} experts in {len(result['layers'])} layers, {result['k']} a token"
    say(made, indent="  ")
    print_table("", ["", "dense", "MoE"], numbers)
    typer.echo(f"logits of a sample text: at most {logits['difference']:.2g} apart, of up to {logits['largest']:.3g}")
    for note in result["notes"]:
        say(f"note: {note}", indent="  ")
    out = shlex.quote(result["out"])
    say(f"written: {out}; train it: spectralmoe finetune {out} --text FILE --out DIR", indent="  ")

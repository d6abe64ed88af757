"""Part (d): what the experts hold, as one picture: the patches with most energy on each expert's own side."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import torch
from measure import SHARED_IMAGES, fit_row, tokens_of
from PIL import Image
from rows import Setting
from sizes import EXPERTS, PATCH, Sizes
from torch import Tensor

from spectralmoe import PrincipalScorer, record
from spectralmoe.data.image_data import ImageData, load_data
from spectralmoe.experiments.cards import Desk
from spectralmoe.files import write_text
from spectralmoe.tape import Record

SHOWN, PIXELS, GAP, LABEL, TOP = 10, 56, 6, 310, 70


def draw_holdings(out: Path, desk: Desk, *, sizes: Sizes) -> None:
    """Train one network, run test images through it, draw both MoE layers as ``experts.svg``, unless it is there."""
    if (out / "experts.svg").exists():
        return
    data = load_data(sizes.dataset).subset(sizes.ablation_size)
    setting = Setting(*desk.tuned["tuning"]["EMoE"]["setting"])
    model = fit_row("EMoE", setting, data, sizes.ablation_epochs, 0)[0].eval()
    images, labels = data.test.images[: 2 * SHARED_IMAGES], data.test.labels[: 2 * SHARED_IMAGES]
    with torch.no_grad(), record(model, keep=("input",)) as tape:
        model(images)
    width = LABEL + SHOWN * (PIXELS + GAP) + GAP
    column = [_layer(item, images, labels, data, index * (width + 20)) for index, item in enumerate(tape)]
    height = TOP + EXPERTS * (PIXELS + GAP)
    title = "What the experts hold: the patches (framed) with most energy on the side that each expert owns"
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(column) * (width + 20)} {height}" '
        f'font-family="sans-serif" font-size="13" role="img" aria-label="{escape(title)}">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="24" font-size="17">{escape(title)}</text>',
        *(line for lines in column for line in lines),
        "</svg>",
    ]
    write_text(out / "experts.svg", "\n".join(svg) + "\n")


def _layer(item: Record, images: Tensor, labels: Tensor, data: ImageData, left: float) -> list[str]:
    """One layer as a column: an expert a row, with its share of the tokens and its commonest classes."""
    scorer = item.scorer
    assert isinstance(scorer, PrincipalScorer)
    x, chosen = tokens_of(item), item.routing.indices[:, 0]
    energies = scorer.energies(x).detach() @ scorer.owners
    patches = len(x) // len(images)
    lines = [f'<text x="{left + 10}" y="{TOP - 22}" font-weight="bold">layer {escape(item.name)}</text>']
    for e in range(EXPERTS):
        y = TOP - 10 + e * (PIXELS + GAP)
        mine = (chosen == e).nonzero().flatten()
        counts = labels[mine // patches].bincount(minlength=data.num_classes)
        common = counts.topk(2).indices.tolist()
        named = ", ".join(f"{data.classes[c]} {100 * counts[c] / max(len(mine), 1):.0f}%" for c in common)
        side = f"side {'+-'[e % 2]} of direction {e // 2 + 1}: {100 * len(mine) / len(x):.0f}% of tokens"
        lines.append(f'<text x="{left + 10}" y="{y + 22}">expert {e}, {side}</text>')
        lines.append(f'<text x="{left + 10}" y="{y + 40}" fill="#555">{escape(named)}</text>')
        for place, token in enumerate(_best(energies[:, e], patches)):
            lines.append(
                _picture(images[token // patches, 0], token % patches, left + LABEL + place * (PIXELS + GAP), y)
            )
    return lines


def _best(energy: Tensor, patches: int) -> list[int]:
    """The tokens with most energy, one an image."""
    best, at = energy.view(-1, patches).max(-1)
    return [int(image * patches + at[image]) for image in best.topk(SHOWN).indices]


def _picture(image: Tensor, patch: int, x: float, y: float) -> str:
    """The image as a PNG inside the drawing, its patch framed."""
    buffer = io.BytesIO()
    Image.fromarray((255 - 255 * image).byte().numpy()).save(buffer, "PNG")
    code = base64.b64encode(buffer.getvalue()).decode()
    side = PIXELS * PATCH / image.shape[1]
    row, column = divmod(patch, image.shape[1] // PATCH)
    frame = f'<rect x="{x + column * side}" y="{y + row * side}" width="{side}" height="{side}"'
    return (
        f'<image x="{x}" y="{y}" width="{PIXELS}" height="{PIXELS}" href="data:image/png;base64,{code}"/>'
        f'{frame} fill="none" stroke="#c00" stroke-width="2"/>'
    )

"""Grey images side by side, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from spectralmoe.errors import UserError
from spectralmoe.files import write_whole

__all__ = ["write_images"]

Image = Sequence[Sequence[float]]
_SIDE, _HEAD = 0.9, 0.3  # inches


def write_images(stem: Path, rows: Sequence[str], columns: Mapping[str, Sequence[Image]]) -> list[Path]:
    """Draw one line of images for each of ``rows`` and write ``STEM.png``; returns its path.

    Args:
        columns: title -> an image for each row, values from 0 (black) to 1 (white).

    Raises:
        UserError: matplotlib is not installed; the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'spectralmoe[plots]', then the same command") from error
    figure = Figure(figsize=(_SIDE * len(columns) + _HEAD, _SIDE * len(rows) + _HEAD), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for place, (title, images) in enumerate(columns.items()):
        grid[0][place].set_title(title, fontsize=7)
        for line, image in zip(grid, images, strict=True):
            line[place].imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            line[place].set(xticks=[], yticks=[])
    for line, name in zip(grid, rows, strict=True):
        line[0].set_ylabel(name, fontsize=7)
    path = stem.with_name(f"{stem.name}.png")
    write_whole(path, partial(figure.savefig, format="png", dpi=200))
    return [path]

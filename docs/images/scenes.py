"""Draws the scenes of the picture in docs/restoration.md: walls, windows, hills and wires, seeded, of no photograph.

python docs/images/scenes.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE, SCENES = 224, 30


def scene(draw: np.random.Generator) -> Image.Image:
    """A sky, hills in front of it, a house with windows, a pole with wires, and grain over all."""
    sky = np.linspace(0.9, draw.uniform(0.5, 0.75), SIDE)[:, None] * np.ones((1, SIDE))
    across = np.arange(SIDE)
    for shade in (0.55, 0.4, 0.3):
        wave = sum(draw.uniform(4, 14) * np.sin(across / draw.uniform(12, 60) + draw.uniform(0, 6)) for _ in range(3))
        edge = draw.uniform(0.45, 0.9) * SIDE + wave
        texture = shade + 0.08 * draw.standard_normal((SIDE, SIDE)).cumsum(1) / 12
        sky = np.where(np.arange(SIDE)[:, None] > edge, texture, sky)
    image = Image.fromarray((255 * sky.clip(0, 1)).astype("uint8"))
    pen = ImageDraw.Draw(image)
    left, top = draw.integers(10, SIDE // 2), draw.integers(SIDE // 4, SIDE // 2)
    width, height = draw.integers(60, 110), draw.integers(60, 110)
    pen.rectangle((left, top, left + width, top + height), fill=int(draw.integers(120, 230)))
    pen.polygon(
        ((left - 8, top), (left + width + 8, top), (left + width // 2, top - 40)), fill=int(draw.integers(30, 90))
    )
    for row in range(top + 8, top + height - 14, 20):
        for column in range(left + 8, left + width - 12, 18):
            pen.rectangle((column, row, column + 9, row + 12), fill=int(draw.integers(10, 70)))
    pole = int(draw.integers(SIDE // 2, SIDE - 10))
    pen.line((pole, SIDE // 5, pole, SIDE), fill=25, width=4)
    for sag in range(4):
        pen.line((0, SIDE // 5 + 9 * sag, pole, SIDE // 5 + 6 * sag, SIDE, SIDE // 4 + 12 * sag), fill=45)
    return image


def main(folder: Path) -> None:
    """Write all scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for number in range(SCENES):
        scene(draw).save(folder / f"scene{number:02}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""An image as the bytes of a PNG file."""

from __future__ import annotations

import struct
import zlib

import torch
from torch import Tensor

from spectralmoe.errors import UserError

__all__ = ["png"]


def png(image: Tensor) -> bytes:
    """An image (C, H, W) with values in [0, 1], C = 1 (grey) or 3 (RGB), as the bytes of a PNG file.

    Raises:
        UserError: another shape.

    >>> png(torch.zeros(1, 2, 2))[:4]
    b'\\x89PNG'
    """
    if image.dim() != 3 or len(image) not in (1, 3):
        raise UserError(f"a picture needs images of 1 or 3 channels, (C, H, W), not {tuple(image.shape)}")
    pixels = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.contiguous().numpy().tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

"""PNG files taken apart by hand."""

import struct
import zlib

import pytest
import torch
from seeds import generator

from spectralmoe.draw.png import png


@pytest.mark.parametrize("channels", [1, 3])
def test_png(channels):
    image = torch.rand(channels, 5, 7, generator=generator(channels))
    raw, chunks = png(image), {}
    at = 8
    while at < len(raw):
        (length,) = struct.unpack(">I", raw[at : at + 4])
        kind, body = raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]
        assert struct.unpack(">I", raw[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        chunks[kind], at = body, at + 12 + length
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (7, 5, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = torch.tensor(list(zlib.decompress(chunks[b"IDAT"]))).view(5, 1 + 7 * channels)
    assert rows[:, 0].tolist() == [0] * 5
    assert torch.equal(rows[:, 1:].view(5, 7, channels), (image * 255).round().long().permute(1, 2, 0))

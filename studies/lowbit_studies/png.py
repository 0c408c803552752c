"""Pictures as PNG files, without any imaging library."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from lowbit_attention import InvalidArgumentError

_GAP = 2


def grid(rows: list[Tensor], zoom: int = 1) -> Tensor:
    """Rows of pictures ``[B, 3, H, W]`` in −1…1 as one uint8 picture ``[rows · H, B · W, 3]`` with white gaps.

    >>> grid([torch.zeros(4, 3, 8, 8)] * 2, zoom=2).shape
    torch.Size([38, 74, 3])
    """
    white = 1.0
    lines = []
    for pictures in rows:
        big = pictures.float().cpu().repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
        framed = torch.nn.functional.pad(big, (_GAP, 0, _GAP, 0), value=white)
        lines.append(torch.cat(list(framed), dim=2))
    whole = torch.nn.functional.pad(torch.cat(lines, dim=1), (0, _GAP, 0, _GAP), value=white)
    return ((whole.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)


def write_png(path: Path, pixels: Tensor) -> None:
    """Write an RGB picture, uint8 ``[H, W, 3]``.

    Raises:
        InvalidArgumentError: another shape or dtype.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise InvalidArgumentError(f"uint8 [H, W, 3] expected, got {pixels.dtype} {tuple(pixels.shape)}")
    height, width, _ = pixels.shape
    unfiltered = torch.nn.functional.pad(pixels.cpu().reshape(height, -1), (1, 0))  # filter type 0 before every line

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, no interlace
    body = zlib.compress(bytes(unfiltered.flatten().tolist()), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))

"""How packed tiles lie in memory (csrc/tile/swizzle.cuh), in PyTorch: for tests, and for looking inside."""

from __future__ import annotations

import torch
from torch import Tensor

from .instances import WGMMA_FORMAT, PackFormat

TOKEN_ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
"""Position p of every 16 tokens of a packed V row holds token ``TOKEN_ORDER[p]``: the order of P's registers."""

_CHUNK = 16


def swizzled_offsets(rows: int, row_bytes: int) -> Tensor:
    """Byte offset of every 16-byte chunk of a tile, int64 ``[rows, row_bytes / 16]``."""
    row = torch.arange(rows, dtype=torch.int64, device="cpu")[:, None]
    chunk = torch.arange(row_bytes // _CHUNK, dtype=torch.int64, device="cpu")
    moved = chunk ^ (row * min(row_bytes, 128) // 128 % (min(row_bytes, 128) // _CHUNK))
    return row * row_bytes + moved * _CHUNK


def unswizzle(tiles: Tensor, rows: int, row_bytes: int) -> Tensor:
    """Tiles ``[..., rows · row_bytes]`` of bytes to their rows ``[..., rows, row_bytes]``."""
    byte = torch.arange(_CHUNK, dtype=torch.int64, device="cpu")
    offsets = swizzled_offsets(rows, row_bytes).flatten()[:, None] + byte
    flat = tiles[..., offsets.flatten().to(tiles.device)]
    return flat.reshape(*tiles.shape[:-1], rows, row_bytes)


def unpack_keys(k_tiles: Tensor, head_dim: int, form: PackFormat = WGMMA_FORMAT) -> Tensor:
    """Packed K, uint8 ``[..., T, bytes of a tile]``, to INT8 ``[..., T · keys, head_dim]``."""
    rows = unswizzle(k_tiles, form.tile_keys, head_dim * form.k_lanes // 8).view(torch.int8)
    if form.k_lanes == 4:  # the first of two numbers is the low nibble
        rows = torch.stack((rows << 4 >> 4, rows >> 4), dim=-1).flatten(-2)
    return rows.flatten(-3, -2)


def unpack_values(v_tiles: Tensor, head_dim: int, form: PackFormat = WGMMA_FORMAT) -> Tensor:
    """Packed V, uint8 ``[..., T, bytes of a tile]``, to E4M3 or FP16 ``[..., T · keys, head_dim]``."""
    if form.v_half:
        return unswizzle(v_tiles, form.tile_keys, 2 * head_dim).view(torch.float16).flatten(-3, -2)
    rows = unswizzle(v_tiles, head_dim, form.tile_keys)  # [..., T, head_dim, positions]
    place = torch.empty(_CHUNK, dtype=torch.int64, device="cpu")
    place[list(TOKEN_ORDER)] = torch.arange(_CHUNK, dtype=torch.int64, device="cpu")  # token → position
    groups = rows.reshape(*rows.shape[:-1], -1, _CHUNK)[..., place.to(rows.device)]
    tokens = groups.flatten(-2).transpose(-1, -2).contiguous()
    return tokens.flatten(-3, -2).view(torch.float8_e4m3fn)

"""K and V to tiles that attention kernels load: the host side of csrc/kernels/pack.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..recipe import Recipe
from ..reference.quantize import Means
from .instances import TILE_KEYS, pack_instance, padded_head_dim
from .launch import Arguments, Kernel, load
from .layout import unpack_keys, unpack_values

_STATISTICS_THREADS, _PACK_THREADS = 256, 128
_LEAST_SPLIT = 256
"""Tokens below which a head's statistics are not split further."""
_MOST_SPLITS = 32
_BLOCKS = 1056
"""Thread blocks that fill the card: 8 on each of 132 multiprocessors."""
_ALIGNMENT = 256

ARGUMENTS = Arguments("P3q P3q 8P f 10i 0q".replace(" ", ""))
"""``PackArgs``."""


@dataclass(frozen=True)
class PackPlan:
    """Everything about packing K ``[B, Hkv, Nk, D]`` and V ``[B, Hkv, Nk, Dv]`` that their addresses do not change.

    Byte offsets are those of the parts of one workspace, each a multiple of 256.
    """

    kv_heads: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    dim: int
    tiles: int
    splits: int
    tokens_a_split: int
    tiles_a_block: int
    statistics_grid: tuple[int, int, int]
    pack_grid: tuple[int, int, int]
    k_tiles: int
    v_tiles: int
    k_scales: int
    k_mean: int
    k_largest_scale: int
    v_scale: int
    v_mean: int
    partials: int
    workspace_bytes: int
    recipe: Recipe

    @classmethod
    def of(cls, batch: int, kv_heads: int, kv_len: int, head_dim: int, v_head_dim: int, recipe: Recipe) -> PackPlan:
        """The plan for these sizes."""
        dim = padded_head_dim(max(head_dim, v_head_dim))
        if dim is None:
            raise ValueError(f"head_dim {max(head_dim, v_head_dim)} has no packed form")
        heads = batch * kv_heads
        tiles = -(-kv_len // TILE_KEYS)
        wanted = min(-(-_BLOCKS // (2 * heads)), _MOST_SPLITS, max(1, kv_len // _LEAST_SPLIT))
        at_once = _STATISTICS_THREADS * 8 // dim * 8  # tokens whose loads a block has in flight
        tokens_a_split = -(-kv_len // (wanted * at_once)) * at_once
        splits = -(-kv_len // tokens_a_split)
        tiles_a_block = _power_of_two_below(max(128 // dim, min(8, heads * tiles // _BLOCKS)))
        blocks = -(-tiles // tiles_a_block)
        tile_bytes = TILE_KEYS * dim
        sizes = {
            "k_tiles": heads * tiles * tile_bytes,
            "v_tiles": heads * tiles * tile_bytes,
            "k_scales": heads * tiles * 4 * 4,
            "k_mean": heads * dim * 4,
            "k_largest_scale": heads * 4,
            "v_scale": heads * dim * 4,
            "v_mean": heads * dim * 4,
            "partials": 2 * heads * splits * 3 * dim * 4,
        }
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = end
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        return cls(
            kv_heads=kv_heads,
            kv_len=kv_len,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            dim=dim,
            tiles=tiles,
            splits=splits,
            tokens_a_split=tokens_a_split,
            tiles_a_block=tiles_a_block,
            statistics_grid=(splits, heads, 2),
            pack_grid=(blocks, heads, 2),
            workspace_bytes=end,
            recipe=recipe,
            **offsets,
        )


def _power_of_two_below(x: int) -> int:
    return 1 << (x.bit_length() - 1)


class Packer:
    """The packing kernels for one input type and padded head dimension."""

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        instance = pack_instance(head_dim, dtype, "sm_90a")
        self._statistics: Kernel = load(instance, "statistics", _STATISTICS_THREADS)
        self._pack: Kernel = load(instance, "pack", _PACK_THREADS)

    def __call__(self, k: Tensor, v: Tensor, plan: PackPlan, workspace: int, device: int) -> None:
        """Launch both kernels; ``workspace`` is the address of ``plan.workspace_bytes`` bytes."""
        k_batch, k_head, k_token, _ = k.stride()
        v_batch, v_head, v_token, _ = v.stride()
        arguments = ARGUMENTS.pointer(
            (
                k.data_ptr(), k_batch, k_head, k_token,
                v.data_ptr(), v_batch, v_head, v_token,
                workspace + plan.partials,
                workspace + plan.k_tiles, workspace + plan.k_scales, workspace + plan.v_tiles,
                workspace + plan.k_mean, workspace + plan.k_largest_scale,
                workspace + plan.v_scale, workspace + plan.v_mean,
                plan.recipe.v_max,
                plan.kv_heads, plan.kv_len, plan.head_dim, plan.v_head_dim,
                plan.splits, plan.tokens_a_split, plan.tiles, plan.tiles_a_block,
                plan.recipe.smooth_k, plan.recipe.smooth_v,
            )
        )  # fmt: skip
        self._statistics(plan.statistics_grid, device, arguments)
        self._pack(plan.pack_grid, device, arguments, overlaps=True)


@lru_cache(maxsize=64)
def packer(head_dim: int, dtype: torch.dtype, device: int) -> Packer:
    """The packing kernels, loaded once a device."""
    del device
    return Packer(head_dim, dtype)


def loadable(x: Tensor) -> Tensor:
    """``x`` if kernels can load it as it is, else a copy: channels next to each other, tokens at 16-byte addresses.

    The copy's channels are padded with zeros to a multiple of 8.
    """
    b, h, n, c = x.stride()
    if c == 1 and x.shape[3] % 8 == 0 and not (x.data_ptr() | (b | h | n) * x.element_size()) & 15:
        return x
    return torch.nn.functional.pad(x, (0, -x.shape[3] % 8)).contiguous()


@dataclass(frozen=True)
class PackedTiles:
    """Packed K and V on the device.

    k ``[B, Hkv, Nk, D]`` INT8, k_scale ``[B, Hkv, 4 · T]`` (four a tile of 128 keys), v ``[B, Hkv, Nk, Dv]`` E4M3,
    v_scale ``[B, Hkv, Dv]``, means ``[B, Hkv, D or Dv]``.
    """

    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    k_mean: Tensor
    v_mean: Tensor
    padding_is_zero: bool

    def means(self) -> Means:
        """The kernel's means, as the reference takes them."""
        return Means(k=self.k_mean, v=self.v_mean)


def pack_kv(k: Tensor, v: Tensor, recipe: Recipe) -> PackedTiles:
    """Pack ``[B, Hkv, Nk, D]`` tensors with the kernels and read the result back into plain order (for tests)."""
    batch, heads, length = k.shape[:3]
    head_dim, v_head_dim = k.shape[3], v.shape[3]
    k, v = loadable(k), loadable(v)
    plan = PackPlan.of(batch, heads, length, k.shape[3], v.shape[3], recipe)
    workspace = torch.full((plan.workspace_bytes,), 0xFF, dtype=torch.uint8, device=k.device)
    with torch.cuda.device(k.device):
        packer(plan.dim, k.dtype, k.device.index)(k, v, plan, workspace.data_ptr(), k.device.index)

    def part(offset: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        return workspace[offset : offset + count].view(dtype).reshape(batch, heads, *shape[1:])

    pairs, tile_bytes = batch * heads, TILE_KEYS * plan.dim
    keys = unpack_keys(part(plan.k_tiles, pairs, plan.tiles, tile_bytes, dtype=torch.uint8), plan.dim)
    values = unpack_values(part(plan.v_tiles, pairs, plan.tiles, tile_bytes, dtype=torch.uint8), plan.dim).float()
    rest = (keys[..., length:, :], keys[..., head_dim:], values[..., length:, :], values[..., v_head_dim:])
    return PackedTiles(
        k=keys[:, :, :length, :head_dim],
        k_scale=part(plan.k_scales, pairs, plan.tiles * 4),
        v=values[:, :, :length, :v_head_dim],
        v_scale=part(plan.v_scale, pairs, plan.dim)[..., :v_head_dim],
        k_mean=part(plan.k_mean, pairs, plan.dim)[..., :head_dim],
        v_mean=part(plan.v_mean, pairs, plan.dim)[..., :v_head_dim],
        padding_is_zero=not any(bool(x.any()) for x in rest),
    )

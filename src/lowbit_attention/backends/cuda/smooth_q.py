"""What smoothed Q takes beside packing and attention: Q's means and ΔS (csrc/pack/smooth_q.cu)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...call.masks import LOG2E
from ...call.request import Request
from .arguments import Arguments, SmoothArgs
from .instances import MMA_GEOMETRY, MaskForm, MmaConfig, packed_mask, smooth_q_instance
from .kernel import PackedKV, sizes
from .launch import Kernel, load
from .packing import MOST_ROWS, PackPlan, aligned

_MOST_DELTA_BYTES = 64 << 20
"""ΔS held at once, if a quarter of packed K and V is not more."""
_DELTA_TILES = 32
"""Query tiles of a block of ``delta_s`` (kTiles)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SmoothQ:
    """The launches of one kind of call: Q's means once, then ΔS a chunk at a time.

    A chunk is ``heads_a_chunk`` of the ``heads`` (of all batches), and ``levels_a_chunk`` of the ``q_blocks`` blocks of
    rows of each, which have ``groups`` query tiles; ``query_tiles``: of a head. In the scratch memory Q's means come
    first, then, from ``delta`` on, a chunk's ΔS.
    """

    query_means: Kernel
    delta_s: Kernel
    arguments: Arguments[SmoothArgs]
    heads: int
    q_blocks: int
    groups: int
    query_tiles: int
    heads_a_chunk: int
    levels_a_chunk: int
    delta: int
    scratch_size: int

    @classmethod
    def of(cls, request: Request, config: MmaConfig, pack: PackPlan, q_blocks: int) -> SmoothQ:
        """The launches for a supported request."""
        heads, query_tiles = request.batch * request.q_heads, -(-request.q_len // MMA_GEOMETRY.b_q)
        delta_stride = pack.tiles * MMA_GEOMETRY.b_k
        block_bytes, most_bytes = config.groups * delta_stride * 4, max(_MOST_DELTA_BYTES, pack.layout.size // 4)
        heads_a_chunk, levels_a_chunk = delta_chunk(min(heads, MOST_ROWS), q_blocks, block_bytes, most_bytes)
        delta = aligned(heads * query_tiles * pack.dim * 4)
        query_means, delta_s = _kernels(
            pack.dim, request.dtype, config.arch, packed_mask(config.mask), request.device.index
        )
        arguments = SmoothArgs(
            **sizes(request, pack),
            delta_stride=delta_stride,
            query_tiles=query_tiles,
            heads=heads,
            groups=config.groups,
            q_blocks=q_blocks,
        )
        return cls(
            query_means=query_means,
            delta_s=delta_s,
            arguments=Arguments(arguments),
            heads=heads,
            q_blocks=q_blocks,
            groups=config.groups,
            query_tiles=query_tiles,
            heads_a_chunk=heads_a_chunk,
            levels_a_chunk=levels_a_chunk,
            delta=delta,
            scratch_size=delta + heads_a_chunk * levels_a_chunk * block_bytes,
        )

    def chunks(
        self, q: Tensor, packed: PackedKV, scratch: int, sm_scale: float, device: int
    ) -> Iterator[tuple[int, int]]:
        """Make ΔS, chunk by chunk: each for so many blocks of rows from the first on, in attention's order of work."""
        if packed.k is None:
            raise ValueError("ΔS is made of K itself, which these packed K and V were not given")
        args, address = self.arguments.values, self.arguments.address
        args.q.point_to(q)
        args.k.point_to(packed.k)
        args.q_mean = scratch
        args.k_mean = packed.address + packed.plan.layout.k_mean
        args.delta = scratch + self.delta
        args.scale = sm_scale * LOG2E
        args.first_head, args.first_level, args.levels = 0, 0, self.levels_a_chunk
        if packed.mask is not None:
            args.mask = packed.mask
        rows = min(self.heads, MOST_ROWS)
        self.query_means((self.query_tiles, rows, -(-self.heads // rows)), device, address)
        for first_head in range(0, self.heads, self.heads_a_chunk):
            heads = min(self.heads_a_chunk, self.heads - first_head)
            for first_level in range(0, self.q_blocks, self.levels_a_chunk):
                levels = min(self.levels_a_chunk, self.q_blocks - first_level)
                args.first_head, args.first_level, args.levels = first_head, first_level, levels
                grid = (packed.plan.tiles, -(-levels * self.groups // _DELTA_TILES), heads)
                self.delta_s(grid, device, address)
                yield first_head * self.q_blocks + first_level, heads * levels


def delta_chunk(heads: int, q_blocks: int, block_bytes: int, most_bytes: int) -> tuple[int, int]:
    """For how many heads, and for how many query blocks of each, ΔS is made at once: whole heads, or a part of one.

    Args:
        heads: batch × query heads; q_blocks: of a head; block_bytes: of a query block's ΔS.
        most_bytes: held at once, if one block is not more.
    """
    blocks = most_bytes // block_bytes
    return max(1, min(heads, blocks // q_blocks)), min(q_blocks, max(1, blocks))


@lru_cache(maxsize=64)
def _kernels(dim: int, dtype: torch.dtype, arch: str, mask: MaskForm, device: int) -> tuple[Kernel, Kernel]:
    del device
    instance = smooth_q_instance(dim, dtype, arch, mask)
    return load(instance, "query_means", 128), load(instance, "delta_s", 128)

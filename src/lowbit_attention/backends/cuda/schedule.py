"""What the attention kernels' hosts share: the order of work (csrc/common/work.cuh) and what no kernel takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...call.request import Request
from .instances import DTYPE_CODES, HEAD_DIMS
from .packing import PackPlan

_LARGEST_LENGTH = 1 << 30
"""Tokens; so that sums of two lengths stay in 32 bits."""
_MOST_HEADS = 65535
"""Batch × heads: CUDA's limit of a grid's second dimension."""


def request_reasons(request: Request) -> list[str]:
    """Why no kernel here takes a request, whatever the recipe and the card."""
    reasons = []
    if request.dtype not in DTYPE_CODES:
        reasons.append(f"it takes float16, bfloat16 and float32, not {request.dtype}")
    if request.mask != "none":
        reasons.append(f"it takes no {request.mask} mask yet")
    if max(request.head_dim, request.v_head_dim) > HEAD_DIMS[-1]:
        reasons.append(f"head_dim {max(request.head_dim, request.v_head_dim)} is above {HEAD_DIMS[-1]}")
    if request.machine is not None:
        reasons.append(f"like={request.machine.name!r} asks for an emulation")
    if 0 in (request.batch, request.q_heads, request.kv_heads, request.q_len, request.kv_len, request.v_head_dim):
        reasons.append("the call is empty")
    if max(request.q_len, request.kv_len) > _LARGEST_LENGTH:
        reasons.append(f"it takes up to {_LARGEST_LENGTH} tokens")
    if request.batch * request.q_heads > _MOST_HEADS:
        reasons.append(f"batch × heads {request.batch * request.q_heads} is above {_MOST_HEADS}")
    return reasons


def schedule(request: Request, q_blocks: int, section: int) -> tuple[int, ...]:
    """The numbers of the kernels' ``Schedule``."""
    return (
        q_blocks, request.q_heads, section, section * q_blocks,
        *divisor(section * q_blocks), *divisor(section), *divisor(request.q_heads),
        *divisor(request.q_heads // request.kv_heads),
    )  # fmt: skip


def heads_side_by_side(request: Request, pack: PackPlan, index: int, equal: bool) -> int:
    """Query heads that are worked on at the same time, so that equally long blocks of different heads run together.

    Where all blocks of rows are equally long (``equal``), one head after the other makes the best use of L2. Where the
    last of every head is shorter, too, unless K and V of all heads are in L2: else the short ones may all meet the same
    multiprocessors. With causality, as many as keep their K and V in half of L2.
    """
    group, total = request.q_heads // request.kv_heads, request.batch * request.q_heads
    kv_bytes = pack.tiles * (pack.form.k_bytes(pack.dim) + pack.form.v_bytes(pack.dim))
    l2_bytes = int(torch.cuda.get_device_properties(index).L2_cache_size)
    if not request.is_causal:  # (¾: Q and the output pass through L2, too; 34 MB of K and V in 50 gained 3 %)
        return 1 if equal or total // group * kv_bytes > l2_bytes * 3 // 4 else total
    heads = max(1, l2_bytes // 2 // kv_bytes) * group
    return next(d for d in range(min(heads, total), 0, -1) if total % d == 0)


@dataclass(frozen=True)
class Pieces:
    """The order of work's blocks when the last turn's are cut: ``whole`` blocks, then ``rest`` blocks in pieces."""

    whole: int
    rest: int
    count: int
    """Whole blocks and pieces together."""
    key_splits: int = 1
    """If more than 1, a piece is all rows and one part of the keys, else some of the rows and all keys."""


_SPLIT_COST = 7.0
"""What a split of a block takes beside its key tiles, in the time of a key tile: its own Q, the sums' way to memory."""
_MERGE_COST = 1.0
"""What adding up one split's sums takes, likewise. (Both from timings of 2 to 3 splits of 8 to 36 tiles on an H200.)"""
_CUT_ROWS = {2: {1: 1.0, 2: 0.97}, 3: {1: 1.0, 2: 0.97, 3: 0.8}, 4: {1: 1.0, 2: 0.82, 4: 0.72}}
"""By the warpgroups of a block, the time of its rows cut into so many pieces, in that of the block: a warpgroup alone
is little faster. (Of four: from the queue in docs/kernels/hopper.md, not timed.)"""
_MOST_TURNS = 3
"""Pieces along the keys, in turns of the card: each keeps its sums in memory (100 KB at head dimension 128)."""


def cut(blocks: int, places: int, most: int, key_tiles: int = 0) -> Pieces:
    """Cut the blocks that are left for the last turn, if that shortens it.

    Either their rows are cut, into up to ``most`` pieces (the warpgroups of a block), as many as find a place; or the
    keys of each, ``key_tiles`` (0: they cannot be), which takes sums from one multiprocessor to another, but fills them
    all, if need be in several shorter turns.

    576 blocks on 132 places: four turns and 48 blocks, each in two pieces, which take half a turn.
    """
    rest = blocks % places
    if rest == 0:
        return Pieces(blocks, 0, blocks)
    by_rows = max(pieces for pieces in _CUT_ROWS[most] if pieces <= places // rest)
    time = {1: _CUT_ROWS[most][by_rows] * key_tiles}
    for splits in range(2, min(_MOST_TURNS * places // rest, key_tiles) + 1):
        turns = -(-rest * splits // places)
        time[splits] = turns * (key_tiles / splits + _SPLIT_COST) + _MERGE_COST * splits
    splits = min(time, key=lambda s: time[s])
    return Pieces(blocks - rest, rest, blocks - rest + rest * (splits if splits > 1 else by_rows), splits)


def divisor(d: int) -> tuple[int, int]:
    """Multiplier and shift so that ``n // d == n * multiplier >> shift`` for 0 ≤ n < 2³¹ (``Divisor``)."""
    shift = 31 + (d - 1).bit_length()
    return -(-(1 << shift) // d), shift


def log2_rounded_down(p_max: float) -> float:
    """log2 P_r in float32, rounded down so that P never exceeds P_r."""
    rounded = torch.tensor(math.log2(p_max), dtype=torch.float32, device="cpu")
    if float(rounded) > math.log2(p_max):
        rounded = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return float(rounded)


@lru_cache(maxsize=16)
def multiprocessors(device: int) -> int:
    """Multiprocessors of a device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

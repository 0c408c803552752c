"""The order of work (csrc/common/work.cuh): which blocks of query rows run side by side, and what fills the SMs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...call.request import Request
from .arguments import Divisor, Schedule
from .packing import PackPlan


def schedule(request: Request, q_blocks: int, section: int) -> Schedule:
    """The order of a call's blocks of query rows, ``q_blocks`` a head and ``section`` heads side by side."""
    return Schedule(
        q_blocks=q_blocks,
        q_heads=request.q_heads,
        section=section,
        section_items=section * q_blocks,
        by_section_items=divisor(section * q_blocks),
        by_section=divisor(section),
        by_q_heads=divisor(request.q_heads),
        by_group=divisor(request.q_heads // request.kv_heads),
    )


def divisor(d: int) -> Divisor:
    """Multiplier and shift so that ``n // d == n * multiplier >> shift`` for 0 ≤ n < 2³¹."""
    shift = 31 + (d - 1).bit_length()
    return Divisor(multiplier=-(-(1 << shift) // d), shift=shift)


def heads_side_by_side(request: Request, pack: PackPlan, device: int, equal: bool) -> int:
    """Query heads that are worked on at the same time, so that equally long blocks of different heads run together.

    Where all blocks of rows are equally long (``equal``), one head after the other makes the best use of L2. Where the
    last of every head is shorter, too, unless K and V of all heads are in L2: else the short ones may all meet the same
    SMs. With causality, as many as keep their K and V in half of L2.
    """
    group, total = request.q_heads // request.kv_heads, request.batch * request.q_heads
    kv_bytes = pack.tiles * (pack.form.k_bytes(pack.dim) + pack.form.v_bytes(pack.dim))
    l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
    if not request.is_causal:  # (¾: Q and the output pass through L2, too; 34 MB of K and V in 50 gained 3 %)
        return 1 if equal or total // group * kv_bytes > l2_bytes * 3 // 4 else total
    heads = max(1, l2_bytes // 2 // kv_bytes) * group
    return next(d for d in range(min(heads, total), 0, -1) if total % d == 0)


@dataclass(frozen=True)
class WorkTiles:
    """What thread blocks take in turn: ``whole`` blocks of rows, then ``tail`` blocks in several work tiles each."""

    whole: int
    tail: int
    """Blocks of rows of the tail wave: those that are left when whole ones have filled the SMs some times."""
    count: int
    """Work tiles in all."""
    key_splits: int = 1
    """If more than 1, a tail work tile is all rows and one split of the keys, else some of the rows and all keys."""


_SPLIT_COST = 7.0
"""What a split of a block takes beside its key tiles, in the time of a key tile: its own Q, the sums' way to memory."""
_MERGE_COST = 1.0
"""What adding up one split's sums takes, likewise. (Both from timings of 2 to 3 splits of 8 to 36 tiles on an H200.)"""
_CUT_ROWS = {2: {1: 1.0, 2: 0.97}, 3: {1: 1.0, 2: 0.97, 3: 0.8}, 4: {1: 1.0, 2: 0.82, 4: 0.72}}
"""By the warpgroups of a block, the time of its rows cut into so many work tiles, in that of the block: a warpgroup
alone is little faster. (Of four: from the queue in docs/kernels/hopper.md, not timed.)"""
_MOST_WAVES = 3
"""Waves of split-KV work tiles: each of these keeps its sums in memory (100 KB at head dimension 128)."""


def work_tiles(blocks: int, sms: int, warpgroups: int, key_tiles: int = 0) -> WorkTiles:
    """Cut the blocks of the tail wave, if that shortens it.

    Either their rows are cut, between up to ``warpgroups`` of a block, into as many work tiles as there are SMs for; or
    (split-KV) the keys of each, ``key_tiles`` (0: they cannot be), which takes sums from one SM to another, but fills
    them all, if need be in several shorter waves.

    576 blocks on 132 SMs: four waves and 48 blocks, each in two work tiles, which take half a wave.
    """
    tail = blocks % sms
    if tail == 0:
        return WorkTiles(blocks, 0, blocks)
    by_rows = max(parts for parts in _CUT_ROWS[warpgroups] if parts <= sms // tail)
    time = {1: _CUT_ROWS[warpgroups][by_rows] * key_tiles}
    for splits in range(2, min(_MOST_WAVES * sms // tail, key_tiles) + 1):
        waves = -(-tail * splits // sms)
        time[splits] = waves * (key_tiles / splits + _SPLIT_COST) + _MERGE_COST * splits
    splits = min(time, key=lambda s: time[s])
    return WorkTiles(blocks - tail, tail, blocks - tail + tail * (splits if splits > 1 else by_rows), splits)


def log2_rounded_down(p_max: float) -> float:
    """log2 P_r in float32, rounded down so that P never exceeds P_r."""
    rounded = torch.tensor(math.log2(p_max), dtype=torch.float32, device="cpu")
    if float(rounded) > math.log2(p_max):
        rounded = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return float(rounded)


@lru_cache(maxsize=16)
def sm_count(device: int) -> int:
    """SMs of a device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

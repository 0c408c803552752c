"""What the attention kernels' hosts share: the order of work (csrc/attend/schedule.cuh) and what no kernel takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch

from ..request import Request
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


@lru_cache(maxsize=1)
def compiler_reasons() -> tuple[str, ...]:
    """Why kernels cannot be compiled here."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None or find_spec("cuda.core") is None:
        return ('the run-time compiler is not installed: pip install "lowbit-attention[cuda13]" (or cuda12)',)
    return ()


def schedule(request: Request, q_blocks: int, section: int) -> tuple[int, ...]:
    """The numbers of the kernels' ``Schedule``."""
    return (
        q_blocks, request.q_heads, section, section * q_blocks,
        *divisor(section * q_blocks), *divisor(section), *divisor(request.q_heads),
        *divisor(request.q_heads // request.kv_heads),
    )  # fmt: skip


def heads_side_by_side(request: Request, pack: PackPlan, index: int) -> int:
    """Query heads that are worked on at the same time.

    Without causality all blocks are of equal length, and one head after the other makes the best use of L2. With it,
    as many as keep their K and V in half of L2, so that equally long blocks of different heads run together.
    """
    if not request.is_causal:
        return 1
    group = request.q_heads // request.kv_heads
    kv_bytes = pack.tiles * (pack.form.k_bytes(pack.dim) + pack.form.v_bytes(pack.dim))
    heads = max(1, int(torch.cuda.get_device_properties(index).L2_cache_size) // 2 // kv_bytes) * group
    total = request.batch * request.q_heads
    return next(d for d in range(min(heads, total), 0, -1) if total % d == 0)


@dataclass(frozen=True)
class Pieces:
    """The order of work's blocks when the last turn's are cut: ``whole`` blocks, then ``rest`` blocks in pieces."""

    whole: int
    rest: int
    count: int
    """Whole blocks and pieces together."""


def cut(blocks: int, places: int, most: int) -> Pieces:
    """Cut the blocks that are left for the last turn into up to ``most`` pieces each, as many as find a place.

    576 blocks on 132 places: four turns and 48 blocks, each in two pieces, which take less than a turn.
    """
    rest = blocks % places
    pieces = min(most, places // rest) if rest else 1
    return Pieces(blocks - rest, rest, blocks - rest + rest * pieces)


def divisor(d: int) -> tuple[int, int]:
    """Multiplier and shift so that ``n // d == n * multiplier >> shift`` for 0 ≤ n < 2³¹ (``Divisor``)."""
    shift = 31 + (d - 1).bit_length()
    return -(-(1 << shift) // d), shift


def log2_rounded_down(p_max: float) -> float:
    """log2 P_r in float32, rounded down so that P never exceeds P_r."""
    rounded = torch.tensor(math.log2(p_max), dtype=torch.float32)
    if float(rounded) > math.log2(p_max):
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf))
    return float(rounded)


@lru_cache(maxsize=16)
def multiprocessors(device: int) -> int:
    """Multiprocessors of a device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

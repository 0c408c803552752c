"""The structures that kernels take, declared here as csrc declares them: the same fields in the same order.

tests/cpu/cuda/test_arguments.py reads csrc and compares every field's name, type and offset, so neither side can change
alone. A field's comment stands beside its declaration in csrc.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Annotated, Generic, TypeVar, get_type_hints

from torch import Tensor

Pointer = Annotated[int, ctypes.c_void_p]
I32 = Annotated[int, ctypes.c_int32]
U32 = Annotated[int, ctypes.c_uint32]
I64 = Annotated[int, ctypes.c_int64]
F32 = Annotated[float, ctypes.c_float]


class Structure(ctypes.Structure):
    """A C structure of annotated fields. ``__slots__`` makes a misspelt field an error."""

    __slots__ = ()

    def __init__(self, **fields: int | float | Structure) -> None:
        """Fields by name; the others are 0.

        Raises:
            AttributeError, TypeError: there is no such field, or it has another type.
            OverflowError: a whole number does not fit (ctypes itself would cut it in silence).
        """
        super().__init__(**fields)
        for name, value in fields.items():
            if isinstance(value, int) and (getattr(self, name) or 0) != value:
                raise OverflowError(f"{type(self).__name__}.{name} cannot hold {value}")


S = TypeVar("S", bound=Structure)


def declared(structure: type[S]) -> type[S]:
    """Give a `Structure` its annotated fields, in order."""
    hints = get_type_hints(structure, include_extras=True)
    structure._fields_ = [
        (name, hints[name].__metadata__[0] if hasattr(hints[name], "__metadata__") else hints[name])
        for name in structure.__annotations__
    ]
    return structure


@declared
class Strided(Structure):
    """csrc/tile/strided.cuh."""

    __slots__ = ()
    data: Pointer
    batch: I64
    head: I64
    token: I64

    def point_to(self, x: Tensor) -> None:
        """To a tensor ``[B, H, N, D]`` whose channels lie next to each other."""
        self.data = x.data_ptr()
        self.batch, self.head, self.token, _ = x.stride()


@declared
class Divisor(Structure):
    """csrc/common/work.cuh."""

    __slots__ = ()
    multiplier: U32
    shift: U32


@declared
class Schedule(Structure):
    """csrc/common/work.cuh."""

    __slots__ = ()
    q_blocks: I32
    q_heads: I32
    section: I32
    section_items: I32
    by_section_items: Divisor
    by_section: Divisor
    by_q_heads: Divisor
    by_group: Divisor


@declared
class MaskArgs(Structure):
    """csrc/common/masks.cuh."""

    __slots__ = ()
    key_counts: Pointer
    keys: Pointer
    key_seen: Pointer
    bits: Pointer
    tile_lists: Pointer
    bias: Pointer
    row_bias: Pointer
    row_seen: Pointer
    list_batch: I32
    list_head: I32
    plane_batch: I32
    plane_head: I32
    row_blocks: I32
    tile_list_size: I32
    row_step: I32
    tile_step: I32
    last_step: I32
    plane_step: I32
    first_block: I32
    last_tile: I32


@declared
class SequenceArgs(Structure):
    """csrc/common/sequences.cuh."""

    __slots__ = ()
    q_starts: Pointer
    q_counts: Pointer
    key_starts: Pointer
    key_counts: Pointer
    causal_offsets: Pointer
    tile_starts: Pointer
    pack_starts: Pointer
    order: Pointer
    item_starts: Pointer
    count: I32
    tokens: I32


@declared
class PrepareSequencesArgs(Structure):
    """csrc/sequences/sequences.cu."""

    __slots__ = ()
    cu_q: Pointer
    cu_k: Pointer
    long_q: I32
    long_k: I32
    count: I32
    q_tokens: I32
    k_tokens: I32
    is_causal: I32
    bottom_right: I32
    tile_keys: I32
    tiles_a_block: I32
    q_rows: I32
    q_heads: I32
    q_starts: Pointer
    q_counts: Pointer
    key_starts: Pointer
    key_counts: Pointer
    causal_offsets: Pointer
    tile_starts: Pointer
    pack_starts: Pointer
    order: Pointer
    item_starts: Pointer
    out: Pointer
    lse: Pointer
    row_bytes: I32


@declared
class PrepareArgs(Structure):
    """csrc/mask/arguments.cuh."""

    __slots__ = ()
    mask: Pointer
    batch: I64
    head: I64
    row: I64
    key: I64
    q_len: I32
    kv_len: I32
    causal_offset: I32
    first_offset: I32
    planes_a_batch: I32
    lists_a_batch: I32
    group: I32
    dtype: I32
    tiles: I32
    row_blocks: I32
    lists_seen: I32
    q_blocks: I32
    row_blocks_a_block: I32
    key_counts: Pointer
    keys: Pointer
    key_seen: Pointer
    bits: Pointer
    bias: Pointer
    row_bias: Pointer
    tile_lists: Pointer
    row_seen: Pointer
    tile_seen: Pointer
    slopes: Pointer
    kv_lens: Pointer
    long_lens: I32
    shift: I32
    nearest: I32
    diagonals: I32
    blocks: I32


@declared
class PackArgs(Structure):
    """csrc/pack/statistics.cuh. An instance without V's means by tile takes all but the last field."""

    __slots__ = ()
    k: Strided
    v: Strided
    partials: Pointer
    k_tiles: Pointer
    k_scales: Pointer
    v_tiles: Pointer
    k_mean: Pointer
    k_largest_scale: Pointer
    v_scale: Pointer
    v_mean: Pointer
    v_inverse: Pointer
    zeros: Pointer
    k_stride: I64
    v_stride: I64
    k_scale_stride: I64
    v_max: F32
    heads: I32
    kv_heads: I32
    kv_len: I32
    k_channels: I32
    v_channels: I32
    splits: I32
    tokens_a_split: I32
    k_tokens: I32
    tiles: I32
    tiles_a_block: I32
    smooth_k: I32
    smooth_v: I32
    k_max: I32
    one_k_scale: I32
    zero_scale_is_zero: I32
    v_power_of_two: I32
    zero_count: I32
    mask: MaskArgs
    sequences: SequenceArgs
    v_tile_means: Pointer


@declared
class AttentionArgs(Structure):
    """csrc/hopper/block.cuh. An instance without V's means by tile or without jumps lacks the last ones."""

    __slots__ = ()
    q: Strided
    out: Pointer
    out_batch: I64
    out_head: I64
    out_token: I64
    lse: Pointer
    k_tiles: Pointer
    k_scales: Pointer
    v_tiles: Pointer
    k_mean: Pointer
    k_largest_scale: Pointer
    v_scale: Pointer
    v_mean: Pointer
    sm_scale: F32
    logits_scale: F32
    log2_p_max: F32
    p_max: F32
    slack: F32
    headroom: F32
    q_heads: I32
    kv_heads: I32
    q_len: I32
    kv_len: I32
    channels: I32
    v_channels: I32
    causal_offset: I32
    tiles: I32
    items: I32
    whole_items: I32
    rest: I32
    schedule: Schedule
    taken: Pointer
    key_splits: I32
    partials: Pointer
    arrivals: Pointer
    mask: MaskArgs
    sequences: SequenceArgs
    v_tile_means: Pointer
    jump: F32
    jump_bits: F32


@declared
class MmaArgs(Structure):
    """csrc/mma/block.cuh."""

    __slots__ = ()
    q: Strided
    out: Pointer
    out_batch: I64
    out_head: I64
    out_token: I64
    lse: Pointer
    tiles: Pointer
    k_mean: Pointer
    k_largest_scale: Pointer
    v_scale: Pointer
    v_mean: Pointer
    q_mean: Pointer
    delta: Pointer
    sm_scale: F32
    logits_scale: F32
    log2_p_max: F32
    largest_fast_factor: F32
    q_heads: I32
    kv_heads: I32
    q_len: I32
    kv_len: I32
    channels: I32
    v_channels: I32
    causal_offset: I32
    tile_count: I32
    first_item: I32
    dtype: I32
    q_max: I32
    q_granularity: I32
    schedule: Schedule
    mask: MaskArgs
    sequences: SequenceArgs


@declared
class SmoothArgs(Structure):
    """csrc/pack/smooth_q.cu."""

    __slots__ = ()
    q: Strided
    k: Strided
    q_mean: Pointer
    k_mean: Pointer
    delta: Pointer
    delta_stride: I64
    scale: F32
    q_heads: I32
    kv_heads: I32
    q_len: I32
    kv_len: I32
    channels: I32
    query_tiles: I32
    heads: I32
    causal_offset: I32
    first_head: I32
    first_level: I32
    levels: I32
    groups: I32
    q_blocks: I32
    mask: MaskArgs


class Arguments(threading.local, Generic[S]):
    """A kernel's arguments, in each thread its own copy: the driver copies them at the launch.

    A plan makes them once with everything that is the same in all its calls; a call writes the rest, addresses and
    strides, into ``values``.
    """

    def __init__(self, template: S) -> None:
        self.values: S = type(template).from_buffer_copy(template)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.values))
        self.address: int = ctypes.addressof(self._pointers)
        """Of the array of one pointer to the structure that a launch takes."""

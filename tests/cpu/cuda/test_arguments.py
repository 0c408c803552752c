"""The argument structures of `cuda.arguments` are csrc's, field by field."""

import ctypes
import threading

import pytest
from c_structs import fields, layout

from lowbit_attention.backends.cuda.arguments import (
    Arguments,
    AttentionArgs,
    Divisor,
    MmaArgs,
    PackArgs,
    Schedule,
    SmoothArgs,
    Strided,
)
from lowbit_attention.backends.cuda.instances import TILE_KEYS

MACROS = {"HEAD_DIM": 128, "TILE_KEYS": TILE_KEYS, "TILE_MEANS": 1, "JUMP": 1, "V_TILE_MEANS": 1, "true": 1, "false": 0}
STRUCTURES = {
    Strided: "tile/strided.cuh",
    Divisor: "attend/schedule.cuh",
    Schedule: "attend/schedule.cuh",
    PackArgs: "pack/statistics.cuh",
    AttentionArgs: "wgmma/block.cuh",
    MmaArgs: "mma/block.cuh",
    SmoothArgs: "kernels/smooth_q.cu",
}
MACROS |= {
    "SUMS_F16": 1, "PROMOTION_KEYS": 256, "PROMOTE_FIRST": 1, "RESTART": 1, "SUM_IN_MMA": 1, "ROTATE": 0, "K_LANES": 8,
    "V_HALF": 0, "QK_LANES": 8, "PROMOTE": 1, "SMOOTH_Q": 1, "INPUT_DTYPE": 1,
}  # fmt: skip


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.__name__)
def test_names_types_and_offsets_are_csrcs(structure):
    flat, size, alignment = layout(STRUCTURES[structure], structure.__name__, dict(MACROS))
    assert list(fields(structure)) == flat
    assert ctypes.sizeof(structure) == size
    assert ctypes.alignment(structure) == alignment
    assert size <= 4096  # what a kernel's parameters may take


def test_a_misspelt_field_and_a_wrong_number_are_errors():
    assert SmoothArgs(q_heads=7, scale=0.5).q_heads == 7
    with pytest.raises(AttributeError):
        SmoothArgs(q_head=7)
    with pytest.raises(AttributeError):
        SmoothArgs().q_head = 7
    with pytest.raises(TypeError):
        SmoothArgs(q_heads=7.0)
    with pytest.raises(OverflowError):
        SmoothArgs(q_heads=1 << 31)
    with pytest.raises(OverflowError):
        Divisor(multiplier=-1)
    assert Divisor(multiplier=(1 << 32) - 1).multiplier == (1 << 32) - 1


def test_every_thread_has_its_own():
    arguments = Arguments(SmoothArgs(q_heads=7, levels=1))
    arguments.values.levels = 2
    found = []

    def look():
        pointer = ctypes.c_void_p.from_address(arguments.address).value
        found.append((SmoothArgs.from_address(pointer).q_heads, arguments.values.levels, pointer))
        arguments.values.levels = 3

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert [one[:2] for one in found] == [(7, 1), (7, 1)]
    mine = ctypes.c_void_p.from_address(arguments.address).value
    assert mine == ctypes.addressof(arguments.values)
    assert mine not in [one[2] for one in found]
    assert arguments.values.levels == 2

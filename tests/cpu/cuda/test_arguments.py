"""The argument structures of `cuda.arguments` are csrc's, field by field."""

import ctypes
import threading

import pytest
import torch
from c_structs import constants_of, fields, layout

from lowbit_attention import RECIPES
from lowbit_attention.backends.cuda.arguments import (
    Arguments,
    AttentionArgs,
    Divisor,
    MaskArgs,
    MmaArgs,
    PackArgs,
    PrepareArgs,
    PrepareSequencesArgs,
    Schedule,
    SequenceArgs,
    SmoothArgs,
    Strided,
)
from lowbit_attention.backends.cuda.instances import (
    PackFormat,
    mask_instance,
    mma_config,
    pack_instance,
    smooth_q_instance,
    wgmma_config,
)

HALF = torch.float16
WGMMA = wgmma_config(RECIPES["fast_8b"], 128, HALF).instance()
PACK = pack_instance(128, HALF, "sm_90a", PackFormat(v_tile_means=True))
MMA = mma_config(RECIPES["sage2_4b"], 128, "sm_89").instance()
SMOOTH = smooth_q_instance(128, HALF, "sm_89")
MASK = mask_instance(64, "sm_89")
STRUCTURES = {
    Strided: ("tile/strided.cuh", PACK),
    Divisor: ("common/work.cuh", MMA),
    Schedule: ("common/work.cuh", MMA),
    MaskArgs: ("common/masks.cuh", MASK),
    PrepareArgs: ("mask/arguments.cuh", MASK),
    SequenceArgs: ("common/sequences.cuh", MASK),
    PrepareSequencesArgs: ("sequences/sequences.cu", MASK),
    PackArgs: ("pack/statistics.cuh", PACK),
    AttentionArgs: ("hopper/block.cuh", WGMMA),
    MmaArgs: ("mma/block.cuh", MMA),
    SmoothArgs: ("pack/smooth_q.cu", SMOOTH),
}
"""Where each is declared, and an instance that has all of its members."""


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.__name__)
def test_names_types_and_offsets_are_csrcs(structure):
    file, instance = STRUCTURES[structure]
    flat, size, alignment = layout(file, structure.__name__, constants_of(instance))
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

"""The checks of the kernels' machine code can fail, and the manifest holds what the dispatcher may ask for."""

import dataclasses

import pytest
import torch

from lowbit_attention import recipe
from lowbit_attention.backends.cuda.hopper import KERNEL
from lowbit_attention.backends.cuda.inspect import machine_code
from lowbit_attention.backends.cuda.inspect.machine_code import instructions, problems
from lowbit_attention.backends.cuda.instances import (
    DTYPE_CODES,
    HEAD_DIMS,
    MANIFEST,
    WgmmaConfig,
    pack_instance,
    wgmma_config,
    wgmma_format,
)
from lowbit_attention.backends.cuda.jit.compiler import compile_source


@pytest.fixture(scope="module")
def smoke():
    """The smallest instance of the attention kernel, compiled."""
    instance = wgmma_config(recipe("sage2_8b"), 64, torch.bfloat16).instance()
    return instance, compile_source(instance.source(), instance.options())


def test_a_kernel_of_the_manifest_is_clean(smoke):
    instance, compiled = smoke
    assert instance in MANIFEST
    assert problems(instance, compiled) == []
    assert "IGMMA.64x128x32.S8.S8" in instructions(compiled.cubin)


def test_a_missing_mma_is_told(smoke):
    instance, compiled = smoke
    wanting = dataclasses.replace(instance, mma=("QGMMA.64x96x32.F16.E4M3.E4M3",))
    assert problems(wanting, compiled) == ["no QGMMA.64x96x32.F16.E4M3.E4M3 in the machine code"]


def test_spills_above_the_limit_are_told(smoke):
    instance, compiled = smoke
    used = dataclasses.replace(next(iter(compiled.resources.values())), spill_stores=4, spill_loads=8)
    spilling = dataclasses.replace(compiled, resources={"attention_wgmma": used})
    assert problems(instance, spilling) == ["attention_wgmma spills 12 bytes (limit 0)"]
    assert problems(dataclasses.replace(instance, spill_limit=12), spilling) == []


LOOPS = """
        /*0010*/                   IGMMA.64x64x32.S8.S8 R24, gdesc[UR8], RZ, !UPT ;
.L_x_1:
        /*0020*/                   QGMMA.64x72x32.F16.E4M3.E4M3 R88, R36, gdesc[UR8], R88 ;
{inside}
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/                   USETMAXREG.DEALLOC.CTAPOOL 0x20 ;
        /*0060*/                   STL [R1], R0 ;
        /*0070*/                   BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(
    "inside", ["", "        /*0030*/                   LDL.LU R0, [R1+0x4] ;"], ids=["free", "spills"]
)
def test_spills_beside_mmas_are_told_whatever_the_limit(monkeypatch, smoke, inside):
    """What lies behind the change of roles is another's, and the branch back from there no loop."""
    monkeypatch.setattr(machine_code, "disassemble", lambda cubin: LOOPS.replace("{inside}", inside))
    instance = wgmma_config(recipe("fast_8b"), 64, torch.bfloat16).instance()
    told = ["1 accesses to local memory in loops with MMAs"] if inside else []
    assert instance.spill_limit > 0
    assert problems(instance, smoke[1]) == told
    assert problems(dataclasses.replace(instance, spills_anywhere=True), smoke[1]) == []
    assert problems(dataclasses.replace(instance, spill_limit=0), smoke[1]) == (told or ["local memory is used"])


@pytest.mark.parametrize(
    "remark",
    [
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to …",
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored …",
        "ptxas info    : (C7514) Potential Performance Loss: …",
    ],
)
def test_serialised_mmas_are_told(smoke, remark):
    instance, compiled = smoke
    assert problems(instance, dataclasses.replace(compiled, remarks=(remark,))) == [remark]


def test_serialised_mmas_are_remarked_by_the_compiler(smoke):
    """An MMA that not every thread executes: ptxas waits after every MMA and says so, as 'info'."""
    instance, _ = smoke
    source = instance.source()
    call, include = "begin_pv<0>(adds_to_sums());", '#include "hopper/mainloop.cuh"'
    mainloop = dict(source.headers)["hopper/mainloop.cuh"].replace("#pragma once", "")
    assert call in mainloop
    assert include in source.text
    text = source.text.replace(include, mainloop.replace(call, "if (threadIdx.x % 2 == 0) " + call))
    text = text.replace('#include "hopper/epilogue.cuh"\n', "", 1).replace(  # (which includes the main loop, too)
        '#include "hopper/producer.cuh"', dict(source.headers)["hopper/epilogue.cuh"].replace(include, "")
        + '#include "hopper/producer.cuh"'
    )  # fmt: skip
    compiled = compile_source(dataclasses.replace(source, text=text), instance.options())
    assert any("serialized" in problem for problem in problems(instance, compiled))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("r", KERNEL.auto_recipes, ids=str)
def test_what_auto_may_ask_for_is_in_the_manifest(r, head_dim):
    for dtype in DTYPE_CODES:
        assert wgmma_config(r, head_dim, dtype).instance() in MANIFEST
        assert pack_instance(head_dim, dtype, "sm_90a", wgmma_format(r)) in MANIFEST


def test_the_geometry_is_the_machines():
    assert (WgmmaConfig.geometry.b_q, WgmmaConfig.geometry.b_k, WgmmaConfig.geometry.warp_rows) == (64, 128, 16)

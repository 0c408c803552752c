"""The checks of the kernels' machine code can fail, and the manifest holds what the dispatcher may ask for."""

import dataclasses

import pytest
import torch

from lowbit_attention import recipe
from lowbit_attention.cuda.hopper import KERNEL
from lowbit_attention.cuda.instances import DTYPE_CODES, HEAD_DIMS, MANIFEST, WgmmaConfig, pack_instance, wgmma_config
from lowbit_attention.cuda.machine_code import instructions, problems
from lowbit_attention.jit.compiler import compile_source


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
    call = "      begin_pv<0>(!begins);"
    text = source.text.replace(call, "      if (threadIdx.x % 2 == 0)" + call)
    assert text != source.text
    compiled = compile_source(dataclasses.replace(source, text=text), instance.options())
    assert any("serialized" in problem for problem in problems(instance, compiled))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("r", KERNEL.auto_recipes, ids=str)
def test_what_auto_may_ask_for_is_in_the_manifest(r, head_dim):
    for dtype in DTYPE_CODES:
        assert wgmma_config(r, head_dim, dtype).instance() in MANIFEST
        assert pack_instance(head_dim, dtype, "sm_90a") in MANIFEST


def test_the_geometry_is_the_machines():
    assert (WgmmaConfig.geometry.b_q, WgmmaConfig.geometry.b_k, WgmmaConfig.geometry.warp_rows) == (64, 128, 16)

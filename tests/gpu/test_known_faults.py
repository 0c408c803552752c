"""Faults on a GPU that were known, each with the right answer: S20 (see tests/cpu/test_known_faults.py)."""

import pytest
import torch

from lowbit_attention import attention, compare, explain
from lowbit_attention.reference.exact import exact

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


SHAPES = [(1, 70_000, 5, 64), (70_000, 1, 5, 64), (1_000, 70, 5, 64)]


def tokens(shape):
    g = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_s20_more_heads_than_a_grid_has_rows_are_right(shape):
    q, k, v = tokens(shape)
    out = attention(q, k, v, recipe="sage2_8b")
    want, _ = exact(q, k, v, sm_scale=64**-0.5)
    assert compare(want, out).l1 < 0.1
    assert compare(want[-1, -1], out[-1, -1]).l1 < 0.3  # (the last head is no other's)


@pytest.mark.parametrize("shape", SHAPES)
def test_s20_they_run_on_a_kernel(shape):
    assert explain(*tokens(shape), recipe="sage2_8b").implementation != "emulation"

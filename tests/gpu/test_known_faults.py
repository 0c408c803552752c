"""Known faults on a GPU that are not mended yet, each with the right answer (see tests/cpu/test_known_faults.py)."""

import pytest
import torch

from lowbit_attention import attention, compare
from lowbit_attention.reference.exact import exact

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.xfail(strict=True, reason="S20: batch × heads past 65,535 is a grid that CUDA refuses")
@pytest.mark.parametrize("shape", [(1, 70_000, 5, 64), (70_000, 1, 5, 64), (1_000, 70, 5, 64)])
def test_s20_more_heads_than_a_grid_has_rows(shape):
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = attention(q, k, v, recipe="sage2_8b")
    want, _ = exact(q, k, v, sm_scale=64**-0.5)
    assert compare(want, out).l1 < 0.1
    assert compare(want[-1, -1], out[-1, -1]).l1 < 0.3  # (the last head is no other's)

"""Calls that must be right or be refused, by every way in. A helper, not a test."""

import math

import pytest
import torch
import torch.nn.functional as F

from lowbit_attention import attention, compare, make_sdpa, sdpa_enabled
from lowbit_attention.call.masks import Masking
from lowbit_attention.reference.exact import exact

RECIPE = "sage2_8b"
sdpa_8b = make_sdpa(RECIPE)


def patched(*args, **kwargs):
    """torch's function, rerouted; the call must run here."""
    with sdpa_enabled(recipe=RECIPE, strict=True) as report:
        out = F.scaled_dot_product_attention(*args, **kwargs)
    assert report.ran == report.calls == 1
    return out


SDPAS = pytest.mark.parametrize("function", [sdpa_8b, patched], ids=["make_sdpa", "sdpa_enabled"])
ALL = pytest.mark.parametrize(
    "function",
    [lambda q, k, v: attention(q, k, v, recipe=RECIPE), sdpa_8b, patched],
    ids=["attention", "sdpa", "patch"],
)


def qkv(batch=2, heads=(4, 4), lengths=(33, 33), dim=32, v_dim=None, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (heads[0], lengths[0], dim), (heads[1], lengths[1], dim), (heads[1], lengths[1], v_dim or dim)
    return [torch.randn(batch, *shape, generator=g).to(dtype) for shape in shapes]


def close(got, q, k, v, mask=None, causal_offset=None, sm_scale=None):
    """Within 8-bit quantisation of attention in float64, row by row: each is nearer than 98 % cosine similarity."""
    scale = 1 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    want, _ = exact(q, k, v, sm_scale=scale, masking=Masking(causal_offset, mask))
    assert got.dtype == q.dtype
    assert got.isfinite().all()
    assert compare(want, got).cos_sim > 0.999
    rows = F.cosine_similarity(want.double(), got.double(), dim=-1)
    assert q.shape[-1] < 8 or rows[want.any(dim=-1)].min() > 0.98
    assert not got[~want.any(dim=-1)].any()

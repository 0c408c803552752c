"""A query with a NaN or an infinity in it: it becomes NaN, and to the others it is as one that sees no key."""

import math

import pytest
import torch

from lowbit_attention import RECIPES, attention, recipe
from lowbit_attention.call.masks import Masking
from lowbit_attention.recipes.formats import FP32_MAX
from lowbit_attention.recipes.machine import MACHINES
from lowbit_attention.reference.attention import emulate

NAMES = [
    *sorted(name for name in RECIPES if not recipe(name).is_exact),
    "sage2_4b:q_granularity=per_block", "sage2_8b:smooth_q=true", "sage2_8b:rotation=hadamard",
    "sage2_8b:smoothquant_alpha=0.5", "sage2_8b:qk_bits=none,smooth_k=false",
]  # fmt: skip
EVERY_RECIPE = pytest.mark.parametrize("name", NAMES)
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
Q_LEN, KV_LEN, DIM = 261, 300, 32
"""Two tiles of 128 queries and a third of five."""
ROWS = [(0, 0, 5), (0, 0, 77), (0, 0, 78), (0, 3, 130), (1, 2, 258), (1, 2, 260)]
"""Batch, head, row. (None are eight apart: of two such, tiles that jump ask whether one does.)"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """(On tensors as small as these, more would only wait for each other.)"""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(kv_heads=2, q_len=Q_LEN):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, q_len, DIM, generator=g) + torch.randn(DIM, generator=g)
    k = torch.randn(2, kv_heads, KV_LEN, DIM, generator=g) + 2 * torch.randn(DIM, generator=g)
    v = torch.randn(2, kv_heads, KV_LEN, DIM, generator=g) + torch.randn(DIM, generator=g)
    return q, k, v


def marked(rows=ROWS):
    found = torch.zeros(2, 4, Q_LEN, dtype=torch.bool)
    for row in rows:
        found[row] = True
    return found


def run(name, q, k, v, mask=None, offset=None, **options):
    r = recipe(name)
    machine = MACHINES["sm_90a" if r.qk_bits == 8 and not r.smooth_q else "sm_89"]
    found = emulate(q, k, v, r, sm_scale=DIM**-0.5, masking=Masking(offset, mask), machine=machine, **options)
    return found.out, found.lse


def assert_alone(answer, spoilt, want):
    """NaN in the spoilt rows, and elsewhere what is wanted, bit for bit."""
    for got, wanted in zip(answer, want, strict=True):
        rows = spoilt if got.dim() == 3 else spoilt[..., None].expand_as(got)
        assert torch.equal(got.isnan(), rows)
        assert torch.equal(got[~rows], wanted[~rows])


@BAD
@EVERY_RECIPE
def test_it_alone_becomes_nan(name, bad):
    q, k, v = inputs()
    spoilt = marked()
    want = run(name, q, k, v, ~spoilt[..., None])
    for row in ROWS:
        q[(*row, row[2] % DIM)] = bad
    assert_alone(run(name, q, k, v), spoilt, want)


@EVERY_RECIPE
@pytest.mark.parametrize("options", [{}, {"offset": KV_LEN - Q_LEN}, {"key_splits": 2}], ids=["", "causal", "splits"])
def test_whatever_else_it_holds(name, options):
    q, k, v = inputs()
    spoilt = marked()
    want = run(name, q, k, v, ~spoilt[..., None], **options)
    q[spoilt] = 1e4
    q[..., 7] = torch.where(spoilt, math.nan, q[..., 7])
    assert_alone(run(name, q, k, v, **options), spoilt, want)


@BAD
@EVERY_RECIPE
def test_at_the_end_it_is_as_if_q_ended_before(name, bad):
    q, k, v = inputs()
    want = run(name, q[:, :, :-2], k, v)
    q[:, :, -2:, 3] = bad
    out, lse = run(name, q, k, v)
    assert torch.equal(out[:, :, :-2], want[0])
    assert torch.equal(lse[:, :, :-2], want[1])
    assert out[:, :, -2:].isnan().all()
    assert lse[:, :, -2:].isnan().all()


@EVERY_RECIPE
def test_a_tile_of_nothing_else(name):
    q, k, v = inputs(kv_heads=4)
    want = run(name, q[:, :, 128:], k, v)
    q[:, :, :128, 0] = math.nan
    out, lse = run(name, q, k, v)
    assert out[:, :, :128].isnan().all()
    assert lse[:, :, :128].isnan().all()
    assert torch.equal(out[:, :, 128:], want[0])
    assert torch.equal(lse[:, :, 128:], want[1])


@EVERY_RECIPE
def test_no_row_is_left(name):
    q, k, v = inputs()
    out, lse = run(name, torch.full_like(q, math.nan), k, v)
    assert out.isnan().all()
    assert lse.isnan().all()


@BAD
@EVERY_RECIPE
@pytest.mark.parametrize("kind", ["bool", "biases", "work tiles", "listed keys"])
def test_with_masks_a_row_that_sees_no_key_is_zero_all_the_same(name, bad, kind):
    q, k, v = inputs()
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 1, Q_LEN, KV_LEN, generator=g) < 0.7
    if kind == "listed keys":
        mask = mask[:, :, :1]
    else:
        mask[:, :, 5], mask[:, :, 258] = False, False
    hidden = mask & ~marked()[..., None]
    options = {"work_rows": 128} if kind == "work tiles" else {}
    if kind == "biases":
        mask, hidden = (torch.where(m, 0.5, -math.inf) for m in (mask, hidden))
    want = run(name, q, k, v, mask if kind == "listed keys" else hidden, **options)
    for row in ROWS:
        q[(*row, row[2] % DIM)] = bad
    out, lse = run(name, q, k, v, mask, **options)
    blind = torch.zeros_like(marked())
    if kind != "listed keys":
        blind[:, :, [5, 258]] = True
        assert_alone((out, lse), marked() & ~blind, want)
    assert torch.equal(lse == -math.inf, blind)
    assert not out[blind].any()
    assert torch.equal(lse.isnan(), marked() & ~blind)
    assert torch.equal(out.isnan().any(dim=-1), marked() & ~blind)


@EVERY_RECIPE
def test_of_some_rows(name):
    q, k, v = inputs()
    q[0, 0, 130, 1] = math.inf
    rows = torch.arange(128, 256)
    out, lse = run(name, q, k, v, rows=rows)
    whole, whole_lse = run(name, q, k, v)
    assert torch.equal(out.isnan(), whole[:, :, 128:256].isnan())
    assert torch.equal(lse.isnan(), whole_lse[:, :, 128:256].isnan())
    assert lse.isnan().nonzero().tolist() == [[0, 0, 2]]


@EVERY_RECIPE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_numbers_are_none(name, dtype):
    q, k, v = inputs()
    k = k / 256  # (Q·K, where it is not quantised, stays in float32)
    q[0, 1, 40] = -FP32_MAX
    q[1, 1, 41, ::2] = FP32_MAX
    q = q.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    assert q.isfinite().all()
    out, lse = attention(q, k.to(dtype), v.to(dtype), recipe=name, sm_scale=1e-30, return_lse=True)
    assert out.isfinite().all()
    assert lse.isfinite().all()

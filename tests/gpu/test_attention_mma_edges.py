"""attention_mma where numbers end: rows that see nothing, zeros, the largest and the smallest, NaN and infinity."""

import math

import pytest
import torch

pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")

import mma_cases
from kernel_cases import DEVICE, DTYPES, hopper_only, inputs, same
from mma_cases import FEW, NAMED, answers, assert_agrees, in_spoilt_memory, reference, run

from lowbit_attention import compare, recipe
from lowbit_attention.reference.exact import exact
from lowbit_attention.reference.smoothing import tile_mean

pytestmark = hopper_only

EVERY_NAME = pytest.mark.parametrize("r", NAMED.values(), ids=NAMED)
PLAIN = pytest.mark.parametrize("r", FEW.values(), ids=FEW)
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
WIDE_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module", autouse=True)
def compiled():
    mma_cases.compile_everything()


# ---- rows that see no key


def soil_shared_memory(r, dtype, head_dims):
    """Every multiprocessor's shared memory full of an earlier call's numbers: V of NaN, K and Q of their largest."""
    heads, rows = (4, 32), 384  # three blocks a head, or two: more than a card runs at once
    signs = torch.ones(*heads, rows, head_dims[0], dtype=dtype, device=DEVICE)
    signs[:, :, ::2, ::3] = -1
    out, _ = run(signs, signs[:, :, :128], signs.new_full((*heads, 128, head_dims[1]), torch.nan), r)
    assert out.isnan().all()


@pytest.mark.parametrize("head_dims", [(128, 128), (64, 64), (72, 72)])
@pytest.mark.parametrize(
    ("blind", "keys"), [(1, 300), (63, 64), (130, 70), (138, 1), (266, 129), (400, 300), (871, 129)]
)
@EVERY_NAME
def test_rows_that_see_no_key(r, blind, keys, head_dims):
    """More queries than keys, bottom-right: the first rows see none, so O = 0 (no v̄) and lse = −∞.

    Also whole thread blocks of such rows, just before the first key (138, 266) and far from it; and with another call's
    numbers in shared memory, which they must not take for keys.
    """
    r = r.replace(smooth_v=True)
    q, k, v = inputs("v_mean", torch.float32, heads=(2, 1), lengths=(keys + blind, keys), head_dims=head_dims)
    soil_shared_memory(r, torch.float32, head_dims)
    out, lse = run(q, k, v, r, is_causal=True)
    assert not out[:, :, :blind].any()
    assert (lse[:, :, :blind] == -torch.inf).all()
    assert out.isfinite().all()
    assert lse[:, :, blind:].isfinite().all()
    # the first row that sees one: V of that key, but for rounding
    first = out[:, :, blind].double() - v[:, :, :1].double().squeeze(2)
    assert float((first.abs() / v.abs().amax(dim=2)).max()) <= 2.0**-4
    assert same(answers(q, k, v, r, is_causal=True), (out, lse))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("causal", ["bottom_right", "top_left"])
@PLAIN
def test_the_rows_that_do_are_right(r, causal, dtype):
    q, k, v = inputs("v_mean", dtype, heads=(4, 2), lengths=(1000, 129), head_dims=(72, 72))
    r = r.replace(smooth_v=True)
    soil_shared_memory(r, dtype, (72, 72))
    assert_agrees(q, k, v, r, is_causal=True, causal_alignment=causal)


# ---- large and small


@pytest.mark.parametrize("magnitude", [1e-30, 1e-18, 1e-6, 1e2, 1e3, 1e4, 1e6, 1e9, 1e12, 1e15, 1e18])
@WIDE_DTYPES
@PLAIN
def test_finite_in_finite_out(r, dtype, magnitude):
    """Q, K and V of any size with logits that float32 holds: no NaN, no infinity, and no sum that has lost its terms.

    Up to magnitudes of 10³, logits of 10⁶, float32 tells logits apart: the output errs like the method's. One key then
    takes a row, the same as in the reference, but its P may be below P_r and so rounded to E4M3 where the reference's
    is exact: half as much error again.
    """
    q, k, v = (magnitude * t for t in inputs("normal", dtype, heads=(2, 2), lengths=(200, 200), head_dims=(64, 64)))
    out, lse = answers(q, k, v, r)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert float(out.abs().max()) <= 2.0 * float(v.abs().max())  # a subnormal P may be rounded to twice itself
    assert float(out.float().abs().mean()) >= 0.03 * float(v.float().abs().mean())  # a mean of 200 keys: 1 / √200
    if magnitude <= 1e3:
        ref = reference(q, k, v, r)
        true, _ = exact(q, k, v, sm_scale=1 / 8)
        assert compare(true, out).l1 <= 1.5 * compare(true, ref.out).l1 + torch.finfo(dtype).eps


LARGE = {
    "Q": (1.0, 0.0), "K": (0.0, 1.0),  # powers of the type's largest number: Q, K
    "Q, K small": (1.0, -0.8), "K, Q small": (-0.8, 1.0), "Q, K tiny": (1.0, -1.0), "K, Q tiny": (-1.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("powers", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@EVERY_NAME
def test_the_largest_numbers_of_q_and_k(r, dtype, powers):
    """Up to the type's largest, as long as the logits stay inside float32: finite, and rows of P sum to 1."""
    q, k, v = inputs("normal", torch.float32, heads=(2, 2), lengths=(200, 300), head_dims=(64, 64))
    largest = torch.finfo(dtype).max
    # 1 / 4096: logits, 64 products of up to 5 · 5 times that, stay below the largest float
    q, k = ((t.clamp(-5, 5) / 5 * largest**power).to(dtype) for t, power in zip((q, k), powers, strict=True))
    v = torch.ones_like(v, dtype=dtype)
    out, lse = answers(q, k, v, r, sm_scale=1 / 4096)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert float((out.float() - 1).abs().max()) <= (2.0**-4 if r.row_sum == "unrounded" else 2.0**-7)


@EVERY_NAME
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_v_up_to_the_largest_number(r, dtype):
    """V at its type's largest number: rounding P up must not push the output over the edge."""
    q, k, v = inputs("normal", dtype, heads=(2, 2), lengths=(200, 200))
    v = torch.finfo(dtype).max * v.sign()
    out, lse = answers(q, k, v, r)
    assert out.isfinite().all()
    constant, _ = answers(q, k, torch.full_like(v, torch.finfo(dtype).max), r)
    assert constant.isfinite().all()
    assert float(constant.float().min()) >= 0.9 * torch.finfo(dtype).max
    assert lse.isfinite().all()


@PLAIN
def test_the_lse_of_one_key_is_its_logit(r):
    """K − k̄ is zero then, so nothing of the logit is quantised: only float32 sums of q · k̄ are between the two."""
    q, k, v = inputs("qkv_bias", lengths=(200, 1), head_dims=(64, 64))
    q = 20 * q
    _, lse = answers(q, k, v, r)
    products = q.double() * k.double() / 8
    assert ((lse - products.sum(-1)).abs() <= 1e-5 * (1 + products.abs().sum(-1))).all()


@PLAIN
def test_keys_of_zeros_beside_small_keys(r):
    """Padding keys of zeros make scale groups of nothing, whose δ = 1 must not make their logits coarser than the rest.

    (Q large and K small: the logits are ordinary, and δ = 1 is far above K's own scales.)
    """
    r = r.replace(smooth_k=False)
    q, k, v = inputs("normal", torch.float32, lengths=(200, 256), head_dims=(64, 64))
    q, k = 64 * q, k / 64
    k[:, :, 128:] = 0
    out, lse = answers(q, k, v, r)
    true, true_lse = exact(q, k, v, sm_scale=1 / 8)
    ref = reference(q, k, v, r)
    # (at 4 bits the other keys' units, .03, move P by some hundredths: a tenth of the method's error at most)
    assert compare(true, out).l1 <= (1.1 if r.qk_bits == 4 else 1.05) * compare(true, ref.out).l1
    theirs, ours = (float((x.double() - true_lse).abs().max()) for x in (ref.lse, lse))
    assert ours <= 1.05 * theirs + (0.1 if r.qk_bits == 4 else 1e-3)


@EVERY_NAME
@pytest.mark.parametrize("where", ["q", "rows of q", "k", "q and k"])
def test_zeros(r, where):
    """Q or K of zeros: attention is the mean of V over the keys, and lse the logarithm of their number.

    (Rows of Q alone are quantised, less q̄, where Q is smoothed: not zeros any more.)
    """
    r = r.replace(smooth_q=False) if where == "rows of q" else r
    q, k, v = inputs("v_mean", torch.float32, lengths=(130, 300), head_dims=(64, 64))
    if "k" in where:
        k.zero_()
    if "q" in where:
        q[:, :, : 64 if "rows" in where else None] = 0
    out, lse = answers(q, k, v, r)
    rows = slice(64 if "rows" in where else None)
    mean = v.mean(dim=2, keepdim=True)
    # E4M3's rounding of V, 1 / 16 at most and random
    assert float(((out - mean).abs() / mean.abs())[:, :, rows].max()) <= 0.02
    assert float((lse[:, :, rows] - math.log(300)).abs().max()) <= 0.01


@EVERY_NAME
@pytest.mark.parametrize("smooth_v", [False, True])
def test_constant_keys_and_values(r, smooth_v):
    """All keys alike: K − k̄ is zero, so the output is the mean of V, and lse the one logit and the logarithm of 256."""
    r = r.replace(smooth_v=smooth_v)
    q, k, v = inputs("qkv_bias", torch.float32, lengths=(130, 256))
    k = k[:, :, :1].expand(k.shape).contiguous()
    out, lse = answers(q, k, v, r)
    logits = torch.einsum("bhnd,bhd->bhn", q.double(), k[:, :, 0].double()) / math.sqrt(128)
    if r.smooth_k:  # 256 equal numbers: every sum on the way is exact
        assert float((lse - logits - math.log(256)).abs().max()) <= 1e-4
        mean, spread = v.mean(dim=2, keepdim=True), v.abs().amax(dim=2, keepdim=True)
        assert float(((out - mean).abs() / spread).max()) <= 0.01  # V's own rounding, random over 256 keys
    constant = v[:, :, :1].expand(v.shape).contiguous()
    out, _ = answers(q, k, constant, r)
    error = (out - constant[:, :, :1]).abs() / constant[:, :, :1].abs()
    assert float(error.max()) <= (2.0**-20 if smooth_v else 2.0**-4)


# ---- what is not finite


def spoilt(r, change):
    """Outputs and lse before and after ``change(q, k, v)``, and the changed tensors; causal, 4 heads of Q, 2 of K."""
    q, k, v = inputs("normal", heads=(4, 2), lengths=(300, 300))
    before = answers(q, k, v, r, is_causal=True)
    change(q, k, v)
    return before, answers(q, k, v, r, is_causal=True), (q, k, v)


@BAD
@EVERY_NAME
def test_a_bad_number_of_v_shows_in_its_channel(r, bad):
    """In every row of the heads that read it (its scale is the channel's), and nowhere else."""

    def change(q, k, v):
        v[0, 1, 137, 9] = bad

    (out, lse), (spoilt_out, spoilt_lse), _ = spoilt(r, change)
    assert spoilt_out[:, 2:, :, 9].isnan().all()
    spoilt_out[:, 2:, :, 9] = out[:, 2:, :, 9]
    assert same((spoilt_out, spoilt_lse), (out, lse))


@BAD
@pytest.mark.parametrize("token", [0, 150])
@PLAIN
def test_a_bad_number_of_k_shows_in_the_rows_that_see_it(r, bad, token):
    """In the rows that see a key of its scale group, as NaN does in the reference; the others are right."""

    def change(q, k, v):
        k[0, 1, token, 9] = bad

    (out, lse), (spoilt_out, spoilt_lse), (q, k, v) = spoilt(r, change)
    assert same((spoilt_out[:, :2], spoilt_lse[:, :2]), (out[:, :2], lse[:, :2]))
    k[0, 1, token, 9] = math.nan
    ref = reference(q, k, v, r, causal_offset=0)
    assert ref.out[:, 2:, token:].isnan().all()
    assert torch.equal(spoilt_out.isnan(), ref.out.isnan())
    assert torch.equal(spoilt_lse.isfinite(), ref.lse.isfinite())
    right = ref.lse.isfinite()
    # bfloat16's rounding is 0.0014; at 4 bits the fast way's units and flips are 0.06 (mma_cases derives them)
    assert compare(ref.out, spoilt_out, rows=right).l1 < (0.1 if r.qk_bits == 4 else 0.01)
    assert float((spoilt_lse - ref.lse)[right].abs().max()) < (0.15 if r.qk_bits == 4 else 0.01)


SPOILT = ((0, 0, 0), (0, 1, 5), (0, 1, 6), (0, 3, 64), (0, 2, -1))
"""Batch, head, row."""


def spoilt_rows(lse):
    found = torch.zeros_like(lse, dtype=torch.bool)
    for row in SPOILT:
        found[row] = True
    return found


def assert_alone(answer, rows, want):
    """NaN in these rows; in the others what is wanted, bit for bit."""
    for got, wanted in zip(answer, want, strict=True):
        of = rows if got.dim() == 3 else rows[..., None].expand_as(got)
        assert torch.equal(got.isnan(), of)
        assert torch.equal(got[~of], wanted[~of])


@BAD
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@EVERY_NAME
def test_a_bad_number_of_q_shows_in_its_row(r, causal, bad):
    """And in no other: those are as if that row were zeros, and not in q̄ where Q is smoothed."""
    q, k, v = inputs("normal", heads=(4, 2), lengths=(300, 300))
    for row in SPOILT:
        q[row] = 0
    want = answers(q, k, v, r, is_causal=causal)
    rows = spoilt_rows(want[1])
    for row in SPOILT:
        q[row] = 7
        q[(*row, 9)] = bad
    got = answers(q, k, v, r, is_causal=causal)
    if not r.smooth_q:
        assert_alone(got, rows, want)
        return
    assert torch.equal(got[0].isnan(), rows[..., None].expand_as(got[0]))
    assert torch.equal(got[1].isnan(), rows)
    mean = in_spoilt_memory(q, k, v, r)[2]
    torch.testing.assert_close(mean, tile_mean(q.float().masked_fill(rows[..., None], 0), 128, ~rows))
    ref = reference(q, k, v, r, causal_offset=0 if causal else None)
    assert compare(ref.out, got[0], rows=~rows).l1 < (0.1 if r.qk_bits == 4 else 0.01)  # (as K's above)


@BAD
@EVERY_NAME
def test_at_the_end_of_q_it_is_as_if_q_ended_before(r, bad):
    q, k, v = inputs("normal", heads=(4, 2), lengths=(300, 300))
    want = answers(q[:, :, :-3], k, v, r)
    q[:, :, -3:, 9] = bad
    out, lse = answers(q, k, v, r)
    assert same((out[:, :, :-3].contiguous(), lse[:, :, :-3].contiguous()), want)
    assert out[:, :, -3:].isnan().all()
    assert lse[:, :, -3:].isnan().all()


@EVERY_NAME
def test_a_block_of_nothing_else(r):
    q, k, v = inputs("normal", heads=(4, 2), lengths=(600, 300))
    want = answers(q, k, v, r)
    q[:, :2, :256, 100] = math.nan
    rows = torch.zeros_like(want[1], dtype=torch.bool)
    rows[:, :2, :256] = True
    assert_alone(answers(q, k, v, r), rows, want)


@BAD
@pytest.mark.parametrize("where", ["q", "k"])
@PLAIN
def test_lse_is_nan_where_every_logit_is(r, where, bad):
    """Not −∞, which would say that the row sees no key and that its part of an attention may be left out."""

    def change(q, k, v):
        (q if where == "q" else k)[0, :, 0] = bad

    _, (out, lse), _ = spoilt(r, change)
    assert out[:, :, 0].isnan().all()
    assert lse[:, :, 0].isnan().all()


@BAD
def test_what_a_careful_and_a_fast_call_do_with_it_is_the_same(bad):
    """NaN goes through both ways: integers compared as floats in the one, floats in the other."""
    r = recipe("sage2_8b:smooth_q=true")
    q, k, v = inputs("normal", heads=(2, 2), lengths=(256, 512))
    k[0, 1, 130, 5] = bad
    fast, careful = answers(q, k, v, r), answers(q, k, v, r, carefully=True)
    for out, lse in (fast, careful):
        assert out[:, 1].isnan().all()
        assert lse[:, 1].isnan().all()
        assert out[:, 0].isfinite().all()

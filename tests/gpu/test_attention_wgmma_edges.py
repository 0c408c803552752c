"""The Hopper kernel where numbers end: rows that see nothing, zeros, the largest and the smallest, NaN and infinity."""

import math

import pytest
import torch

pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")

import wgmma_cases
from kernel_cases import DTYPES, hopper_only, inputs, same
from wgmma_cases import TESTED, assert_agrees, reference, run

from lowbit_attention import compare
from lowbit_attention.recipes.options import AllTokens
from lowbit_attention.reference.exact import exact

pytestmark = hopper_only

EVERY_RECIPE = pytest.mark.parametrize("r", TESTED.values(), ids=TESTED)
PLAIN = pytest.mark.parametrize("r", [TESTED[n] for n in ("sage2_8b", "sage2pp_8b", "fast_8b")], ids=str)
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


@pytest.fixture(scope="module", autouse=True)
def compiled():
    wgmma_cases.compile_everything()


@pytest.mark.parametrize("causal", ["bottom_right", "top_left"])
@EVERY_RECIPE
def test_rows_that_see_no_key(r, causal):
    """More queries than keys, bottom-right: the first rows see none, so O = 0 (no v̄) and lse = −∞."""
    q, k, v = inputs("v_mean", lengths=(700, 300))
    out, lse = run(q, k, v, r, is_causal=True, causal_alignment=causal)
    blind = 400 if causal == "bottom_right" else 0
    assert not out[:, :, :blind].any()
    assert (lse[:, :, :blind] == -torch.inf).all()
    assert lse[:, :, blind:].isfinite().all()
    assert_agrees(out, lse, q, k, v, r, causal_offset=-400 if causal == "bottom_right" else 0)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-18, 1e-6, 1e2, 1e3, 1e4, 1e6, 1e9, 1e12, 1e15, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@PLAIN
def test_finite_in_finite_out(r, dtype, magnitude):
    """Q, K and V of any size with logits that float32 holds: no NaN, no infinity, and no sum that has lost its terms.

    Up to magnitudes of 10³, logits of 10⁶, float32 tells logits apart: the output errs like the method's. One key then
    takes a row, the same as in the reference, but its P may be ``BASE_ERROR`` units of s below P_r and so rounded to
    E4M3 where the reference's is exact: half as much error again.
    """
    q, k, v = (magnitude * t for t in inputs("normal", dtype, heads=(2, 2), lengths=(200, 200), head_dims=(64, 64)))
    out, lse = run(q, k, v, r)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert float(out.abs().max()) <= 2.0 * float(v.abs().max())  # a subnormal P may be rounded to twice itself
    assert float(out.float().abs().mean()) >= 0.03 * float(v.float().abs().mean())  # a mean of 200 keys: 1 / √200
    if magnitude <= 1e3:
        ref = reference(q, k, v, r)
        true, _ = exact(q, k, v, sm_scale=1 / 8)
        assert compare(true, out).l1 <= 1.5 * compare(true, ref.out).l1 + torch.finfo(dtype).eps


@PLAIN
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_v_up_to_the_largest_number(r, dtype):
    """V at its type's largest number: rounding P up must not push the output over the edge."""
    q, k, v = inputs("normal", dtype, heads=(2, 2), lengths=(200, 200))
    v = torch.finfo(dtype).max * v.sign()
    out, lse = run(q, k, v, r)
    assert out.isfinite().all()
    constant, _ = run(q, k, torch.full_like(v, torch.finfo(dtype).max), r)
    assert constant.isfinite().all()
    assert float(constant.float().min()) >= 0.9 * torch.finfo(dtype).max
    assert lse.isfinite().all()


@PLAIN
def test_the_lse_of_one_key_is_its_logit(r):
    """K − k̄ is zero then, so nothing of the logit is quantised: only float32 sums of q · k̄ are between the two."""
    q, k, v = inputs("qkv_bias", lengths=(200, 1), head_dims=(64, 64))
    q = 20 * q
    _, lse = run(q, k, v, r)
    products = q.double() * k.double() / 8
    assert ((lse - products.sum(-1)).abs() <= 1e-5 * (1 + products.abs().sum(-1))).all()


@PLAIN
def test_keys_of_zeros_beside_small_keys(r):
    """Padding keys of zeros make scale groups of nothing, whose δ = 1 must not make their logits coarser than the rest.

    (Q large and K small: the logits are ordinary, and δ = 1 is far above K's own scales.)
    """
    r = r.replace(smooth_k=False, k_sample=AllTokens())
    q, k, v = inputs("normal", torch.float32, lengths=(200, 256), head_dims=(64, 64))
    q, k = 64 * q, k / 64
    k[:, :, 128:] = 0
    out, lse = run(q, k, v, r)
    true, true_lse = exact(q, k, v, sm_scale=1 / 8)
    ref = reference(q, k, v, r)
    assert compare(true, out).l1 <= 1.05 * compare(true, ref.out).l1
    theirs, ours = (float((x.double() - true_lse).abs().max()) for x in (ref.lse, lse))
    assert ours <= 1.05 * theirs + 1e-3


@EVERY_RECIPE
@pytest.mark.parametrize("where", ["q", "rows of q", "k", "q and k"])
def test_zeros(r, where):
    """Q or K of zeros: attention is the mean of V over the keys, and lse the logarithm of their number."""
    q, k, v = inputs("v_mean", torch.float32, lengths=(130, 300), head_dims=(64, 64))
    if "k" in where:
        k.zero_()
    if "q" in where:
        q[:, :, : 64 if "rows" in where else None] = 0
    out, lse = run(q, k, v, r)
    rows = slice(64 if "rows" in where else None)
    mean = v.mean(dim=2, keepdim=True)
    # E4M3's rounding of V, 1 / 16 at most and random, and of a P that BASE_ERROR units of s bring below P_r
    assert float(((out - mean).abs() / mean.abs())[:, :, rows].max()) <= 0.02
    assert float((lse[:, :, rows] - math.log(300)).abs().max()) <= 0.01


# ---- what is not finite


def spoilt(r, change):
    """Outputs and lse before and after ``change(q, k, v)``, and the changed tensors; causal, 4 heads of Q, 2 of K."""
    q, k, v = inputs("normal", heads=(4, 2), lengths=(300, 300))
    before = run(q, k, v, r, is_causal=True)
    change(q, k, v)
    return before, run(q, k, v, r, is_causal=True), (q, k, v)


@BAD
@PLAIN
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
    assert compare(ref.out, spoilt_out, rows=right).l1 < 0.01  # (bfloat16's rounding is 0.0014)
    assert float((spoilt_lse - ref.lse)[right].abs().max()) < 0.01


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
@pytest.mark.parametrize(
    ("lengths", "causal"), [((300, 300), True), ((300, 300), False), ((70, 9000), False)], ids=["causal", "", "long"]
)
@PLAIN
def test_a_bad_number_of_q_shows_in_its_row(r, lengths, causal, bad):
    """And in no other: those are as if that row were zeros (whether keys are split or not)."""
    q, k, v = inputs("normal", heads=(4, 2), lengths=lengths)
    for row in SPOILT:
        q[row] = 0
    want = run(q, k, v, r, is_causal=causal)
    for row in SPOILT:
        q[row] = 7
        q[(*row, 9)] = bad
    assert_alone(run(q, k, v, r, is_causal=causal), spoilt_rows(want[1]), want)


@BAD
@PLAIN
def test_at_the_end_of_q_it_is_as_if_q_ended_before(r, bad):
    q, k, v = inputs("normal", heads=(4, 2), lengths=(300, 300))
    want = run(q[:, :, :-3], k, v, r)
    q[:, :, -3:, 9] = bad
    out, lse = run(q, k, v, r)
    assert same((out[:, :, :-3].contiguous(), lse[:, :, :-3].contiguous()), want)
    assert out[:, :, -3:].isnan().all()
    assert lse[:, :, -3:].isnan().all()


@PLAIN
def test_a_block_of_nothing_else(r):
    q, k, v = inputs("normal", heads=(4, 2), lengths=(600, 300))
    want = run(q, k, v, r)
    q[:, :2, :256, 100] = math.nan
    rows = torch.zeros_like(want[1], dtype=torch.bool)
    rows[:, :2, :256] = True
    assert_alone(run(q, k, v, r), rows, want)


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

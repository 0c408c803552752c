"""Measuring recipes: a sample of query tiles gives the digits of the whole, and errors are pooled as documented."""

import math

import pytest
import torch

from lowbit_attention import RECIPES, InvalidArgumentError, UnsupportedError, compare, recipe
from lowbit_attention.call.masks import Masking
from lowbit_attention.evaluation.errors import Case, Grid, HeadErrors, sampled_rows, with_mean_of_all
from lowbit_attention.evaluation.synthetic import make
from lowbit_attention.recipes.machine import resolve_machine
from lowbit_attention.reference.attention import emulate
from lowbit_attention.reference.exact import exact

SPECS = (
    "sage2_8b", "fast_8b", "sage2pp_4b", "sage2_v1_4b", "smooth_attn", "sage1", "int8_u8", "rotated_4b",
    "sage2_4b:q_granularity=per_tensor,k_granularity=per_tensor",
)  # fmt: skip


def uneven(length=700, kv_len=900, heads=2, head_dim=32):
    """Q tiles cut at the end, fewer K heads, outlying tokens."""
    q, _, _ = make("two_segments", heads=2 * heads, length=length, head_dim=head_dim)
    _, k, v = make("outlier_tokens", heads=heads, length=kv_len, head_dim=head_dim, seed=1)
    return q, k, v


@pytest.mark.parametrize("like", ["sm_89", "sm_90a"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_some_query_tiles_are_those_of_the_whole(spec, causal, like):
    q, k, v = uneven()
    machine = resolve_machine(like)
    tile = machine.geometry.b_q
    rows = torch.cat([torch.arange(tile, 2 * tile), torch.arange(700 // tile * tile, 700)])
    masking = Masking(-150 if causal else None)  # the first rows see nothing, the last not all keys
    options = {"sm_scale": 0.2, "masking": masking, "machine": machine}
    whole, some = (emulate(q, k, v, recipe(spec), **options, rows=r) for r in (None, rows))
    # (a float32 product of other rows may be summed in another order, which flips single roundings of P)
    assert compare(whole.out[:, :, rows], some.out).l1 < 1e-3
    torch.testing.assert_close(some.lse, whole.lse[:, :, rows], rtol=0, atol=1e-3)


def test_a_mask_follows_the_rows():
    q, k, v = uneven()
    mask = torch.rand(1, 1, 700, 900, generator=torch.Generator().manual_seed(0)) < 0.7
    rows = torch.arange(128, 384)
    whole, some = (emulate(q, k, v, RECIPES["fast_8b"], sm_scale=0.2, masking=Masking(None, mask), rows=r).out
                   for r in (None, rows))  # fmt: skip
    assert compare(whole[:, :, rows], some).l1 < 1e-3
    some, _ = exact(q[:, :, rows], k, v, sm_scale=0.2, masking=Masking(100, mask).of_rows(rows))
    whole, _ = exact(q, k, v, sm_scale=0.2, masking=Masking(100, mask))
    torch.testing.assert_close(some, whole[:, :, rows], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("length", "wanted", "first_of_tiles"),
    [(1024, 64, [512]), (1024, 65, [256, 768]), (1024, 256, [128, 384, 640, 896]), (100, 64, [64]), (60, 1, [0])],
)
def test_sampled_rows_are_whole_tiles_spread_evenly(length, wanted, first_of_tiles):
    expected = [row for first in first_of_tiles for row in range(first, min(first + 64, length))]
    assert sampled_rows(length, 64, wanted).tolist() == expected


def test_all_rows_if_there_are_no_more():
    assert sampled_rows(1000, 128, 5000).tolist() == list(range(1000))
    with pytest.raises(InvalidArgumentError, match="query_rows=0"):
        sampled_rows(10, 64, 0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_case_measures_its_rows(causal):
    """Against the whole output and an exact attention of our own, on the rows it says."""
    q, k, v = uneven(700, 600)  # (causal: the first 100 rows see nothing)
    case = Case(q, k, v, resolve_machine("sm_90a"), is_causal=causal, query_rows=100)
    assert case.rows is not None
    assert case.rows.tolist() == [*range(128, 192), *range(512, 576)]
    logits = (q.double() @ k.double().repeat_interleave(2, dim=1).mT) / math.sqrt(32)
    if causal:
        logits = logits.masked_fill(torch.ones(700, 600).triu(-99).bool(), -math.inf)
    true = (logits.softmax(dim=-1) @ v.double().repeat_interleave(2, dim=1))[:, :, case.rows]
    torch.testing.assert_close(case.exact, true, rtol=0, atol=1e-12)
    out = case.emulated(RECIPES["sage2_8b"])
    assert case.metrics(out) == compare(case.exact, out)
    assert case.by_head(out).l1 == pytest.approx(compare(true, out).l1)
    assert compare(true, case.emulated(RECIPES["exact"])).l1 < 1e-6


def test_rows_that_see_nothing_do_not_count():
    q, k, v = uneven(700, 600)
    case = Case(q, k, v, is_causal=True)
    out = case.emulated(RECIPES["sage2_8b"])
    assert case.metrics(out).rmse == compare(case.exact[:, :, 100:], out[:, :, 100:]).rmse
    out[:, :, :100] = 7.0
    assert case.by_head(out).l1 < 0.1


def test_no_kernel_is_said_and_not_emulated():
    with pytest.raises(UnsupportedError, match="no kernel runs recipe sage2_8b"):
        Case(*uneven()).by_kernel(RECIPES["sage2_8b"])


def test_what_cannot_attend_is_refused():
    q, k, v = uneven()
    with pytest.raises(InvalidArgumentError, match="different lengths"):
        Case(q, k, v[:, :, 1:])


def test_pooled_errors():
    """Of ratios of sums; the standard error is the jackknife's for small spreads."""
    g = torch.Generator().manual_seed(0)
    total = 10 + torch.rand(4, 50, generator=g, dtype=torch.float64)
    wrong = 0.1 * total + 0.05 * torch.randn(4, 50, generator=g, dtype=torch.float64)
    errors = HeadErrors(wrong, total)
    a, b = wrong.flatten(), total.flatten()
    without_one = (a.sum() - a) / (b.sum() - b)
    jackknife = float(((without_one - without_one.mean()) ** 2).sum() * 199 / 200) ** 0.5
    assert errors.l1 == pytest.approx(float(a.sum() / b.sum()))
    assert errors.standard_error == pytest.approx(jackknife, rel=0.01)
    twice = HeadErrors(2 * wrong, total)
    assert twice.times(errors) == (pytest.approx(2.0), pytest.approx(0.0, abs=1e-12))  # paired: the same luck
    assert HeadErrors(wrong[:1, :1], total[:1, :1]).standard_error is None
    assert HeadErrors(wrong, 0 * total).l1 == math.inf


def test_a_grid_keeps_families_apart():
    grid = Grid(heads=2, seeds=2, head_dim=32, query_rows=64)
    machine = resolve_machine("sm_90a")
    labels = {"8": RECIPES["sage2_8b"], "4": RECIPES["sage2_4b"]}
    together = grid.measure(["normal", "v_mean"], 300, labels, machine)
    assert list(together) == [(f, r) for r in labels for f in ("normal", "v_mean")]
    for family in ("normal", "v_mean"):
        alone = grid.measure([family], 300, labels, machine)
        for label in labels:
            assert together[family, label].wrong.shape == (2, 2)
            assert together[family, label].l1 == pytest.approx(alone[family, label].l1, rel=1e-3)
    assert together["v_mean", "8"].l1 < 0.1 * together["normal", "8"].l1


def test_inputs_are_rounded_to_bfloat16():
    case = Grid(heads=1, seeds=1, head_dim=32).case(["normal"], 64, resolve_machine(None))
    assert case.q.dtype == torch.bfloat16
    assert torch.equal(
        case.v[0, 0].float(), make("normal", heads=1, length=64, head_dim=32)[2][0, 0].bfloat16().float()
    )


def test_the_same_mean_for_all():
    changed = with_mean_of_all(RECIPES["fast_8b"])
    assert str(changed.k_sample) == "all"
    assert changed.replace(name="x", k_sample=RECIPES["fast_8b"].k_sample) == RECIPES["fast_8b"]

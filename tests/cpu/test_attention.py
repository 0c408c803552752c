"""Quantised attention has the method's error, no more and no less, with every feature; and the features agree.

The oracle is exact attention in float64 (`reference.exact`, itself proved in test_exact.py) on the unquantised
inputs. Identities between features hold bitwise where the arithmetic is the same, else to the rounding named there.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_attention import RECIPES, attention, attention_varlen, compare
from lowbit_attention.call.masks import Masking
from lowbit_attention.evaluation.synthetic import make
from lowbit_attention.reference.exact import exact

# Relative L1 on independent N(0, 1) inputs. E4M3 has 3 fraction bits: P and V each err by .0265 rms, together .0375.
# An integer step A / qmax (A the largest of a group, 3.0 … 3.9 σ) moves a logit by √(A_q² + A_k²) / (qmax √12), and L1
# as much: .0108 for INT8 per thread, .0135 per block, .20 and .22 (per warp) for INT4.
L1 = {
    "sage1": 0.0135,  # Q·K alone: FP16 P and V err by 2⁻¹²
    "sage2_v1_4b": 0.22,
    "sage2_8b": 0.037,  # algorithm.md §4
    "sage2_4b": 0.20,  # algorithm.md §4
    "sage2pp_8b": 0.037,  # algorithm.md §7: the (P_r, V_r) pairs agree within 3 %
    "sage2pp_4b": 0.20,
    "smooth_attn": 0.20,  # algorithm.md §4: on pure normal inputs whatever is smoothed
    "hadamard_attn": 0.20,
    "rotated_4b": 0.20,
    "int8_fp16": 0.0108,
    "int8_u8": 0.016,  # algorithm.md §4
    "fast_8b": 0.037,
}
SLACK = 1.5  # the figures are means over n = 640, d = 128; here are fewer samples
QUANTIZED = sorted(set(RECIPES) - {"exact"})


def qk_error(recipe: str) -> float:
    """Standard deviation of a logit's error, from the derivation above."""
    return {"sage1": 0.0135, "sage2_v1_4b": 0.22}.get(recipe, 0.0108 if RECIPES[recipe].qk_bits == 8 else 0.20)


def test_every_recipe_has_a_figure() -> None:
    assert sorted(L1) == QUANTIZED


def inputs(
    batch: int = 1, heads: int = 4, kv_heads: int | None = None, q_len: int = 150, kv_len: int = 200, d: int = 64,
    dv: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    kv = (batch, kv_heads or heads, kv_len)
    shapes = ((batch, heads, q_len, d), (*kv, d), (*kv, dv or d))
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    return q, k, v


def bitwise(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def random_mask(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5


def alibi(heads: int, q_len: int, kv_len: int) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, heads + 1)
    distance = (torch.arange(q_len)[:, None] - torch.arange(kv_len)).abs()
    return -slopes[:, None, None] * distance


BOTTOM_RIGHT = {"is_causal": True}
TOP_LEFT = {"is_causal": True, "causal_alignment": "top_left"}
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "two_batches": ({"batch": 2, "heads": 2}, {}),
    "decode": ({"q_len": 1, "heads": 16, "kv_len": 300}, {}),
    "more_queries": ({"q_len": 300, "kv_len": 70}, {}),
    "d1": ({"d": 1, "dv": 32}, {}),
    "d5": ({"d": 5, "dv": 32}, {}),
    "d96_dv40": ({"d": 96, "dv": 40}, {}),
    "d256": ({"d": 256}, {}),
    "gqa": ({"heads": 6, "kv_heads": 2}, {}),
    "mqa": ({"kv_heads": 1}, {}),
    "bottom_right": ({}, BOTTOM_RIGHT),
    "bottom_right_more_queries": ({"q_len": 200, "kv_len": 150}, BOTTOM_RIGHT),
    "top_left": ({}, TOP_LEFT),
    "bool_mask": ({}, {"attn_mask": random_mask(4, 150, 200)}),
    "padding_mask": ({"batch": 2}, {"attn_mask": random_mask(2, 1, 1, 200)}),
    "alibi": ({}, {"attn_mask": alibi(4, 150, 200)}),
    "alibi_causal": ({}, {"attn_mask": alibi(4, 150, 200), **BOTTOM_RIGHT}),
    "scale": ({}, {"sm_scale": 0.1}),
    "fp16": ({"dtype": torch.float16}, {}),
    "bf16": ({"dtype": torch.bfloat16}, {}),  # rounding the output: 2⁻⁹, nothing beside the figures but int8_fp16's
    "hopper": ({}, {"like": "sm_90a"}),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("recipe", QUANTIZED)
def test_error_is_the_methods(recipe: str, feature: str) -> None:
    shape, options = FEATURES[feature]
    q, k, v = inputs(**shape)
    out, lse = attention(q, k, v, recipe=recipe, return_lse=True, **options)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    offset = None
    if options.get("is_causal"):
        offset = 0 if "causal_alignment" in options else k.shape[2] - q.shape[2]
    mask = options.get("attn_mask")
    mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    scale = options.get("sm_scale", q.shape[3] ** -0.5)
    want, want_lse = exact(q, k, v, sm_scale=scale, masking=Masking(offset, mask))
    seen = want_lse > -math.inf
    assert compare(want, out, rows=seen).l1 < SLACK * L1[recipe]
    assert (out[~seen] == 0).all()
    assert torch.equal(lse > -math.inf, seen)
    # The error of lse is a weighted mean of logit errors: at most, where one key is seen, that of one logit; 6 σ.
    assert (lse - want_lse)[seen].abs().max() < 6 * qk_error(recipe)


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_it_is_really_quantized(recipe: str) -> None:
    """A third of the method's error is more than anything that computes in full precision would show."""
    q, k, v = inputs()
    want, _ = exact(q, k, v, sm_scale=0.125)
    assert compare(want, attention(q, k, v, recipe=recipe)).l1 > L1[recipe] / 3


@pytest.mark.parametrize("smoothed", ["k_bias", "qk_bias"])
def test_smoothing_pays_where_channels_are_biased(smoothed: str) -> None:
    """algorithm.md §7, 4 bits, none against smooth Q and K: .578 → .206 and .899 → .188. At least half of it here."""
    q, k, v = make(smoothed, heads=2, length=256)
    want, _ = exact(q, k, v, sm_scale=128**-0.5)
    plain, smooth = (
        compare(want, attention(q, k, v, recipe=r)).l1 for r in ("sage2_4b:smooth_k=false,smooth_q=false", "sage2_4b")
    )
    assert smooth < plain / 2
    assert smooth < SLACK * 0.206


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_layouts_agree_bitwise(recipe: str) -> None:
    q, k, v = inputs(batch=2, heads=4, kv_heads=2, dv=40)
    mask = random_mask(4, 150, 200)
    out, lse = attention(q, k, v, recipe=recipe, attn_mask=mask, return_lse=True)
    nhd = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    other, other_lse = attention(*nhd, recipe=recipe, attn_mask=mask, return_lse=True, layout="NHD")
    assert other.shape == (2, 150, 4, 40)
    assert out.is_contiguous()
    assert other.is_contiguous()
    bitwise(other.transpose(1, 2), out)
    bitwise(other_lse, lse)


@pytest.mark.parametrize("recipe", sorted(set(QUANTIZED) - {"smooth_attn"}))  # its factor is shared by the group
@pytest.mark.parametrize("is_causal", [False, True])
def test_gqa_is_repeated_heads_bitwise(recipe: str, is_causal: bool) -> None:
    q, k, v = inputs(batch=2, heads=6, kv_heads=2)
    got = attention(q, k, v, recipe=recipe, is_causal=is_causal, return_lse=True)
    repeated = (t.repeat_interleave(3, dim=1) for t in (k, v))
    want = attention(q, *repeated, recipe=recipe, is_causal=is_causal, return_lse=True)
    bitwise(got[0], want[0])
    bitwise(got[1], want[1])


@pytest.mark.parametrize("recipe", QUANTIZED)
@pytest.mark.parametrize("is_causal", [False, True])
def test_varlen_is_each_sequence_on_its_own(recipe: str, is_causal: bool) -> None:
    """Bitwise, so statistics are per sequence: the sequences' K means are far apart."""
    g = torch.Generator().manual_seed(0)
    q_lens, k_lens = [70, 0, 3, 9], [130, 5, 0, 66]
    q = torch.randn(sum(q_lens), 4, 16, generator=g)
    k, v = (torch.randn(sum(k_lens), 2, d, generator=g) for d in (16, 9))
    k[:130] += 10
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0) for lens in (q_lens, k_lens))
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, recipe=recipe, is_causal=is_causal, return_lse=True)
    for i in range(4):
        rows, keys = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        one, one_lse = attention(
            q[rows][None], k[keys][None], v[keys][None],
            recipe=recipe, is_causal=is_causal, return_lse=True, layout="NHD",
        )  # fmt: skip
        bitwise(out[rows], one[0])
        bitwise(lse[:, rows], one_lse[0])


@pytest.mark.parametrize("recipe", QUANTIZED)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_is_slicing(recipe: str, kind: str, is_causal: bool) -> None:
    """Keys behind each sequence's end are huge: their values change nothing, bitwise, and slicing them off nothing
    but the order of fp32 sums, which can flip one rounding of an accumulator (2⁻¹¹ of Σ p|v| in FP16) at each of a
    tile's 4 steps: 2⁻⁹ · max|v|; lse has no such sum."""
    lengths, q_len, kv_len = [200, 130, 1], 90, 200
    q, k, v = inputs(batch=3, heads=2, q_len=q_len, kv_len=kv_len)
    valid = torch.arange(kv_len) < torch.tensor(lengths)[:, None]
    mask = valid[:, None, None, :]
    if kind == "float":
        mask = torch.where(mask, 0.0, -math.inf)
    options: dict[str, Any] = {"recipe": recipe, "return_lse": True, **(TOP_LEFT if is_causal else {})}
    out, lse = attention(q, k, v, attn_mask=mask, **options)
    hostile = [torch.where(valid[:, None, :, None], t, 1e30) for t in (k, v)]
    other, other_lse = attention(q, *hostile, attn_mask=mask, **options)
    bitwise(out, other)
    bitwise(lse, other_lse)
    for b, n in enumerate(lengths):
        one, one_lse = attention(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], **options)
        limit = 2.0**-9 * float(v[b, :, :n].abs().max())
        torch.testing.assert_close(out[b], one[0], rtol=0, atol=limit)
        torch.testing.assert_close(lse[b], one_lse[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_full_padding_mask_is_the_broadcast_one(recipe: str) -> None:
    q, k, v = inputs(batch=2, heads=2)
    mask = (torch.arange(200) < torch.tensor([[180], [33]]))[:, None, None, :]
    k = torch.where(mask.transpose(2, 3), k, 1e30)
    want = attention(q, k, v, recipe=recipe, attn_mask=mask)
    got = attention(q, k, v, recipe=recipe, attn_mask=mask.expand(2, 2, 150, 200).clone())
    # (the keys are left out, or zeros among the others: other tiles, and the tolerance of test_padding_is_slicing)
    torch.testing.assert_close(got, want, rtol=0, atol=2.0**-9 * float(v.abs().max()))


@pytest.mark.parametrize("recipe", QUANTIZED)
@pytest.mark.parametrize("options", [BOTTOM_RIGHT, TOP_LEFT], ids=["bottom_right", "top_left"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(150, 200), (200, 150)])
def test_causal_is_its_mask(recipe: str, options: dict[str, Any], q_len: int, kv_len: int) -> None:
    """Statistics are those of all keys either way. A causal run may leave tiles out, so the tolerance is that of
    test_padding_is_slicing."""
    q, k, v = inputs(q_len=q_len, kv_len=kv_len)
    shift = 0 if options is TOP_LEFT else kv_len - q_len
    mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(shift)
    out, lse = attention(q, k, v, recipe=recipe, return_lse=True, **options)
    want, want_lse = attention(q, k, v, recipe=recipe, return_lse=True, attn_mask=mask)
    torch.testing.assert_close(out, want, rtol=0, atol=2.0**-9 * float(v.abs().max()))
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    as_float = attention(q, k, v, recipe=recipe, attn_mask=torch.where(mask, 0.0, -math.inf))
    bitwise(as_float, want)


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_batches_and_heads_do_not_touch_each_other(recipe: str) -> None:
    q, k, v = inputs(batch=3, heads=4, kv_heads=4)
    out, lse = attention(q, k, v, recipe=recipe, return_lse=True)
    b, h = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    moved, moved_lse = attention(*(t[b][:, h] for t in (q, k, v)), recipe=recipe, return_lse=True)
    bitwise(moved, out[b][:, h])
    bitwise(moved_lse, lse[b][:, h])


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_strides_do_not_matter(recipe: str) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 99, 3 * 24, generator=g)[..., 2::3]  # last dim strided, storage offset
    k = torch.randn(1, 4, 150, 24, generator=g).expand(2, 4, 150, 24)  # stride 0
    v = torch.randn(24, 150, 2, 4, generator=g).permute(2, 3, 1, 0)
    got = attention(q, k, v, recipe=recipe, return_lse=True)
    want = attention(*(t.contiguous() for t in (q, k, v)), recipe=recipe, return_lse=True)
    bitwise(got[0], want[0])
    bitwise(got[1], want[1])


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_machines_differ(recipe: str) -> None:
    """Other tiles, other scales; that both are accurate is test_error_is_the_methods' 'plain' and 'hopper'."""
    q, k, v = inputs()
    ada, hopper = (attention(q, k, v, recipe=recipe, like=like) for like in ("sm_89", "sm_90a"))
    bitwise(ada, attention(q, k, v, recipe=recipe))
    assert not torch.equal(ada, hopper)


@pytest.mark.parametrize("recipe", ["sage2_8b", "sage2pp_8b", "int8_fp16", "int8_u8", "fast_8b", "sage1"])
def test_lse_is_precise_beside_a_large_mean(recipe: str) -> None:
    """k̄ = 3000 makes lse terms of size 3000 (q·k̄ in FP16 would be off by 24000 · 2⁻¹² / 8 = .7). A float32 dot product
    loses at most 64 · 2⁻²⁴ · Σ|q||k̄| · scale = .08 (Σ|q| ≤ 80 · 3000), on top of a logit's 6 σ."""
    q, k, v = inputs()
    out, lse = attention(q, k + 3000, v, recipe=recipe, return_lse=True)
    want, want_lse = exact(q, k + 3000, v, sm_scale=0.125)
    assert want_lse.abs().max() > 2000
    assert (lse - want_lse).abs().max() < 6 * qk_error(recipe) + 0.12
    assert compare(want, out).l1 < SLACK * L1[recipe]


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_rows_that_see_nothing_are_zero(recipe: str) -> None:
    """No mean of V is added to them, though it is 4 here; a batch without a single visible key, too."""
    q, k, v = inputs(batch=2)
    mask = random_mask(2, 1, 150, 200)
    mask[0, :, [0, 77, 149]] = False
    mask[1] = False
    out, lse = attention(q, k, v + 4, recipe=recipe, attn_mask=mask, return_lse=True)
    empty = ~mask.any(-1).expand(2, 4, 150)
    assert (out[empty] == 0).all()
    assert (lse[empty] == -math.inf).all()
    assert out[~empty].isfinite().all()
    assert lse[~empty].isfinite().all()


def test_calls_repeat_bitwise_and_leave_inputs_alone() -> None:
    q, k, v = inputs()
    copies = [t.clone() for t in (q, k, v)]
    for recipe in QUANTIZED:
        first = attention(q, k, v, recipe=recipe, is_causal=True)
        bitwise(first, attention(q, k, v, recipe=recipe, is_causal=True))
        assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True)), recipe

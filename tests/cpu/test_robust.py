"""What a caller's surroundings and extreme inputs must not change: each of these was wrong once."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lowbit_attention import RECIPES, attention, compare, explain, make_sdpa
from lowbit_attention.evaluation.synthetic import make

QUANTIZING = [name for name, r in RECIPES.items() if not r.is_exact]


def inputs(length=200, head_dim=32, family="normal"):
    return make(family, heads=2, length=length, head_dim=head_dim)


@pytest.mark.parametrize("name", ["sage2_8b", "sage2_4b", "int8_u8", "fast_8b", "rotated_4b"])
def test_autocast_changes_nothing(name):
    q, k, v = inputs()
    plain = attention(q, k, v, recipe=name, return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attention(q, k, v, recipe=name, return_lse=True)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_autocast_does_not_touch_the_exact_lse():
    q, k, v = inputs()
    plain = attention(q, k, v, recipe="exact", return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attention(q, k, v, recipe="exact", return_lse=True)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["int8_fp16", "fast_8b", "sage2_4b"])
def test_the_default_dtype_changes_nothing(name, dtype):
    q, k, v = inputs()
    plain = attention(q, k, v, recipe=name, return_lse=True)
    torch.set_default_dtype(dtype)
    try:
        again = inputs()
        other = attention(*again, recipe=name, return_lse=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip((q, k, v, *plain), (*again, *other), strict=True):
        assert torch.equal(a, b)


def test_the_matmul_precision_is_given_back():
    torch.set_float32_matmul_precision("medium")
    try:
        attention(*inputs(), recipe="sage2_8b")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("bias", [0.0, -3e6, 1e7, -1e8, 1e30])
@pytest.mark.parametrize("name", QUANTIZING)
def test_rows_of_p_sum_to_one_beside_any_constant_bias(name, bias):
    q, k, _ = inputs(length=300)
    v = torch.ones_like(k)
    out = attention(q, k, v, recipe=name, attn_mask=torch.full((1, 300), bias))
    # rounding P moves single terms by at most half a step of its format (2^-4 for E4M3), and the row sum of the
    # unrounded P does not follow it; FP16 sums add 2^-11 per 32 keys
    assert (out - 1).abs().max() < 2**-4


@pytest.mark.parametrize("name", QUANTIZING)
def test_rows_of_p_sum_to_one_at_huge_logits(name):
    q, k, _ = inputs(length=300)
    out = attention(4096 * q, 4096 * k, torch.ones_like(k), recipe=name)
    assert (out - 1).abs().max() < 2**-4


@pytest.mark.parametrize("hidden", [-math.inf, -10000.0, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_marked_by_a_large_bias_is_left_out_of_the_statistics(hidden, dtype):
    q, k, v = inputs(length=100)
    k[:, :, 70:], v[:, :, 70:] = 1000.0, -1000.0
    mask = torch.zeros(1, 1, 1, 100)
    mask[..., 70:] = hidden
    padded = attention(q, k, v, recipe="sage2_8b", attn_mask=mask.to(dtype))
    sliced = attention(q, k[:, :, :70], v[:, :, :70], recipe="sage2_8b")
    torch.testing.assert_close(padded, sliced, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", ["auto", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_mask_keeps_its_digits_beside_16_bit_inputs(recipe, dtype):
    q, k, v = (t.to(dtype) for t in inputs())
    mask = 200 + torch.randn(200, 200, generator=torch.Generator().manual_seed(0)) * 3
    out = attention(q, k, v, recipe=recipe, attn_mask=mask)
    exact = attention(q.double(), k.double(), v.double(), recipe="exact", attn_mask=mask.double())
    assert compare(exact, out).l1 < 2 ** (-8 if dtype == torch.bfloat16 else -11) * 2  # P, V and O in 16 bits


def test_a_single_query_sees_every_key_and_goes_to_torch():
    q, k, v = inputs()
    assert explain(q[:, :, -1:], k, v, is_causal=True).implementation == "torch_sdpa"
    last = attention(q, k, v, is_causal=True)[:, :, -1:]
    torch.testing.assert_close(attention(q[:, :, -1:], k, v, is_causal=True), last, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alignment", ["bottom_right", "top_left"])
def test_exact_attention_has_gradients_for_every_causality(alignment):
    q, k, v = (t.requires_grad_() for t in inputs(length=40))
    q = q[:, :, :25]
    visible = torch.ones(25, 40, dtype=torch.bool).tril(15 if alignment == "bottom_right" else 0)
    ours = attention(q, k, v, recipe="exact", is_causal=True, causal_alignment=alignment)
    theirs = scaled_dot_product_attention(q, k, v, attn_mask=visible)
    grads = [torch.autograd.grad(out.square().sum(), (k, v), retain_graph=True) for out in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_sdpa_with_mask_and_causality_has_gradients():
    q, k, v = (t.requires_grad_() for t in inputs(length=30))
    mask = torch.rand(30, 30, generator=torch.Generator().manual_seed(0)) > 0.3
    mask.fill_diagonal_(True)
    ours = make_sdpa("exact")(q, k, v, mask, is_causal=True)
    theirs = scaled_dot_product_attention(q, k, v, attn_mask=mask.tril())
    torch.testing.assert_close(ours, theirs)
    assert ours.requires_grad


def test_huge_values_with_a_scale_per_key_tile():
    q, k, _ = inputs(length=300)
    recipe = "sage2_8b:v_granularity=per_channel_and_key_tile"
    for size in (1.0, 1e36):
        out = attention(q, k, torch.full_like(k, size), recipe=recipe)
        assert (out / size - 1).abs().max() < 2**-4

"""What breaks other attention libraries: right here, or refused with one clear line. One test each.

Masks, shapes, heads; test_bad_modes.py has training, modes, threads.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from bad_cases import ALL, RECIPE, SDPAS, close, patched, qkv, sdpa_8b

from lowbit_attention import InvalidArgumentError, UnsupportedError, attention, compare, make_sdpa, sdpa, sdpa_enabled
from lowbit_attention.reference.exact import exact

# ---- masks


@SDPAS
def test_positional_mask(function):
    q, k, v = qkv()
    mask = torch.ones(33, 33, dtype=torch.bool).tril(3)
    close(function(q, k, v, mask), q, k, v, mask[None, None])


def test_a_mask_in_the_place_of_something_else_is_refused():
    q, k, v = qkv()
    mask = torch.ones(33, 33, dtype=torch.bool)
    with pytest.raises(TypeError):
        attention(q, k, v, mask)
    with pytest.raises(InvalidArgumentError, match=r"dropout_p.*33, 33|dropout_p must be a probability"):
        sdpa_8b(q, k, v, None, mask)
    with pytest.raises(InvalidArgumentError, match="is_causal"):
        sdpa_8b(q, k, v, None, 0.0, mask)


@SDPAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_mask_with_finite_biases(function, dtype):
    """ALiBi: adding it to base-2 logits without the factor log2(e) would change the weights."""
    q, k, v = qkv(dtype=dtype)
    distance = (torch.arange(33)[:, None] - torch.arange(33)).abs()
    bias = (-(0.5 ** torch.arange(1.0, 5.0))[:, None, None] * distance).to(dtype)
    close(function(q, k, v, attn_mask=bias), q, k, v, bias[None])
    assert compare(function(q, k, v, attn_mask=bias), function(q, k, v, attn_mask=bias * math.log(2))).cos_sim < 0.999


@SDPAS
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_fully_masked_row(function, kind):
    q, k, v = qkv()
    mask = torch.ones(33, 33, dtype=torch.bool).tril()
    mask[5] = False
    given = mask if kind == "bool" else torch.zeros(33, 33).masked_fill(~mask, -torch.inf)
    out = function(q, k, v, attn_mask=given)
    assert not out[:, :, 5].any()
    close(out, q, k, v, mask[None, None])


def test_fully_masked_row_has_lse_of_minus_infinity():
    q, k, v = qkv()
    mask = torch.ones(33, 33, dtype=torch.bool)
    mask[5] = False
    _, lse = attention(q, k, v, attn_mask=mask, recipe=RECIPE, return_lse=True)
    assert (lse == -torch.inf).nonzero()[:, 2].unique().tolist() == [5]


@pytest.mark.parametrize("lengths", [(20, 33), (33, 20)])
def test_causal_with_unequal_lengths(lengths):
    q, k, v = qkv(lengths=lengths)
    bottom_right = lengths[1] - lengths[0]
    close(attention(q, k, v, recipe=RECIPE, is_causal=True), q, k, v, causal_offset=bottom_right)
    close(attention(q, k, v, recipe=RECIPE, is_causal=True, causal_alignment="top_left"), q, k, v, causal_offset=0)
    for function in (sdpa_8b, patched):
        close(function(q, k, v, is_causal=True), q, k, v, causal_offset=0)


# ---- shapes, dtypes, memory


@ALL
@pytest.mark.parametrize("dim", [1, 40, 72, 80, 96, 160, 256])
def test_head_dims(function, dim):
    q, k, v = qkv(dim=dim)
    close(function(q, k, v), q, k, v)


def test_head_dim_above_256():
    q, k, v = qkv(batch=1, heads=(1, 1), lengths=(3, 3), dim=264)
    with pytest.raises(UnsupportedError, match="head_dim 264 is above 256"):
        attention(q, k, v, recipe=RECIPE)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(function, dtype):
    q, k, v = qkv(dtype=dtype)
    close(function(q, k, v), q, k, v)


def views(x):
    batch, heads, length, dim = x.shape
    big = torch.full((batch, heads, length, dim + 6), torch.nan)
    big[..., 3:-3] = x
    step = torch.full((batch, heads, 2 * length, dim), torch.nan)
    step[:, :, 1::2] = x
    flat = torch.full((x.numel() + 7,), torch.nan)
    flat[7:] = x.flatten()
    return {
        "tokens first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "channels outside": x.transpose(2, 3).contiguous().transpose(2, 3),
        "channel slice": big[..., 3:-3],
        "every second token": step[:, :, 1::2],
        "storage offset": flat[7:].view(x.shape),
    }


@ALL
def test_non_contiguous(function):
    q, k, v = qkv()
    want = function(q, k, v)
    for name in views(q):
        got = function(*(views(t)[name] for t in (q, k, v)))
        assert torch.equal(got, want), name


@ALL
def test_expanded(function):
    q, k, v = qkv()
    for index in ((slice(1),), (slice(None), slice(1)), (slice(None), slice(None), slice(1))):
        expanded = [t[index].expand(t.shape) for t in (q, k, v)]
        assert 0 in expanded[0].stride()
        assert torch.equal(function(*expanded), function(*(t.contiguous() for t in expanded)))


@ALL
def test_empty_batch_and_no_queries(function):
    for batch, lengths in ((0, (5, 5)), (2, (0, 5))):
        q, k, v = qkv(batch=batch, lengths=lengths)
        assert function(q, k, v).shape == q.shape


@ALL
def test_no_keys(function):
    q, k, v = qkv(lengths=(5, 0))
    assert torch.equal(function(q, k, v), torch.zeros_like(q))


@ALL
def test_one_key(function):
    q, k, v = qkv(lengths=(5, 1))
    close(function(q, k, v), q, k, v)
    q, k, v = qkv(lengths=(1, 1))
    close(function(q, k, v), q, k, v)


@ALL
def test_a_zero_channel_of_v_and_a_constant_k(function):
    q, k, v = qkv()
    v[..., 3] = 0
    k[:] = k[:, :, :1]
    out = function(q, k, v)
    close(out, q, k, v)
    assert not out[..., 3].any()


@ALL
def test_values_near_the_end_of_fp16(function):
    q, k, v = qkv(dtype=torch.float16)
    v = (v.float() * 15000).clamp(-65504, 65504).half()
    close(function(q, k, v), q, k, v)


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("recipe", ["exact", "sage2_8b"])
def test_a_scale_that_is_not_positive(recipe, scale):
    """torch's own causal kernel gives NaN here."""
    q, k, v = qkv()
    close(make_sdpa(recipe)(q, k, v, is_causal=True, scale=scale), q, k, v, causal_offset=0, sm_scale=scale)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(sdpa(q, k, v, is_causal=True, scale=scale).sum(), q)
    assert grad.isfinite().all()
    assert grad.any() == (scale != 0)


# ---- heads


def test_gqa_with_a_non_divisor():
    q, k, v = qkv(heads=(6, 4))
    for function in (sdpa_8b, sdpa):
        with pytest.raises(InvalidArgumentError, match="query heads, 6, is no multiple of that of k and v, 4"):
            function(q, k, v, enable_gqa=True)
    with pytest.raises(InvalidArgumentError, match="6, is no multiple"):
        attention(q, k, v, recipe=RECIPE)
    with sdpa_enabled(recipe=RECIPE) as report, pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert "6, is no multiple" in next(iter(report.fallbacks))


def test_enable_gqa_false_with_different_heads():
    q, k, v = qkv(heads=(4, 2))
    with pytest.raises(InvalidArgumentError, match="enable_gqa=True"):
        sdpa_8b(q, k, v)
    with sdpa_enabled(recipe=RECIPE) as report, pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, k, v)
    assert "enable_gqa=True" in next(iter(report.fallbacks))
    want, _ = exact(q, k, v, sm_scale=32**-0.5)
    for function in (sdpa_8b, patched):
        assert compare(want, function(q, k, v, enable_gqa=True)).cos_sim > 0.999


def test_different_devices():
    q, k, v = qkv()
    for wrong in (k.to("meta"), k):
        others = (wrong, v.to("meta") if wrong is k else v)
        with pytest.raises(InvalidArgumentError, match="one device, got cpu"):
            attention(q, *others, recipe=RECIPE)
        with pytest.raises(InvalidArgumentError, match="one device, got cpu"):
            sdpa_8b(q, *others)
    with pytest.raises(InvalidArgumentError, match="attn_mask is on meta, q on cpu"):
        sdpa_8b(q, k, v, torch.ones(33, 33, dtype=torch.bool, device="meta"))


def patched_on_meta(q, k, v):
    with sdpa_enabled(recipe=RECIPE):
        return F.scaled_dot_product_attention(q, k, v)


def test_meta_tensors_have_shapes_only():
    q, k, v = (t.to("meta") for t in qkv())
    for out in (attention(q, k, v, recipe=RECIPE), sdpa_8b(q, k, v, is_causal=True), patched_on_meta(q, k, v)):
        assert (out.shape, out.device.type) == (q.shape, "meta")

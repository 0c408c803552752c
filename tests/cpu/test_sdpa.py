"""`sdpa` takes what ``F.scaled_dot_product_attention`` takes, means the same by it, and refuses the rest."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_attention import (
    InvalidArgumentError,
    InvalidRecipeError,
    UnsupportedError,
    attention,
    compare,
    make_sdpa,
    sdpa,
)

# Both compute in float32: logits of size ≤ 6 lose at most d · 2⁻²⁴ · Σ|q||k| · scale ≈ 2.5e-5, outputs |V| ≤ 5 times
# that; on both sides.
F32 = {"rtol": 1e-4, "atol": 1e-4}
sdpa_8b = make_sdpa("sage2_8b")
L1_8B = 1.5 * 0.037  # algorithm.md §4 on normal inputs; 1.5 for small n


def normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g) for s in shapes]


@pytest.mark.parametrize("function", [sdpa, sdpa_8b], ids=["auto", "sage2_8b"])
def test_signature_is_torchs(function: Any) -> None:
    """Against the schema that torch itself parses calls with."""
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    theirs = [(a.name, a.kwarg_only, a.default_value if a.has_default_value() else None) for a in schema.arguments]
    ours = [
        (p.name, p.kind is inspect.Parameter.KEYWORD_ONLY, None if p.default is inspect.Parameter.empty else p.default)
        for p in inspect.signature(function).parameters.values()
    ]
    assert ours == theirs
    required = [p.name for p in inspect.signature(function).parameters.values() if p.default is inspect.Parameter.empty]
    assert required == ["query", "key", "value"]


SHAPES = [
    pytest.param((20, 8), (30, 8), (30, 5), id="2d"),
    pytest.param((3, 20, 8), (3, 30, 8), (3, 30, 8), id="3d"),
    pytest.param((2, 3, 20, 8), (2, 3, 30, 8), (2, 3, 30, 5), id="4d"),
    pytest.param((2, 3, 4, 20, 8), (2, 3, 4, 30, 8), (2, 3, 4, 30, 5), id="5d"),
    pytest.param((2, 3, 20, 8), (1, 3, 30, 8), (2, 1, 30, 8), id="batch_and_heads_broadcast"),
    pytest.param((2, 1, 20, 8), (2, 3, 30, 8), (2, 3, 30, 8), id="query_broadcasts"),
    pytest.param((20, 8), (2, 3, 30, 8), (3, 30, 8), id="fewer_dims_broadcast"),
    pytest.param((5, 1, 3, 20, 8), (2, 3, 30, 8), (2, 3, 30, 8), id="5d_with_4d"),
    pytest.param((2, 3, 1, 8), (2, 3, 30, 8), (2, 3, 30, 8), id="one_query"),
    pytest.param((0, 3, 20, 8), (0, 3, 30, 8), (0, 3, 30, 8), id="no_batch"),
    pytest.param((2, 3, 0, 8), (2, 3, 30, 8), (2, 3, 30, 8), id="no_queries"),
    pytest.param((2, 3, 20, 8), (2, 3, 0, 8), (2, 3, 0, 8), id="no_keys"),
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("q_shape", "k_shape", "v_shape"), SHAPES)
def test_shapes(q_shape: tuple[int, ...], k_shape: tuple[int, ...], v_shape: tuple[int, ...], is_causal: bool) -> None:
    q, k, v = normal(q_shape, k_shape, v_shape)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(sdpa(q, k, v, is_causal=is_causal), want, **F32)
    quantized = sdpa_8b(q, k, v, is_causal=is_causal)
    assert quantized.shape == want.shape
    if want.numel() and want.any():
        assert compare(want, quantized).l1 < L1_8B


@pytest.mark.parametrize("scale", [None, 0.3, 1])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [(20, 20), (20, 30), (30, 20)])
def test_causal_is_top_left_and_scale_counts(q_len: int, kv_len: int, is_causal: bool, scale: float | None) -> None:
    q, k, v = normal((2, 3, q_len, 8), (2, 3, kv_len, 8), (2, 3, kv_len, 32))
    visible = torch.ones(q_len, kv_len, dtype=torch.bool).tril() if is_causal else None
    want = F.scaled_dot_product_attention(q, k, v, visible, scale=scale)
    torch.testing.assert_close(sdpa(q, k, v, is_causal=is_causal, scale=scale), want, **F32)
    assert compare(want, sdpa_8b(q, k, v, is_causal=is_causal, scale=scale)).l1 < L1_8B


MASKS = [(20, 30), (1, 30), (20, 1), (3, 20, 30), (3, 1, 30), (2, 1, 1, 30), (1, 3, 20, 30), (2, 3, 20, 30)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_mask_and_causality_both_hold(shape: tuple[int, ...], kind: str, is_causal: bool) -> None:
    """torch 2.13 intersects them; older versions refuse the pair, so the oracle there is the intersection itself."""
    q, k, v = normal((2, 3, 20, 16), (2, 3, 30, 16), (2, 3, 30, 32))
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=g) < 0.7 if kind == "bool" else torch.randn(shape, generator=g)
    try:
        want = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
    except RuntimeError:
        causal = torch.ones(20, 30, dtype=torch.bool).tril()
        both = mask & causal if kind == "bool" else torch.where(causal, mask, -math.inf)
        want = F.scaled_dot_product_attention(q, k, v, both)
    torch.testing.assert_close(sdpa(q, k, v, mask, is_causal=is_causal), want, **F32)
    torch.testing.assert_close(sdpa(q, k, v, mask, 0.0, is_causal), want, **F32)  # by position
    assert compare(want, sdpa_8b(q, k, v, mask, is_causal=is_causal)).l1 < L1_8B


@pytest.mark.parametrize("dims", [2, 3, 5])
def test_masks_of_other_dims(dims: int) -> None:
    lead = (2, 3, 4)[: dims - 2]
    q, k, v = normal((*lead, 20, 16), (*lead, 30, 16), (*lead, 30, 32))
    for shape in {(20, 30), (*lead, 20, 30), (*lead, 1, 30)}:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
        want = F.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(sdpa(q, k, v, mask), want, **F32)
        assert compare(want, sdpa_8b(q, k, v, mask)).l1 < L1_8B


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=["3d", "4d", "5d"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_enable_gqa(lead: tuple[int, ...], is_causal: bool) -> None:
    q, k, v = normal((*lead, 6, 20, 16), (*lead, 2, 30, 16), (*lead, 2, 30, 32))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    torch.testing.assert_close(sdpa(q, k, v, is_causal=is_causal, enable_gqa=True), want, **F32)
    assert compare(want, sdpa_8b(q, k, v, is_causal=is_causal, enable_gqa=True)).l1 < L1_8B


def test_gqa_must_be_enabled() -> None:
    q, k, v = normal((1, 6, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, k, v)
    with pytest.raises(InvalidArgumentError, match="enable_gqa=True"):
        sdpa(q, k, v)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_that_see_nothing_are_zero(kind: str) -> None:
    q, k, v = normal((1, 2, 20, 16), (1, 2, 30, 16), (1, 2, 30, 16))
    mask = torch.ones(20, 30, dtype=torch.bool)
    mask[4] = False
    given = mask if kind == "bool" else torch.where(mask, 0.0, -math.inf)
    for function in (sdpa, sdpa_8b):
        out = function(q, k, v, given)
        assert (out[:, :, 4] == 0).all()
        assert out.any(dim=-1).sum() == 2 * 19


def test_dropout_is_torchs_own() -> None:
    q, k, v = normal((1, 2, 20, 16), (1, 2, 30, 16), (1, 2, 30, 16))
    torch.manual_seed(0)
    want = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(sdpa(q, k, v, dropout_p=0.5), want, rtol=0, atol=0)
    assert not torch.allclose(want, sdpa(q, k, v), **F32)


def test_quantized_recipes_have_no_dropout() -> None:
    q, k, v = normal((1, 2, 20, 16), (1, 2, 30, 16), (1, 2, 30, 16))
    with pytest.raises(UnsupportedError, match=r"dropout_p=0\.25"):
        sdpa_8b(q, k, v, dropout_p=0.25)
    assert sdpa_8b(q, k, v, dropout_p=0.0).isfinite().all()


def test_gradients_go_through_torch_or_are_refused() -> None:
    q, k, v = (t.requires_grad_() for t in normal((1, 2, 20, 16), (1, 2, 20, 16), (1, 2, 20, 16)))
    got = torch.autograd.grad(sdpa(q, k, v, is_causal=True).square().sum(), (q, k, v))
    want = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **F32)
    with pytest.raises(UnsupportedError, match="no_grad"):
        sdpa_8b(q, k, v)
    with torch.no_grad():
        assert not sdpa_8b(q, k, v).requires_grad


def test_make_sdpa_is_attention_by_the_same_recipe() -> None:
    q, k, v = normal((2, 2, 64, 16), (2, 2, 64, 16), (2, 2, 64, 16))
    for like in (None, "sm_90a"):
        got = make_sdpa("sage2_4b:smooth_q=false", like=like)(q, k, v, is_causal=True)
        want = attention(q, k, v, recipe="sage2_4b:smooth_q=false", like=like, is_causal=True)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_of_the_output(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in normal((2, 2, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16)))
    assert sdpa(q, k, v).dtype == dtype
    assert sdpa_8b(q, k, v).dtype == dtype


T = torch.ones(1, 2, 5, 8)
ERRORS = [
    pytest.param((T, T, T, None, 0.0, T), {}, "is_causal.*1, 2, 5, 8", id="mask_as_is_causal"),
    pytest.param((T, T, T, None, True), {}, "dropout_p.*True", id="is_causal_as_dropout"),
    pytest.param((T, T, T, None, 1.5), {}, r"dropout_p.*1\.5", id="dropout_above_1"),
    pytest.param((T, T, T), {"dropout_p": math.nan}, "dropout_p.*nan", id="dropout_nan"),
    pytest.param((T, T, T), {"scale": "1"}, "scale.*'1'", id="scale_str"),
    pytest.param((T, T, T), {"scale": math.inf}, "scale.*inf", id="scale_inf"),
    pytest.param((T, T, T), {"enable_gqa": 1}, "enable_gqa.*1", id="enable_gqa_int"),
    pytest.param((T, T, T, "HND"), {}, "attn_mask.*str", id="mask_str"),
    pytest.param((T, T, T, torch.ones(5, 5, dtype=torch.int32)), {}, r"attn_mask.*int32", id="mask_int"),
    pytest.param((T, T, T, torch.ones(4, 5).bool()), {}, r"attn_mask.*\(4, 5\)", id="mask_shape"),
    pytest.param((T[0], T[0], T[0], torch.ones(4, 5).bool()), {}, r"attn_mask.*\(4, 5\)", id="mask_shape_3d"),
    pytest.param((T, T, T, torch.ones(3, 1, 5, 5).bool()), {}, r"attn_mask.*\(3, 1, 5, 5\)", id="mask_batch"),
    pytest.param((T[0, 0, 0], T, T), {}, r"query.*\(8,\)", id="query_1d"),
    pytest.param((T, None, T), {}, "key.*NoneType", id="key_none"),
    pytest.param((T, T.half(), T), {}, "float16", id="mixed_dtypes"),
    pytest.param((T.long(), T.long(), T.long()), {}, "int64", id="integers"),
    pytest.param((T, T[..., :4], T), {}, r"\(1, 2, 5, 4\)", id="head_dims_differ"),
    pytest.param((T, T, T[:, :, :4]), {}, r"\(1, 2, 4, 8\)", id="lengths_differ"),
    pytest.param((T.expand(2, 2, 5, 8), T.expand(3, 2, 5, 8), T), {}, r"\(3, 2, 5, 8\)", id="batches_differ"),
    pytest.param((T.expand(1, 2, 5, 8), T.repeat(1, 2, 1, 1), T.repeat(1, 2, 1, 1)), {"enable_gqa": True}, "2.*4",
                 id="fewer_query_heads"),
    pytest.param((T[..., :0], T[..., :0], T), {}, r"\(1, 2, 5, 0\)", id="head_dim_0"),
]  # fmt: skip


@pytest.mark.parametrize("function", [sdpa, sdpa_8b], ids=["auto", "sage2_8b"])
@pytest.mark.parametrize(("args", "kwargs", "message"), ERRORS)
def test_errors_carry_the_value(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        function(*args, **kwargs)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="softmax_scale"):
        sdpa(T, T, T, softmax_scale=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        sdpa(T, T, T, None, 0.0, False, 0.5)  # type: ignore[misc]  # scale is keyword-only, as in torch


def test_make_sdpa_checks_its_recipe() -> None:
    with pytest.raises(InvalidRecipeError, match="sage9"):
        make_sdpa("sage9")
    with pytest.raises(InvalidArgumentError, match="sm_90a"):
        make_sdpa("auto", like="sm_90a")

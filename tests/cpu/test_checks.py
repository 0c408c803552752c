"""Every wrong argument is refused with `InvalidArgumentError`, and the message carries the offending value.

Each error is raised whatever the recipe, by `explain` as well, and before anything is computed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_attention import InvalidArgumentError, InvalidRecipeError, LowbitError, attention, attention_varlen, explain

RECIPES = ["auto", "exact", "sage2_8b"]


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


OK = (t(2, 4, 5, 8), t(2, 2, 7, 8), t(2, 2, 7, 6))
Q, K, V = OK

TENSORS = [
    pytest.param((None, K, V), "q .*NoneType", id="q_none"),
    pytest.param((Q, K, [[1.0]]), "v .*list", id="v_list"),
    pytest.param((Q[0], K, V), r"q .*\(4, 5, 8\)", id="q_3d"),
    pytest.param((Q, K, V[None]), r"v .*\(1, 2, 2, 7, 6\)", id="v_5d"),
    pytest.param((Q.long(), K.long(), V.long()), "q .*int64", id="integers"),
    pytest.param((Q, K.bool(), V), "k .*bool", id="k_bool"),
    pytest.param((Q, K, V.to(torch.float8_e4m3fn)), "v .*float8", id="v_float8"),
    pytest.param((Q.to(torch.complex64),) * 3, "q .*complex64", id="complex"),
    pytest.param((Q, K.half(), V), "float32.*float16", id="mixed_dtypes"),
    pytest.param((Q, K, V.to("meta")), "cpu.*meta", id="mixed_devices"),
    pytest.param((Q[:1], K, V), r"batch.*\(1, 4, 5, 8\).*\(2, 2, 7, 8\)", id="batches"),
    pytest.param((Q, K[:, :1], V), r"heads.*\(2, 1, 7, 8\).*\(2, 2, 7, 6\)", id="k_v_heads"),
    pytest.param((Q, K[:, :, :3], V), r"length.*\(2, 2, 3, 8\).*\(2, 2, 7, 6\)", id="k_v_lengths"),
    pytest.param((Q[:, :3], K, V), "3.*multiple.*2", id="heads_not_divisible"),
    pytest.param((Q[:, :1], K, V), "1.*multiple.*2", id="fewer_query_heads"),
    pytest.param((Q[:, :0], K, V), "0.*2", id="no_query_heads"),
    pytest.param((Q, K[:, :0], V[:, :0]), "4.*0", id="no_kv_heads"),
    pytest.param((Q, K[..., :4], V), r"dimension.*\(2, 4, 5, 8\).*\(2, 2, 7, 4\)", id="head_dims"),
    pytest.param((Q[..., :0], K[..., :0], V), r"dimension.*\(2, 4, 5, 0\)", id="head_dim_0"),
    pytest.param((Q, K, V[..., :0]), r"dimension.*\(2, 2, 7, 0\)", id="v_head_dim_0"),
]

OPTIONS = [
    pytest.param({"is_causal": t(5, 7).bool()}, r"is_causal.*\(5, 7\)", id="mask_as_is_causal"),
    pytest.param({"is_causal": 1}, "is_causal.*1", id="is_causal_int"),
    pytest.param({"is_causal": None}, "is_causal.*None", id="is_causal_none"),
    pytest.param({"is_causal": "HND"}, "is_causal.*'HND'", id="layout_as_is_causal"),
    pytest.param({"return_lse": 1}, "return_lse.*1", id="return_lse_int"),
    pytest.param({"causal_alignment": "top_left"}, "causal_alignment='top_left'.*is_causal", id="idle_alignment"),
    pytest.param({"causal_alignment": "bottom_right"}, "causal_alignment='bottom_right'", id="idle_default_alignment"),
    pytest.param({"is_causal": True, "causal_alignment": "left"}, "'left'.*'bottom_right', 'top_left'", id="alignment"),
    pytest.param({"is_causal": True, "causal_alignment": 0}, "causal_alignment=0", id="alignment_int"),
    pytest.param({"layout": "BHND"}, "'BHND'.*'HND', 'NHD'", id="layout"),
    pytest.param({"layout": "hnd"}, "'hnd'", id="layout_case"),
    pytest.param({"layout": 1}, "layout=1", id="layout_int"),
    pytest.param({"layout": None}, "layout=None", id="layout_none"),
    pytest.param({"sm_scale": math.nan}, "sm_scale.*nan", id="scale_nan"),
    pytest.param({"sm_scale": math.inf}, "sm_scale.*inf", id="scale_inf"),
    pytest.param({"sm_scale": -math.inf}, "sm_scale.*-inf", id="scale_minus_inf"),
    pytest.param({"sm_scale": "0.5"}, r"sm_scale.*'0\.5'", id="scale_str"),
    pytest.param({"sm_scale": True}, "sm_scale.*True", id="scale_bool"),
    pytest.param({"sm_scale": torch.tensor([0.5])}, r"sm_scale.*shape \(1,\) holding 0\.5", id="scale_tensor"),
    pytest.param({"attn_mask": "padding"}, "attn_mask.*str", id="mask_str"),
    pytest.param({"attn_mask": [[True]]}, "attn_mask.*list", id="mask_list"),
    pytest.param({"attn_mask": t(5, 7).int()}, "attn_mask.*int32", id="mask_int"),
    pytest.param({"attn_mask": t(5, 7, dtype=torch.uint8)}, "attn_mask.*uint8", id="mask_uint8"),
    pytest.param({"attn_mask": t(7, 5)}, r"\(7, 5\).*\[2, 4, 5, 7\]", id="mask_transposed"),
    pytest.param({"attn_mask": t(5)}, r"\(5,\).*\[2, 4, 5, 7\]", id="mask_1d"),
    pytest.param({"attn_mask": t(2, 5, 7)}, r"\(2, 5, 7\)", id="mask_with_kv_heads"),
    pytest.param({"attn_mask": t(3, 1, 5, 7)}, r"\(3, 1, 5, 7\)", id="mask_batch"),
    pytest.param({"attn_mask": t(1, 2, 4, 5, 7)}, r"\(1, 2, 4, 5, 7\)", id="mask_5d"),
    pytest.param({"attn_mask": t(0, 7)}, r"\(0, 7\)", id="mask_empty"),
    pytest.param({"attn_mask": t(5, 7).to("meta")}, "attn_mask.*meta.*cpu", id="mask_device"),
]


@pytest.mark.parametrize("function", [attention, explain])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("tensors", "message"), TENSORS)
def test_tensors(function: Any, recipe: str, tensors: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        function(*tensors, recipe=recipe)


@pytest.mark.parametrize("function", [attention, explain])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options(function: Any, recipe: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        function(*OK, recipe=recipe, **options)


def test_ok_is_ok() -> None:
    """The tensors above are refused for what was changed, not for themselves."""
    for recipe in RECIPES:
        assert attention(*OK, recipe=recipe, attn_mask=t(5, 7)).shape == (2, 4, 5, 6)


def test_the_layout_counts() -> None:
    """HND tensors read as NHD: 5 heads of queries, 7 of keys."""
    with pytest.raises(InvalidArgumentError, match=r"5.*multiple.*7"):
        attention(*(x[:, :2] for x in OK), layout="NHD")
    assert attention(*(x.transpose(1, 2) for x in OK), layout="NHD").shape == (2, 5, 4, 6)


@pytest.mark.parametrize("recipe", ["auto", "exact"])
@pytest.mark.parametrize("like", ["sm_89", "sm_75"])
def test_like_means_nothing_without_quantization(recipe: str, like: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"like='{like}'.*{recipe}"):
        attention(*OK, recipe=recipe, like=like)


@pytest.mark.parametrize("like", ["sm_75", "sm89", 90, torch.device("cpu")])
def test_like_must_be_a_machine(like: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=str(like)) as caught:
        attention(*OK, recipe="sage2_8b", like=like)
    assert "sm_90a" in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("sage3", "'sage3'.*sage2_8b"),
        ("Auto", "'Auto'"),
        ("", "''"),
        ("auto:smooth_k=true", "auto"),
        ("sage2_8b:no_such=1", "no_such"),
        ("sage2_8b:smooth_k", "'smooth_k' is not option=value"),
        ("sage2_8b:qk_bits=5", "qk_bits=5"),
        (None, "None"),
        (8, "8"),
    ],
)
def test_recipe(recipe: Any, message: str) -> None:
    with pytest.raises(InvalidRecipeError, match=message):
        attention(*OK, recipe=recipe)


def test_unknown_arguments_are_refused() -> None:
    """The names of other packages' arguments, and a fourth positional argument, are no synonyms here."""
    for name in ("causal", "softmax_scale", "scale", "dropout_p", "window_size", "tensor_layout"):
        with pytest.raises(TypeError, match=name):
            attention(*OK, **{name: None})
    with pytest.raises(TypeError, match="positional"):
        attention(*OK, t(5, 7))  # type: ignore[misc]


def test_errors_are_value_errors_of_the_library() -> None:
    with pytest.raises(ValueError, match="layout") as caught:
        attention(*OK, layout="x")  # type: ignore[arg-type]
    assert isinstance(caught.value, LowbitError)


# Variable length: 9 query tokens, 11 key tokens, 2 sequences.
PACKED = (t(9, 4, 8), t(11, 2, 8), t(11, 2, 6))
CU_Q, CU_K = torch.tensor([0, 4, 9]), torch.tensor([0, 5, 11])

VARLEN = [
    pytest.param({"q": t(1, 9, 4, 8)}, r"q .*\(1, 9, 4, 8\)", id="q_4d"),
    pytest.param({"k": t(11, 2, 8, dtype=torch.float16)}, "float16", id="mixed_dtypes"),
    pytest.param({"k": t(12, 2, 8)}, r"\(12, 2, 8\).*\(11, 2, 6\)", id="k_v_tokens"),
    pytest.param({"v": t(11, 1, 6)}, r"\(11, 2, 8\).*\(11, 1, 6\)", id="k_v_heads"),
    pytest.param({"q": t(9, 3, 8)}, "3.*multiple.*2", id="heads"),
    pytest.param({"q": t(9, 4, 7)}, r"\(9, 4, 7\)", id="head_dims"),
    pytest.param({"v": t(11, 2, 0)}, r"\(11, 2, 0\)", id="head_dim_0"),
    pytest.param({"cu_seqlens_q": [0, 4, 9]}, "cu_seqlens_q.*list", id="cu_list"),
    pytest.param({"cu_seqlens_q": torch.tensor([0.0, 4, 9])}, "cu_seqlens_q.*float32", id="cu_float"),
    pytest.param({"cu_seqlens_k": CU_K.to(torch.int16)}, "cu_seqlens_k.*int16", id="cu_int16"),
    pytest.param({"cu_seqlens_k": CU_K[None]}, r"cu_seqlens_k.*\(1, 3\)", id="cu_2d"),
    pytest.param({"cu_seqlens_k": CU_K[:0]}, r"cu_seqlens_k.*\(0,\)", id="cu_empty"),
    pytest.param({"cu_seqlens_k": CU_K.to("meta")}, "cu_seqlens_k.*meta", id="cu_device"),
    pytest.param({"cu_seqlens_k": torch.tensor([0, 5, 12])}, r"cu_seqlens_k.*11.*\[0, 5, 12\]", id="cu_long"),
    pytest.param({"cu_seqlens_q": torch.tensor([0, 10, 9])}, r"cu_seqlens_q.*\[0, 10, 9\]", id="cu_falls"),
    pytest.param({"cu_seqlens_q": torch.tensor([0, -1, 9])}, r"cu_seqlens_q.*\[0, -1, 9\]", id="cu_negative"),
    pytest.param({"cu_seqlens_q": torch.tensor([0, 9])}, "cu_seqlens_q has 1.*cu_seqlens_k has 2", id="cu_batches"),
    pytest.param({"max_seqlen_q": 4}, "max_seqlen_q=4.*5", id="max_q_small"),
    pytest.param({"max_seqlen_k": 5}, "max_seqlen_k=5.*6", id="max_k_small"),
    pytest.param({"max_seqlen_k": -1}, "max_seqlen_k=-1", id="max_negative"),
    pytest.param({"max_seqlen_q": 5.0}, r"max_seqlen_q=5\.0", id="max_float"),
    pytest.param({"max_seqlen_q": True}, "max_seqlen_q=True", id="max_bool"),
    pytest.param({"is_causal": 1}, "is_causal.*1", id="is_causal_int"),
    pytest.param({"return_lse": "yes"}, "return_lse.*'yes'", id="return_lse_str"),
    pytest.param({"causal_alignment": "top_left"}, "causal_alignment='top_left'", id="idle_alignment"),
    pytest.param({"sm_scale": math.nan}, "sm_scale.*nan", id="scale_nan"),
]


def varlen(recipe: str, **changes: Any) -> Tensor:
    arguments = {"q": PACKED[0], "k": PACKED[1], "v": PACKED[2], "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    return attention_varlen(**{**arguments, "recipe": recipe, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("changes", "message"), VARLEN)
def test_varlen(recipe: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        varlen(recipe, **changes)


EMPTY = {
    "q": t(0, 4, 8),
    "k": t(0, 2, 8),
    "v": t(0, 2, 6),
    "cu_seqlens_q": torch.tensor([0]),
    "cu_seqlens_k": torch.tensor([0]),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": 1}, "is_causal.*1"),
        ({"return_lse": "yes"}, "return_lse.*'yes'"),
        ({"causal_alignment": "top_left"}, "causal_alignment='top_left'"),
        ({"sm_scale": math.nan}, "sm_scale.*nan"),
        ({"recipe": "sage9"}, "sage9"),
        ({"recipe": "sage2_8b", "like": "sm_75"}, "sm_75"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_varlen_checks_without_a_sequence(changes: dict[str, Any], message: str) -> None:
    """A batch of no sequences checks its arguments, too: errors do not depend on the data."""
    assert varlen("exact", **EMPTY).shape == (0, 4, 6)
    with pytest.raises(InvalidArgumentError, match=message):
        varlen(**{"recipe": "sage2_8b", **EMPTY, **changes})


def test_varlen_ok_is_ok() -> None:
    for recipe in RECIPES:
        assert varlen(recipe, max_seqlen_q=5, max_seqlen_k=100).shape == (9, 4, 6)
        assert varlen(recipe, max_seqlen_q=torch.tensor(1)).shape == (9, 4, 6)  # (not read)
        assert varlen(recipe, cu_seqlens_q=CU_Q.int(), cu_seqlens_k=CU_K).shape == (9, 4, 6)

"""`compat.sageattention`: the original's names, arguments and contracts; strict where the original swallows."""

import inspect
import math

import pytest
import torch

from lowbit_attention import RECIPES as NAMED
from lowbit_attention import InvalidArgumentError, UnsupportedError, attention, compare, recipe
from lowbit_attention.call.masks import Masking
from lowbit_attention.compat import sageattention as sage
from lowbit_attention.reference.exact import exact

DENSE = [getattr(sage, name) for name in sage.__all__ if name != "sageattn_varlen"]
IDS = [f.__name__ for f in DENSE]

# The original's signatures (its release 2.2), by position.
SIGNATURES = {
    "sageattn": "q k v tensor_layout=HND is_causal=False sm_scale=None return_lse=False",
    "sageattn_qk_int8_pv_fp16_triton": "q k v tensor_layout=HND quantization_backend=triton is_causal=False "
    "sm_scale=None smooth_k=True return_lse=False",
    "sageattn_qk_int8_pv_fp16_cuda": "q k v tensor_layout=HND is_causal=False qk_quant_gran=per_thread sm_scale=None "
    "pv_accum_dtype=fp32 smooth_k=True smooth_v=False return_lse=False",
    "sageattn_qk_int8_pv_fp8_cuda": "q k v tensor_layout=HND is_causal=False qk_quant_gran=per_thread sm_scale=None "
    "pv_accum_dtype=fp32+fp16 smooth_k=True smooth_v=False return_lse=False",
    "sageattn_qk_int8_pv_fp8_cuda_sm90": "q k v tensor_layout=HND is_causal=False qk_quant_gran=per_thread "
    "sm_scale=None pv_accum_dtype=fp32+fp32 smooth_k=True return_lse=False",
    "sageattn_varlen": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k is_causal=False sm_scale=None "
    "smooth_k=True",
}


def qkv(heads=(4, 2), lengths=(70, 70), dim=32, dtype=torch.float32, layout="HND"):
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, h, n, dim, generator=g).to(dtype)
        for h, n in ((heads[0], lengths[0]), (heads[1], lengths[1]), (heads[1], lengths[1]))
    ]
    return tensors if layout == "HND" else [t.transpose(1, 2) for t in tensors]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(sage, name)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    words = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in positional]
    assert " ".join(words) == SIGNATURES[name]
    assert sage.__all__ == sorted(SIGNATURES, key=sage.__all__.index)


# ---- which recipe

LIKE = {"like": "sm_90a"}
RECIPES = [
    ("sageattn", {}, "auto", {}),
    ("sageattn_qk_int8_pv_fp16_triton", {}, "sage1", {}),
    ("sageattn_qk_int8_pv_fp16_triton", {"quantization_backend": "cuda"}, "sage1", {}),
    ("sageattn_qk_int8_pv_fp16_triton", {"smooth_k": False}, "sage1:smooth_k=false", {}),
    ("sageattn_qk_int8_pv_fp16_cuda", {}, "int8_fp16", {}),
    ("sageattn_qk_int8_pv_fp16_cuda", {"smooth_v": True}, "int8_fp16:smooth_v=true", {}),
    ("sageattn_qk_int8_pv_fp16_cuda", {"pv_accum_dtype": "fp16+fp32"},
     "sage1:q_granularity=per_thread,k_granularity=per_thread", {}),
    ("sageattn_qk_int8_pv_fp16_cuda", {"pv_accum_dtype": "fp16", "smooth_v": True},
     "sage1:q_granularity=per_thread,k_granularity=per_thread,smooth_v=true", {}),
    ("sageattn_qk_int8_pv_fp8_cuda", {}, "sage2pp_8b", {}),
    ("sageattn_qk_int8_pv_fp8_cuda", {"pv_accum_dtype": "fp32+fp32"}, "sage2_8b", {}),
    ("sageattn_qk_int8_pv_fp8_cuda", {"pv_accum_dtype": "fp32"},
     "sage2_8b:keys_per_promotion=never,row_sum=unrounded", {}),
    ("sageattn_qk_int8_pv_fp8_cuda", {"qk_quant_gran": "per_warp", "smooth_k": False, "smooth_v": True},
     "sage2pp_8b:q_granularity=per_warp,k_granularity=per_warp,smooth_k=false,smooth_v=true", {}),
    ("sageattn_qk_int8_pv_fp8_cuda_sm90", {}, "sage2_8b", LIKE),
    ("sageattn_qk_int8_pv_fp8_cuda_sm90", {"qk_quant_gran": "per_warp"},
     "sage2_8b:q_granularity=per_warp,k_granularity=per_warp", LIKE),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "spec", "like"), RECIPES)
def test_recipe(name, options, spec, like):
    q, k, v = qkv(dim=40)
    k, v = k + 3, v + 2  # so that smoothing shows
    got = getattr(sage, name)(q, k, v, **options)
    want = attention(q, k, v, recipe=spec if spec == "auto" else recipe(spec), **like)
    assert torch.equal(got, want)
    assert compare(exact(q, k, v, sm_scale=40**-0.5)[0], got).cos_sim > 0.999


@pytest.mark.parametrize("function", DENSE[1:], ids=IDS[1:])
def test_every_option_changes_the_answer(function):
    """None is ignored: with biased K and V every recipe differs."""
    q, k, v = qkv()
    k, v = k + 3, v + 2
    default = function(q, k, v)
    options = inspect.signature(function).parameters
    if "smooth_k" in options:
        assert not torch.equal(function(q, k, v, smooth_k=False), default)
    if "smooth_v" in options:
        assert not torch.equal(function(q, k, v, smooth_v=True), default)
    if "qk_quant_gran" in options:
        assert not torch.equal(function(q, k, v, qk_quant_gran="per_warp"), default)


# ---- contracts


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("function", DENSE, ids=IDS)
def test_lse_is_natural_with_the_mean_of_k(function, layout):
    q, k, v = qkv()
    k = k + 5  # a large mean
    want_out, want = exact(q, k, v, sm_scale=0.2)
    given = (q, k, v) if layout == "HND" else [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    out, lse = function(*given, tensor_layout=layout, sm_scale=0.2, return_lse=True)
    assert out.shape == given[0].shape
    assert (lse.shape, lse.dtype) == ((2, 4, 70), torch.float32)
    assert (lse - want).abs().max() < 0.05
    assert compare(want_out, out if layout == "HND" else out.transpose(1, 2)).cos_sim > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("function", DENSE, ids=IDS)
def test_dtypes(function, dtype):
    q, k, v = qkv(dtype=dtype)
    assert function(q, k, v).dtype == dtype


@pytest.mark.parametrize("function", DENSE, ids=IDS)
@pytest.mark.parametrize("lengths", [(20, 30), (30, 20)])
def test_causal_of_unequal_lengths(function, lengths):
    q, k, v = qkv(lengths=lengths)
    if function is sage.sageattn_qk_int8_pv_fp16_triton:  # the original asserts equal lengths there
        with pytest.raises(InvalidArgumentError, match=rf"{lengths[0]} and {lengths[1]}"):
            function(q, k, v, is_causal=True)
        with pytest.raises(InvalidArgumentError, match="causal_alignment"):
            function(*(t.transpose(1, 2) for t in (q, k, v)), tensor_layout="NHD", causal=True)
        return
    want, _ = exact(q, k, v, sm_scale=32**-0.5, masking=Masking(0))
    assert compare(want, function(q, k, v, is_causal=True)).cos_sim > 0.999


@pytest.mark.parametrize("function", DENSE, ids=IDS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_is_honoured(function, kind):
    q, k, v = qkv()
    mask = torch.rand(70, 70, generator=torch.Generator().manual_seed(1)) > 0.4
    mask = mask if kind == "bool" else torch.randn(70, 70, generator=torch.Generator().manual_seed(2)) * 3
    want, _ = exact(q, k, v, sm_scale=32**-0.5, masking=Masking(None, mask[None, None]))
    assert compare(want, function(q, k, v, attn_mask=mask)).cos_sim > 0.999


@pytest.mark.parametrize("function", DENSE, ids=IDS)
def test_other_words(function):
    q, k, v = qkv()
    want = function(q, k, v, is_causal=True, sm_scale=0.3)
    assert torch.equal(function(q, k, v, causal=True, softmax_scale=0.3), want)
    assert torch.equal(function(q, k, v, causal=True, scale=0.3), want)
    assert torch.equal(function(q, k, v, is_causal=True, causal=True, sm_scale=0.3, softmax_scale=None), want)
    harmless = {
        "dropout_p": 0.0,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": True,
        "return_softmax": False,
    }
    assert torch.equal(function(q, k, v, is_causal=True, sm_scale=0.3, **harmless), want)
    with pytest.raises(InvalidArgumentError, match=r"softmax_scale=0\.3 contradicts sm_scale=0\.2"):
        function(q, k, v, sm_scale=0.2, softmax_scale=0.3)
    with pytest.raises(InvalidArgumentError, match="causal=False contradicts is_causal=True"):
        function(q, k, v, is_causal=True, causal=False)


@pytest.mark.parametrize("function", DENSE, ids=IDS)
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_enable_gqa_is_what_the_heads_say(function, layout):
    """Torch's flag, which several callers pass: heads are shared anyway, and False contradicts shapes that share."""
    shared, plain = qkv(layout=layout), qkv(heads=(2, 2), layout=layout)
    want = function(*shared, tensor_layout=layout)
    assert torch.equal(function(*shared, tensor_layout=layout, enable_gqa=True), want)
    want = function(*plain, tensor_layout=layout)
    assert torch.equal(function(*plain, tensor_layout=layout, enable_gqa=False), want)
    with pytest.raises(InvalidArgumentError, match="enable_gqa=False, and q has 4 heads and k 2"):
        function(*shared, tensor_layout=layout, enable_gqa=False)
    with pytest.raises(InvalidArgumentError, match="enable_gqa"):
        function(*plain, tensor_layout=layout, enable_gqa=None)


def test_smooth_k_of_sageattn():
    """It changes a named recipe; "auto" keeps its budget, so that ComfyUI's constant False takes nothing away."""
    q, k, v = qkv()
    k = k + 3
    mine = sage.make_sageattn("sage2_8b")
    unsmoothed = attention(q, k, v, recipe="sage2_8b:smooth_k=false")
    assert torch.equal(mine(q, k, v, smooth_k=False), unsmoothed)
    assert torch.equal(mine(q, k, v, smooth_k=True), attention(q, k, v, recipe="sage2_8b"))
    assert torch.equal(mine(q, k, v), attention(q, k, v, recipe="sage2_8b"))
    assert not torch.equal(mine(q, k, v), unsmoothed)
    before = k.clone()
    for smooth_k in (False, True):
        assert torch.equal(sage.sageattn(q, k, v, smooth_k=smooth_k), sage.sageattn(q, k, v))
        assert torch.equal(sage.make_sageattn("exact")(q, k, v, smooth_k=smooth_k), sage.sageattn(q, k, v))
    assert torch.equal(k, before)  # (the original's first release subtracted in place)
    with pytest.raises(InvalidArgumentError, match="smooth_k"):
        sage.sageattn(q, k, v, smooth_k=0)


@pytest.mark.parametrize("name", list(NAMED))
def test_every_recipe_can_be_installed(name):
    """Each as it is, and with ``smooth_k`` either way."""
    q, k, v = qkv(lengths=(9, 9), dim=16)
    function = sage.make_sageattn(name)
    assert torch.equal(function(q, k, v), attention(q, k, v, recipe=name))
    for smooth_k in (False, True):
        assert function(q, k, v, smooth_k=smooth_k).isfinite().all()


CHANGING = {
    "dropout_p": 0.1,
    "window_size": (128, 0),
    "softcap": 30.0,
    "alibi_slopes": torch.ones(4),
    "return_attn_probs": True,
    "return_softmax": True,
    "block_table": torch.zeros(1, dtype=torch.int32),
}


@pytest.mark.parametrize("option", CHANGING)
@pytest.mark.parametrize("function", DENSE, ids=IDS)
def test_what_would_change_the_answer_is_refused_by_name(function, option):
    with pytest.raises(UnsupportedError, match=option):
        function(*qkv(), **{option: CHANGING[option]})


@pytest.mark.parametrize("function", [*DENSE, sage.sageattn_varlen], ids=[*IDS, "sageattn_varlen"])
def test_unknown_arguments_are_refused(function):
    cu = torch.tensor([0, 70])
    given = qkv() if function is not sage.sageattn_varlen else [*(t[0].transpose(0, 1) for t in qkv()), cu, cu, 70, 70]
    with pytest.raises(TypeError, match="num_splits"):
        function(*given, num_splits=1)
    with pytest.raises(UnsupportedError, match="window_size"):
        function(*given, window_size=(1, 1))


ERRORS = [
    ("sageattn", {"tensor_layout": "NHDD"}, "NHDD"),
    ("sageattn", {"tensor_layout": torch.ones(70, 70)}, r"attn_mask="),
    ("sageattn", {"is_causal": 1}, "is_causal"),
    ("sageattn", {"sm_scale": math.nan}, "nan"),
    ("sageattn_qk_int8_pv_fp16_triton", {"quantization_backend": "tvm"}, "tvm"),
    ("sageattn_qk_int8_pv_fp16_triton", {"smooth_k": 1}, "smooth_k"),
    ("sageattn_qk_int8_pv_fp16_cuda", {"pv_accum_dtype": "fp32+fp16"}, r"fp32\+fp16"),
    ("sageattn_qk_int8_pv_fp8_cuda", {"pv_accum_dtype": "fp16"}, "pv_accum_dtype='fp16'"),
    ("sageattn_qk_int8_pv_fp8_cuda", {"qk_quant_gran": "per_block"}, "per_block"),
]


@pytest.mark.parametrize(("name", "options", "message"), ERRORS)
def test_wrong_values(name, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        getattr(sage, name)(*qkv(), **options)


def test_the_hopper_function_has_one_accumulator():
    with pytest.raises(NotImplementedError, match="'fp32'"):
        sage.sageattn_qk_int8_pv_fp8_cuda_sm90(*qkv(), pv_accum_dtype="fp32")
    with pytest.raises(TypeError, match="smooth_v"):
        sage.sageattn_qk_int8_pv_fp8_cuda_sm90(*qkv(), smooth_v=True)


@pytest.mark.parametrize("function", DENSE[1:], ids=IDS[1:])
def test_a_gradient_is_refused(function):
    q, k, v = qkv()
    with pytest.raises(UnsupportedError, match="no_grad"):
        function(q.requires_grad_(), k, v)


@pytest.mark.parametrize("function", DENSE, ids=IDS)
@torch.no_grad()
def test_compiled(function):
    torch._dynamo.reset()
    q, k, v = qkv(heads=(2, 2), layout="NHD")
    call = torch.compile(lambda *t: function(*t, tensor_layout="NHD", causal=True), fullgraph=True, backend="aot_eager")
    assert torch.equal(call(q, k, v), function(q, k, v, tensor_layout="NHD", is_causal=True))
    if function is not sage.sageattn:
        call = torch.compile(lambda *t: function(*t, smooth_k=False), fullgraph=True, backend="aot_eager")
        assert torch.equal(call(q, k, v), function(q, k, v, smooth_k=False))


# ---- packed sequences


def packed(lengths, heads=2, dim=32, seed=0):
    return torch.randn(sum(lengths), heads, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("smooth_k", [False, True])
def test_varlen_is_its_sequences(is_causal, smooth_k):
    """By position, as callers do; K's mean is each sequence's own, also in padding segments."""
    lengths_q, lengths_k = (5, 70, 1, 30), (9, 70, 200, 20)
    q, k, v = packed(lengths_q, 4), packed(lengths_k, seed=1), packed(lengths_k, seed=2)
    cu_q, cu_k = (torch.tensor((0, *n)).cumsum(0).int() for n in (lengths_q, lengths_k))
    for n in range(4):
        k[cu_k[n] : cu_k[n + 1]] += 10 * n  # a mean of its own
    out = sage.sageattn_varlen(q, k, v, cu_q, cu_k, 70, 200, is_causal, 0.2, smooth_k)
    spec = "sage1" if smooth_k else "sage1:smooth_k=false"
    for n in range(4):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        one = [t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys])]
        options = {"is_causal": True, "causal_alignment": "top_left"} if is_causal else {}
        want = attention(*one, recipe=spec, sm_scale=0.2, **options)
        assert torch.equal(out[rows].transpose(0, 1), want[0]), n
        true, _ = exact(*one, sm_scale=0.2, masking=Masking(0 if is_causal else None))
        if smooth_k:
            assert compare(true, want).cos_sim > 0.998


def test_varlen_words_and_errors():
    q = packed((5, 7))
    cu = torch.tensor([0, 5, 12])
    want = sage.sageattn_varlen(q, q, q, cu, cu, 7, 7, True, 0.3)
    assert torch.equal(sage.sageattn_varlen(q, q, q, cu, cu, 7, 7, causal=True, softmax_scale=0.3), want)
    with pytest.raises(InvalidArgumentError, match="max_seqlen_q=6"):
        sage.sageattn_varlen(q, q, q, cu, cu, 6, 7)
    with pytest.raises(TypeError, match="attn_mask"):
        sage.sageattn_varlen(q, q, q, cu, cu, 7, 7, attn_mask=torch.ones(5, 5))

"""What breaks other attention libraries: right here, or refused with one clear line. One test each."""

import math
import multiprocessing
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from lowbit_attention import (
    InvalidArgumentError,
    UnsupportedError,
    attention,
    attention_varlen,
    compare,
    make_sdpa,
    sdpa,
    sdpa_enabled,
)
from lowbit_attention.reference.exact import exact
from lowbit_attention.reference.masks import Masking

RECIPE = "sage2_8b"
sdpa_8b = make_sdpa(RECIPE)


def patched(*args, **kwargs):
    """torch's function, rerouted; the call must run here."""
    with sdpa_enabled(recipe=RECIPE, strict=True) as report:
        out = F.scaled_dot_product_attention(*args, **kwargs)
    assert report.ran == report.calls == 1
    return out


SDPAS = pytest.mark.parametrize("function", [sdpa_8b, patched], ids=["make_sdpa", "sdpa_enabled"])
ALL = pytest.mark.parametrize(
    "function",
    [lambda q, k, v: attention(q, k, v, recipe=RECIPE), sdpa_8b, patched],
    ids=["attention", "sdpa", "patch"],
)


def qkv(batch=2, heads=(4, 4), lengths=(33, 33), dim=32, v_dim=None, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (heads[0], lengths[0], dim), (heads[1], lengths[1], dim), (heads[1], lengths[1], v_dim or dim)
    return [torch.randn(batch, *shape, generator=g).to(dtype) for shape in shapes]


def close(got, q, k, v, mask=None, causal_offset=None, sm_scale=None):
    """Within 8-bit quantisation of attention in float64, row by row: each is nearer than 98 % cosine similarity."""
    scale = 1 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    want, _ = exact(q, k, v, sm_scale=scale, masking=Masking(causal_offset, mask))
    assert got.dtype == q.dtype
    assert got.isfinite().all()
    assert compare(want, got).cos_sim > 0.999
    rows = F.cosine_similarity(want.double(), got.double(), dim=-1)
    assert q.shape[-1] < 8 or rows[want.any(dim=-1)].min() > 0.98
    assert not got[~want.any(dim=-1)].any()


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


# ---- training


def test_dropout():
    q, k, v = qkv()
    with pytest.raises(UnsupportedError, match=r"dropout_p=0\.1"):
        sdpa_8b(q, k, v, dropout_p=0.1)
    with sdpa_enabled(recipe=RECIPE) as report:
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
    assert report.fallbacks == {"dropout": 1}


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_requires_grad(which):
    """Refused, or exact with gradients when asked for; also through the mask."""
    tensors = [*qkv(), torch.zeros(33, 33)]
    tensors[which].requires_grad_()
    q, k, v, mask = tensors
    for call in (lambda **o: attention(q, k, v, attn_mask=mask, recipe=RECIPE, **o),
                 lambda **o: make_sdpa(RECIPE, **o)(q, k, v, mask)):  # fmt: skip
        with pytest.raises(UnsupportedError, match="no_grad"):
            call()
        with torch.no_grad():
            assert not call().requires_grad
        (got,) = torch.autograd.grad(call(training="exact").square().sum(), tensors[which])
        (want,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, mask).square().sum(), tensors[which])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        with torch.no_grad():  # no gradient is asked for: the recipe runs
            assert torch.equal(call(training="exact"), call())
    with pytest.raises(InvalidArgumentError, match="training='maybe'"):
        attention(q, k, v, recipe=RECIPE, training="maybe")
    with pytest.raises(InvalidArgumentError, match="training='maybe'"):
        make_sdpa(RECIPE, training="maybe")


@pytest.mark.parametrize("function", [
    lambda q, k, v: attention(q, k, v, recipe=RECIPE, training="exact", is_causal=True),
    lambda q, k, v: make_sdpa(RECIPE, training="exact")(q, k, v, is_causal=True),
    lambda q, k, v: sdpa(q, k, v, is_causal=True),
], ids=["attention", "make_sdpa", "sdpa"])  # fmt: skip
def test_compiled_training_without_graph_breaks(function):
    torch._dynamo.reset()
    q, k, v = (t.requires_grad_() for t in qkv())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v))
    want = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v), function(q, k, v))


def test_compiled_gradients_of_a_quantised_recipe_are_refused():
    torch._dynamo.reset()
    q, k, v = (t.requires_grad_() for t in qkv())
    for function in (lambda *t: attention(*t, recipe=RECIPE), sdpa_8b):
        with pytest.raises(Exception, match="no_grad"):
            torch.compile(function, backend="aot_eager")(q, k, v)


# ---- modes, transforms, subclasses


@ALL
def test_inference_mode(function):
    q, k, v = qkv()
    want = function(q, k, v)
    with torch.inference_mode():
        inside = [t.clone() for t in (q, k, v)]
        assert torch.equal(function(*inside), want)
    assert torch.equal(function(*inside), want)  # tensors of inference mode, outside of it
    assert torch.equal(function(q, k, v), want)  # nothing kept from there spoils a later call


@pytest.mark.parametrize("recipe", ["sage2_8b", "exact", "rotated_4b"])
def test_autocast_changes_no_number_of_attention(recipe):
    """Its matrix products would be rounded to bfloat16."""
    q, k, v = qkv()
    cu = torch.tensor([0, 12, 33])
    varlen = [t[0].transpose(0, 1) for t in (q, k, v)]
    for call in (
        lambda: attention(q, k, v, recipe=recipe),
        lambda: attention_varlen(*varlen, cu, cu, recipe=recipe),
        lambda: attention(q, k, v, recipe=recipe, return_lse=True)[1],
    ):
        want = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(call(), want)


@SDPAS
def test_autocast_casts_sdpas_arguments_as_torch_does(function):
    q, k, v = qkv()
    mask = torch.randn(33, 33)
    low = [t.bfloat16() for t in (q, k, v, mask)]
    want = function(*low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v, mask).dtype == torch.bfloat16
        assert torch.equal(function(q, k, v, mask), want)
        assert torch.equal(function(q, k.bfloat16(), v, mask), want)  # mixed, as after a linear layer


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # (torch's, of its own kernel)
def test_vmap_is_refused_or_torchs():
    q, k, v = (t.expand(3, *t.shape) for t in qkv())
    for function in (lambda *t: attention(*t, recipe=RECIPE), sdpa_8b):
        function(*(t[0] for t in (q, k, v)))  # (a call of these shapes that is remembered)
        with pytest.raises(InvalidArgumentError, match=r"torch\.func\.vmap"):
            torch.func.vmap(function)(q, k, v)
        with pytest.raises(InvalidArgumentError, match=r"torch\.func"):
            torch.func.grad(lambda *t: function(*t).sum())(q[0], k[0], v[0])  # noqa: B023
        with pytest.raises(Exception, match=r"torch\.func\.vmap"):
            torch.compile(torch.func.vmap(function), backend="aot_eager")(q, k, v)
    want = torch.func.vmap(F.scaled_dot_product_attention)(q, k, v)
    with sdpa_enabled(recipe=RECIPE) as report:
        assert torch.equal(torch.func.vmap(lambda *t: F.scaled_dot_product_attention(*t))(q, k, v), want)
    assert report.calls == 1
    assert "vmap" in next(iter(report.fallbacks))


class Plain(torch.Tensor):
    """A subclass that only has a name."""


class Wrapper(torch.Tensor):
    """A subclass that dispatches by itself: its own memory holds nothing."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*(a.inner if isinstance(a, Wrapper) else a for a in args), **(kwargs or {}))


@ALL
def test_a_plain_subclass_and_a_parameter(function):
    q, k, v = qkv()
    want = function(q, k, v)
    for kind in (lambda t: t.as_subclass(Plain), lambda t: nn.Parameter(t, requires_grad=False)):
        assert torch.equal(function(*(kind(t) for t in (q, k, v))).as_subclass(torch.Tensor), want)


def test_a_dispatching_subclass_is_refused_or_torchs():
    q, k, v = qkv()
    attention(q, k, v, recipe=RECIPE)  # (a call of these shapes that is remembered)
    for position in range(3):
        given = [Wrapper(t) if n == position else t for n, t in enumerate((q, k, v))]
        for function in (lambda *t: attention(*t, recipe=RECIPE), sdpa_8b):
            with pytest.raises(InvalidArgumentError, match="Wrapper"):
                function(*given)
    want = F.scaled_dot_product_attention(q, k, v)
    with sdpa_enabled(recipe=RECIPE) as report:
        assert torch.equal(F.scaled_dot_product_attention(*(Wrapper(t) for t in (q, k, v))), want)
    assert "Wrapper" in next(iter(report.fallbacks))


@pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
@torch.no_grad()
def test_a_causal_bias_means_what_it_says(variant):
    """Torch's mask that holds no mask: reading its memory as one would be a wrong answer."""
    q, k, v = qkv(lengths=(20, 33))
    bias = variant(20, 33)
    with pytest.raises(InvalidArgumentError, match="attn_mask is a CausalBias"):
        sdpa_8b(q, k, v, bias)
    close(patched(q, k, v, bias), q, k, v, causal_offset=0 if variant is causal_upper_left else 13)
    torch._dynamo.reset()
    call = torch.compile(lambda *t: F.scaled_dot_product_attention(*t, bias), backend="aot_eager")
    with sdpa_enabled(recipe=RECIPE) as report:
        close(call(q, k, v), q, k, v, causal_offset=0 if variant is causal_upper_left else 13)
    assert report.ran == 1


def test_under_a_torch_function_mode():
    """A default device is one."""
    q, k, v = qkv()
    want = patched(q, k, v)
    with torch.device("cpu"):
        assert torch.equal(patched(q, k, v), want)


def test_nested_and_sparse_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)])
    jagged = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
    sparse = torch.ones(1, 2, 3, 8).to_sparse()
    for wrong in (nested, jagged, sparse):
        for function in (lambda *t: attention(*t, recipe=RECIPE), sdpa_8b):
            with pytest.raises(InvalidArgumentError):
                function(wrong, wrong, wrong)
    with pytest.raises(InvalidArgumentError, match=r"nested tensor; attention_varlen"):
        sdpa_8b(nested, nested, nested)


# ---- threads and processes


@ALL
def test_another_thread(function):
    q, k, v = qkv()
    want, found = function(q, k, v), []
    threads = [threading.Thread(target=lambda: found.append(attention(q, k, v, recipe=RECIPE))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(out, want) for out in found)


def _after_fork(queue, q, k, v):
    torch.set_num_threads(1)
    queue.put((attention(q, k, v, recipe=RECIPE).sum().item(), patched(q, k, v).sum().item()))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_after_a_fork():
    q, k, v = qkv()
    want = attention(q, k, v, recipe=RECIPE).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_after_fork, args=(queue, q, k, v))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == (want, want)

"""As test_bad_cases.py: training, modes, transforms and subclasses, threads and processes."""

import multiprocessing
import threading

import pytest
import torch
import torch.nn.functional as F
from bad_cases import ALL, RECIPE, SDPAS, close, patched, qkv, sdpa_8b
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from lowbit_attention import (
    InvalidArgumentError,
    UnsupportedError,
    attention,
    attention_varlen,
    make_sdpa,
    sdpa,
    sdpa_enabled,
)

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


def test_compiled_gradients_of_a_quantized_recipe_are_refused():
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

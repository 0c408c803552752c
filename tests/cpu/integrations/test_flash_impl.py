"""A recipe registered as torch's flash attention implementation."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention as torch_attention

from lowbit_attention import InvalidRecipeError, make_sdpa
from lowbit_attention.integrations.flash_impl import register_flash_impl

pytestmark = pytest.mark.skipif(
    not hasattr(torch_attention, "register_flash_attention_impl"), reason="this torch has no registry"
)


@pytest.fixture
def restored():
    yield
    torch_attention.restore_flash_attention_impl()
    assert torch_attention.current_flash_attention_impl() is None


def qkv(*shape):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*(shape or (2, 4, 48, 16)), generator=g) for _ in range(3)]


@torch.no_grad()
def test_active_until_restored():
    q, k, v = qkv()
    native = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    report = register_flash_impl("sage2_8b")
    assert "lowbit_sage2_8b" in torch_attention.list_flash_attention_impls()
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), native)  # registered, not active
    for _ in range(2):
        torch_attention.activate_flash_attention_impl("lowbit_sage2_8b")
        got = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert torch.equal(got, make_sdpa("sage2_8b")(q, k, v, is_causal=True))
        assert got.stride() == native.stride()
        torch_attention.restore_flash_attention_impl()
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), native)
    assert report.by_implementation() == {"emulation": 2}


@pytest.mark.usefixtures("restored")
def test_what_it_cannot_run_is_torchs():
    q, k, v = qkv()
    longer = qkv(2, 4, 60, 16)[1]
    report = register_flash_impl("sage2_8b", name="mine")
    exact = F.scaled_dot_product_attention(q, longer, longer, is_causal=True)
    torch_attention.activate_flash_attention_impl("mine")
    assert torch.equal(F.scaled_dot_product_attention(q, longer, longer, is_causal=True), exact)
    (grad,) = torch.autograd.grad(F.scaled_dot_product_attention(q.requires_grad_(), k, v).square().sum(), q)
    torch_attention.restore_flash_attention_impl()
    (want,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), q)
    assert torch.equal(grad, want)
    assert report.ran == 0
    assert sorted(report.fallbacks.values()) == [1, 1]
    assert "gradients are asked for" in report.fallbacks
    torch_attention.activate_flash_attention_impl("mine")


@pytest.mark.usefixtures("restored")
@torch.no_grad()
def test_auto_and_compiled():
    q, k, v = qkv()
    report = register_flash_impl()
    native = F.scaled_dot_product_attention(q, k, v)
    torch_attention.activate_flash_attention_impl("lowbit_auto")
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), native)
    assert (report.calls, report.ran) == (1, 0)
    other = register_flash_impl("int8_fp16")
    torch_attention.activate_flash_attention_impl("lowbit_int8_fp16")
    call = torch.compile(lambda *t: F.scaled_dot_product_attention(*t) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(call(q, k, v), make_sdpa("int8_fp16")(q, k, v) + 1)
    assert other.ran == 1


def test_an_unknown_recipe():
    with pytest.raises(InvalidRecipeError, match="sage9"):
        register_flash_impl("sage9")

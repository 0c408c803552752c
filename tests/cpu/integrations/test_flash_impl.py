"""A recipe registered as torch's flash attention implementation."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention as torch_attention

from lowbit_attention import InvalidRecipeError, UnsupportedError, attention, attention_varlen, make_sdpa
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


# ---- packed sequences, and the operators within: on a CPU torch has no kernels for them, and ours are all there are

CU_Q = torch.tensor([0, 7, 7, 30, 48], dtype=torch.int32)
CU_K = torch.tensor([0, 9, 12, 30, 60], dtype=torch.int32)


@pytest.fixture
def active():
    """A report of ``sage2_8b`` while it is active."""
    report = register_flash_impl("sage2_8b")
    torch_attention.activate_flash_attention_impl("lowbit_sage2_8b")
    yield report
    torch_attention.restore_flash_attention_impl()


def packed(heads=4, kv_heads=2):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, h, 16, generator=g) for n, h in ((48, heads), (60, kv_heads), (60, kv_heads))]


def varlen(*options):
    """Torch's module, if its function takes these options."""
    module = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    if "seqused_k" not in str(torch.ops.aten._flash_attention_forward.default._schema):
        pytest.skip("this torch's varlen_attn is another")
    known = inspect.signature(module.varlen_attn).parameters
    if missing := [option for option in options if option not in known]:
        pytest.skip(f"this torch's varlen_attn has no {', '.join(missing)}")
    return module


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_attn(active, causal):
    module, (q, k, v) = varlen("enable_gqa"), packed()
    options = {"window_size": (-1, 0) if causal else (-1, -1), "enable_gqa": True, "scale": 0.3}
    out, lse = module.varlen_attn(q, k, v, CU_Q, CU_K, 23, 30, return_aux=module.AuxRequest(lse=True), **options)
    want = attention_varlen(
        q, k, v, CU_Q, CU_K, recipe="sage2_8b", is_causal=causal, sm_scale=0.3, return_lse=True
    )  # (causality is bottom-right)
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])
    assert active.by_implementation() == {"emulation": 1}
    into = torch.full_like(q, torch.nan)
    assert module.varlen_attn_out(into, q, k, v, CU_Q, CU_K, 23, 30, **options) is into
    assert torch.equal(into, out)
    assert active.ran == 2


@torch.no_grad()
def test_varlen_attn_compiled(active):
    torch._dynamo.reset()
    module, (q, k, v) = varlen(), packed(kv_heads=4)
    compiled = torch.compile(
        lambda *t: module.varlen_attn(*t, CU_Q, CU_K, 23, 30) * 2, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(q, k, v), module.varlen_attn(q, k, v, CU_Q, CU_K, 23, 30) * 2)
    assert active.ran == 2


DECLINED = {
    "window": ({"window_size": (8, 0)}, "window_size_left, window_size_right of torch's flash attention"),
    "seqused": ({"seqused_k": torch.tensor([9, 3, 18, 30], dtype=torch.int32)}, "seqused_k of torch's"),
    "splits": ({"num_splits": 1}, "num_splits of torch's"),
}


@torch.no_grad()
@pytest.mark.parametrize("what", DECLINED)
def test_what_it_leaves_to_torchs_kernel(active, what):
    options, reason = DECLINED[what]
    module = varlen(*options)
    with pytest.raises(UnsupportedError, match=r"report says why.* torch has no _flash_attention_forward for cpu"):
        module.varlen_attn(*packed(kv_heads=4), CU_Q, CU_K, 23, 30, **options)
    assert active.ran == 0
    assert next(iter(active.fallbacks)).startswith(reason)


def test_gradients_of_varlen_attn_are_torchs(active):
    """Its operator runs without gradients, and is asked for some afterwards."""
    q, k, v = packed(kv_heads=4)
    with pytest.raises(UnsupportedError, match="torch has no _flash_attention_forward for cpu"):
        varlen().varlen_attn(q.requires_grad_(), k, v, CU_Q, CU_K, 23, 30)
    assert active.ran == 0
    assert active.calls == 1


@torch.no_grad()
def test_forward_of_a_batch(active):
    q, k, v = (t.transpose(1, 2) for t in qkv())
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, None, None, 48, 48, 0.0, True, False)
    want, want_lse = attention(q, k, v, recipe="sage2_8b", is_causal=True, layout="NHD", return_lse=True)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    with pytest.raises(UnsupportedError):
        torch.ops.aten._flash_attention_forward(q[:, :40], k, v, None, None, 40, 48, 0.0, True, False)
    with pytest.raises(UnsupportedError):
        torch.ops.aten._flash_attention_forward(q, k, v, None, None, 48, 48, 0.5, False, False)
    assert [reason.partition(":")[0] for reason in active.fallbacks] == ["causal with unequal lengths", "dropout"]


@torch.no_grad()
def test_a_kernel_of_torchs_asks_for_torchs_within(monkeypatch):
    """On CUDA torch's SDPA kernel calls `_flash_attention_forward`, which is ours, too: it must not run the recipe."""
    from lowbit_attention.integrations.flash_impl import _Impl

    impl = _Impl("sage2_8b", None, "warn")
    q, k, v = qkv()
    given = *(t.transpose(1, 2) for t in (q, k, v)), None, None, 48, 48, 0.0, False, False

    class Kernel:
        def __init__(self, run):
            self.call_boxed = run

    impl.kernels = {
        ("_scaled_dot_product_flash_attention", "CPU"): Kernel(lambda keys, *_, **__: impl.on_forward(None, *given)),
        ("_flash_attention_forward", "CPU"): Kernel(lambda keys, *_, **__: "torch's"),
    }
    assert impl.on_flash(None, q, k, v, 0.0, False, True) == "torch's"  # (a debug mask is torch's)
    assert impl.rerouter.report.fallbacks == {"the debug mask is asked for": 1}
    assert len(impl.on_forward(None, *given)) == 5  # (not within: ours)
    assert impl.rerouter.report.ran == 1


@torch.no_grad()
def test_restored_the_cpu_has_none_again():
    register_flash_impl("sage2_8b")
    torch_attention.activate_flash_attention_impl("lowbit_sage2_8b")
    torch_attention.restore_flash_attention_impl()
    with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
        varlen().varlen_attn(*packed(kv_heads=4), CU_Q, CU_K, 23, 30)

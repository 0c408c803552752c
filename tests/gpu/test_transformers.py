"""Transformers' models and torch's flash operators on a Hopper GPU: a kernel runs, and gradients are torch's."""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="needs the extra transformers")
pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")

import hf_cases
from hf_cases import read
from kernel_cases import hopper_only
from wgmma_cases import KERNEL

from lowbit_attention import attention_varlen, compare
from lowbit_attention.integrations.flash_impl import register_flash_impl
from lowbit_attention.integrations.transformers import register, unregister

pytestmark = hopper_only
MODELS = {
    "llama": hf_cases.decoder("Llama", hidden_size=256, head_dim=64),
    "mistral": hf_cases.decoder("Mistral", hidden_size=256, head_dim=64, sliding_window=100),
    "gpt_oss": hf_cases.decoder(
        "GptOss", hidden_size=256, head_dim=64, sliding_window=100, num_local_experts=2, num_experts_per_tok=2
    ),
}


@pytest.fixture(autouse=True)
def registered():
    yield
    unregister()


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_runs_every_layer(name, compiled):
    torch._dynamo.reset()
    model = MODELS[name].build().to("cuda", torch.bfloat16)
    inputs = {n: t.cuda() for n, t in MODELS[name].inputs(300).items()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, :90] = 0
    keep = inputs["attention_mask"].bool()
    native = read(model(**inputs))[keep]
    report = register("sage2_8b", strict=True)
    model.set_attn_implementation("lowbit")
    out = read((torch.compile(model, fullgraph=True) if compiled else model)(**inputs))[keep]
    assert report.by_implementation() == {KERNEL: 2}
    unregister()
    emulated = register("sage2_8b", strict=True, like="sm_90a")
    expected = read(model(**inputs))[keep]
    assert emulated.by_implementation() == {"emulation": 2}
    # (random weights make much of little: a recipe's own error is what the emulation says it is)
    assert compare(native, out).cos_sim > compare(native, expected).cos_sim - 0.002
    assert compare(native, expected).cos_sim > 0.98


@torch.no_grad()
def test_packed_sequences_run_as_one_call():
    model = MODELS["llama"].build().to("cuda", torch.bfloat16)
    cu = torch.tensor([0, 100, 330, 512], dtype=torch.int32, device="cuda")
    ids = MODELS["llama"].inputs(512)["input_ids"][:1].cuda()
    report = register("sage2_8b", strict=True)
    model.set_attn_implementation("lowbit")
    model(input_ids=ids, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=230, max_length_k=230, use_cache=False)
    assert report.by_implementation() == {KERNEL: 2}


@pytest.fixture
def deterministic():
    """Torch's backward kernel adds in any order otherwise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def active():
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        pytest.skip("this torch has no registry")
    report = register_flash_impl("sage2_8b")
    torch.nn.attention.activate_flash_attention_impl("lowbit_sage2_8b")
    yield report
    torch.nn.attention.restore_flash_attention_impl()


def packed(requires_grad=False):
    lengths = [300, 17, 0, 200]
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(sum(lengths), 8, 64, generator=g).to("cuda", torch.bfloat16) for _ in range(3)]
    cu = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    return [t.requires_grad_(requires_grad) for t in tensors], cu


@torch.no_grad()
def test_varlen_attn(active):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    (q, k, v), cu = packed()
    out = varlen.varlen_attn(q, k, v, cu, cu, 300, 300)
    assert active.by_implementation() == {KERNEL: 1}
    assert torch.equal(out, attention_varlen(q, k, v, cu, cu, recipe="sage2_8b"))


def test_gradients_of_torchs_kernels_are_torchs(active, deterministic):
    """What runs is torch's kernel, and what that asks for within is torch's, too."""
    q, k, v = (t[None].transpose(1, 2).detach().requires_grad_() for t in packed()[0])
    backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    answers = []
    for _ in range(2):
        with torch.nn.attention.sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v)
            answers.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
        if len(answers) == 1:
            assert active.fallbacks == {"gradients are asked for": 1}
            torch.nn.attention.restore_flash_attention_impl()
    assert active.ran == 0
    for ours, native in zip(*answers, strict=True):
        assert torch.equal(ours, native)


def test_gradients_of_varlen_attn_are_torchs(active):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    tensors, cu = packed(requires_grad=True)
    out = varlen.varlen_attn(*tensors, cu, cu, 300, 300)
    grads = torch.autograd.grad(out.float().square().sum(), tensors)
    assert active.ran == 0
    torch.nn.attention.restore_flash_attention_impl()
    assert torch.equal(out, varlen.varlen_attn(*tensors, cu, cu, 300, 300))
    assert all(grad.isfinite().all() for grad in grads)

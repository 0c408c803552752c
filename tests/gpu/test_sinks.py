"""Sinks on the kernels: of calls and of packed sequences, without a look at the device, against float64."""

import pytest
import torch

from lowbit_attention import attention, attention_varlen, explain

KERNELS = {"fast_8b": "attention_wgmma", "sage2_8b": "attention_wgmma", "sage1": "attention_mma"}
SINKS = [1.0, -3.0, 12.0, -torch.inf]

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="wants a Hopper GPU"
)


def inputs(dtype, head_dim, tokens=700):
    g = torch.Generator("cuda").manual_seed(0)
    heads = (4, 2, 2)
    q, k, v = (torch.randn(2, h, tokens, head_dim, generator=g, device="cuda").to(dtype) for h in heads)
    return q, k, v, torch.tensor(SINKS, device="cuda", dtype=dtype)


def exact(q, k, v, sinks, is_causal):
    q, k, v = q.double(), *(t.double().repeat_interleave(2, dim=1) for t in (k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool, device="cuda").tril(), -torch.inf)
    column = sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)
    every = torch.cat((logits, column), dim=-1)
    return every.softmax(dim=-1)[..., :-1] @ v, every.logsumexp(dim=-1)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 128), (torch.float16, 64)])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_with_sinks(name, dtype, head_dim, is_causal):
    q, k, v, sinks = inputs(dtype, head_dim)
    assert explain(q, k, v, recipe=name, is_causal=is_causal, sinks=sinks).implementation == KERNELS[name]

    def run(sinks):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return attention(
                q, k, v, recipe=name, is_causal=is_causal, sinks=sinks, return_lse=True, on_emulation="error"
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def error(sinks, answer):
        expected, expected_lse = exact(q, k, v, sinks, is_causal)
        out, lse = answer
        return (out.double() - expected).norm() / expected.norm(), (lse - expected_lse).abs().max()

    none = torch.full_like(sinks, -torch.inf)
    run(sinks)  # (loading the kernels waits)
    (plain, plain_lse), (with_sinks, lse) = error(none, run(None)), error(sinks, run(sinks))
    # σ(lse − s) errs by a quarter of lse's error at most, and by 12 a head's output is so small that it hardly counts;
    # the output is rounded once more, by 2⁻⁹ at most in bf16.
    assert with_sinks <= 1.05 * plain + plain_lse / 4 + 2**-9
    assert lse <= plain_lse + 1e-5


@pytest.mark.parametrize("name", KERNELS)
def test_sequences_with_sinks(name):
    q, k, v, sinks = inputs(torch.bfloat16, 128)
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
    cu = torch.tensor([0, 300, 301, 690], device="cuda", dtype=torch.int32)
    plain, plain_lse = attention_varlen(q, k, v, cu, cu, recipe=name, is_causal=True, return_lse=True)
    out, lse = attention_varlen(q, k, v, cu, cu, recipe=name, is_causal=True, sinks=sinks, return_lse=True)
    share = torch.sigmoid(plain_lse - sinks.float()[:, None]).masked_fill(plain_lse == -torch.inf, 0)
    assert torch.equal(out, (plain.float() * share.mT[..., None]).bfloat16())
    assert torch.allclose(lse, torch.logaddexp(plain_lse, sinks.float()[:, None]), atol=1e-6)
    assert bool((out[690:] == 0).all())


def test_captured_and_compiled():
    q, k, v, sinks = inputs(torch.bfloat16, 128)
    expected = attention(q, k, v, recipe="fast_8b", sinks=sinks)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, recipe="fast_8b", sinks=sinks)
    graph.replay()
    assert torch.equal(out, expected)
    compiled = torch.compile(lambda *t: attention(*t[:3], recipe="fast_8b", sinks=t[3]), fullgraph=True)
    # (its σ is another program's: a last bit of the share, and so of bf16)
    assert torch.allclose(compiled(q, k, v, sinks).float(), expected.float(), rtol=2**-7, atol=2**-12)

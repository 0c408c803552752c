"""Sinks by output and lse are the softmax with one term more."""

import pytest
import torch

from lowbit_attention import UnsupportedError, attention
from lowbit_attention.call.torch_call import TorchCall
from lowbit_attention.integrations.rerouting import Rerouter
from lowbit_attention.integrations.sinks import exactly_with_sinks, run_with_sinks, with_sinks

TORCH = torch._C._nn.scaled_dot_product_attention


def tensors(rows=24, keys=40):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, rows, 16, generator=g)
    k, v = (torch.randn(2, 2, keys, 16, generator=g) for _ in range(2))
    return q, k, v, torch.randn(4, 1, generator=g) * 2


def by_hand(q, k, v, sinks, visible):
    k, v = (t.double().repeat_interleave(2, dim=1) for t in (k, v))
    logits = (q.double() @ k.transpose(-1, -2) / 4).masked_fill(~visible, -torch.inf)
    extra = sinks.double()[None, ..., None].expand(*logits.shape[:3], 1)
    return torch.softmax(torch.cat([logits, extra], dim=-1), dim=-1)[..., :-1] @ v


def masks(rows, keys):
    ragged = torch.rand(2, 1, rows, keys, generator=torch.Generator().manual_seed(1)) < 0.6
    ragged[0, 0, 3] = False
    return {
        "none": (None, False, torch.ones(rows, keys, dtype=torch.bool)),
        "causal": (None, True, torch.ones(rows, keys, dtype=torch.bool).tril()),
        "bool": (ragged, False, ragged),
        "float": (torch.zeros(2, 1, rows, keys).masked_fill(~ragged, -torch.inf), False, ragged),
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("way", ["exact", "torch", "gradients"])
def test_it_is_the_softmax_with_one_term_more(kind, way):
    q, k, v, sinks = tensors()
    mask, causal, visible = masks(24, 40)[kind]
    call = TorchCall(q, k, v, mask, 0.0, causal, None, True)
    want = by_hand(q, k, v, sinks, visible)
    if way == "exact":
        got = run_with_sinks(Rerouter("exact", strict=True), call, sinks, TORCH)
    elif way == "torch":
        got = exactly_with_sinks(call, sinks, TORCH)
    else:
        rerouter = Rerouter("sage2_8b")
        with torch.enable_grad():
            got = run_with_sinks(rerouter, call, sinks.requires_grad_(), TORCH)
            (grad,) = torch.autograd.grad(got.sum(), sinks)
        assert rerouter.report.fallbacks == {"gradients are asked for": 1}
        assert grad.abs().min() > 0
        with pytest.raises(UnsupportedError, match="a gradient is asked"), torch.enable_grad():
            run_with_sinks(Rerouter("sage2_8b", training="refuse"), call, sinks, TORCH)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_a_row_that_sees_nothing_is_nothing_whatever_the_sink():
    out, lse = torch.zeros(1, 1, 2, 4), torch.tensor([[[-torch.inf, 0.0]]])
    for sink in (-torch.inf, -1e30, 0.0, 1e30, torch.inf):
        assert torch.equal(with_sinks(out, lse, torch.full((1, 1), sink)), out)


def test_a_sink_of_minus_infinity_is_no_sink():
    q, k, v, sinks = tensors()
    out, lse = attention(q, k, v, recipe="sage2_8b", return_lse=True)
    assert torch.equal(with_sinks(out, lse, torch.full_like(sinks, -torch.inf)), out)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sage2_8b", "auto"])
def test_compiled_as_eager(name):
    torch._dynamo.reset()
    q, k, v, sinks = tensors()
    rerouter = Rerouter(name)

    def call(q, k, v, sinks):
        return run_with_sinks(rerouter, TorchCall(q, k, v, None, 0.0, True, None, True), sinks, TORCH) * 2

    want = call(q, k, v, sinks)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, sinks)
    torch.testing.assert_close(got, want)
    assert rerouter.report.calls == 2
    assert rerouter.report.ran == (0 if name == "auto" else 2)


def test_sinks_one_for_each_query():
    q, k, v, _ = tensors()
    each = torch.randn(2, 4, 24)
    call = TorchCall(q, k, v, None, 0.0, False, None, True)
    torch.testing.assert_close(
        run_with_sinks(Rerouter("exact"), call, each, TORCH), exactly_with_sinks(call, each, TORCH)
    )

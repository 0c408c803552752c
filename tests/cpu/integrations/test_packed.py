"""`run_packed`: packed sequences by a recipe, or by torch under a mask of blocks, each counted once."""

import pytest
import torch
import torch.nn.functional as F

from lowbit_attention import EmulationRefusedError, UnsupportedError, attention_varlen
from lowbit_attention.integrations.packed import PackedCall, answer_packed, exactly_packed, run_packed, sees_itself
from lowbit_attention.integrations.rerouting import Rerouter

CU_Q, CU_K = torch.tensor([0, 3, 3, 11, 16]), torch.tensor([0, 7, 9, 17, 24])


def call(causal=True, sinks=None, tail=0, **options):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(16 + tail, 4, 16, generator=g)
    k, v = (torch.randn(24 + tail, 2, 16, generator=g) for _ in range(2))
    return PackedCall(q, k, v, CU_Q, CU_K, causal, None, sinks)._replace(**options)


def one_by_one(given):
    """Each sequence by torch's own function."""
    outs = []
    for b in range(len(given.cu_q) - 1):
        q = given.query[given.cu_q[b] : given.cu_q[b + 1]].transpose(0, 1)[None]
        k, v = (t[given.cu_k[b] : given.cu_k[b + 1]].transpose(0, 1)[None] for t in (given.key, given.value))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        mask = mask.tril(k.shape[2] - q.shape[2]) if given.is_causal else mask
        outs.append(F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1))
    return F.pad(torch.cat(outs), (0, 0, 0, 0, 0, len(given.query) - int(given.cu_q[-1])))


@torch.no_grad()
@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_exact_and_torchs_are_each_sequence_by_itself(causal, tail):
    given = call(causal, tail=tail)
    want = one_by_one(given)
    rerouter = Rerouter("exact", strict=True)
    torch.testing.assert_close(run_packed(rerouter, given), want)
    torch.testing.assert_close(exactly_packed(given), want)
    assert rerouter.report.ran == 1


@torch.no_grad()
def test_a_recipe_is_attention_varlens():
    given, rerouter = call(), Rerouter("sage2_8b")
    want = attention_varlen(given.query, given.key, given.value, CU_Q, CU_K, recipe="sage2_8b", is_causal=True)
    assert torch.equal(run_packed(rerouter, given), want)
    out, lse = answer_packed(rerouter, given, return_lse=True)
    assert torch.equal(out, want)
    assert lse.shape == (4, 16)
    assert rerouter.report.by_implementation() == {"emulation": 2}


@torch.no_grad()
def test_auto_on_a_cpu_is_exact_and_says_why():
    given, rerouter = call(), Rerouter()
    torch.testing.assert_close(run_packed(rerouter, given), one_by_one(given))
    ((reason, n),) = rerouter.report.fallbacks.items()
    assert reason.startswith("recipe auto: ")
    assert n == 1


@torch.no_grad()
def test_sinks():
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(2))
    given = call(sinks=sinks)
    torch.testing.assert_close(run_packed(Rerouter("exact"), given), exactly_packed(given))
    assert not torch.allclose(exactly_packed(given), exactly_packed(call()), atol=1e-2)


def test_gradients_are_torchs():
    given, rerouter = call(sinks=torch.zeros(4)), Rerouter("sage2_8b")
    given.query.requires_grad_()
    (grad,) = torch.autograd.grad(run_packed(rerouter, given).square().sum(), given.query)
    assert grad.abs().sum() > 0
    assert rerouter.report.fallbacks == {"gradients are asked for": 1}
    with pytest.raises(UnsupportedError, match="a gradient is asked"):
        run_packed(Rerouter("sage2_8b", training="refuse"), given)


@torch.no_grad()
def test_what_the_recipe_cannot_run():
    wide = torch.randn(16, 2, 260)
    given = call(query=wide, key=wide, value=wide, cu_k=CU_Q)
    rerouter = Rerouter("sage2_8b")
    torch.testing.assert_close(run_packed(rerouter, given), exactly_packed(given))
    assert rerouter.report.fallbacks == {"head_dim 260 is above 256": 1}
    with pytest.raises(UnsupportedError, match="head_dim 260"):
        run_packed(Rerouter("sage2_8b", strict=True), given)
    with pytest.raises(EmulationRefusedError):
        run_packed(Rerouter("sage2_8b", on_emulation="error"), call())


@torch.no_grad()
@pytest.mark.parametrize("sinks", [None, torch.ones(4)], ids=["plain", "sinks"])
def test_compiled_as_eager(sinks):
    torch._dynamo.reset()
    rerouter, given = Rerouter("sage2_8b"), call(sinks=sinks)

    def run(*tensors):
        return run_packed(rerouter, PackedCall(*tensors, True, None, sinks)) * 2

    want = run(*given[:5])
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(*given[:5]), want)
    assert rerouter.report.by_implementation() == {"emulation": 2}


@torch.no_grad()
def test_autocast_casts_as_torchs_function_does():
    given = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run_packed(Rerouter("sage2_8b"), given)
    assert out.dtype == torch.bfloat16


def test_who_sees_whom():
    sees = sees_itself(torch.tensor([1, 3, 6]), torch.tensor([0, 3, 7]), 7, 8, is_causal=True, window=2)
    want = torch.zeros(7, 8, dtype=torch.bool)
    want[1, [0, 1]] = want[2, [1, 2]] = True
    want[3, [3, 4]] = want[4, [4, 5]] = want[5, [5, 6]] = True
    assert torch.equal(sees, want)

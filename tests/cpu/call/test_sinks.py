"""Sinks: a logit per head in every row's softmax, without a value. Checked against softmax with one column more."""

import pytest
import torch

import lowbit_attention as la
from lowbit_attention import InvalidArgumentError, KeyPadding, UnsupportedError, attention, attention_varlen, explain

B, HQ, HKV, N, M, D = 2, 4, 2, 37, 53, 32
SINKS = torch.tensor([0.3, -4.0, 9.0, -torch.inf])


def tensors(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(B, h, n, D, generator=g, dtype=torch.float64).to(dtype) for h, n in ((HQ, N), (HKV, M), (HKV, M))
    )


def exact(q, k, v, sinks, visible=None):
    """In float64, from the definition."""
    q, k, v = q.double(), *(t.double().repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    column = sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)
    every = torch.cat((logits, column), dim=-1)
    lse = every.logsumexp(dim=-1)
    weights = (every - torch.where(lse == -torch.inf, 0, lse)[..., None]).exp()
    return weights[..., :-1] @ v, lse


def causal(rows, keys):
    return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_attention_with_sinks(layout, is_causal, dtype):
    q, k, v = tensors(dtype)
    expected, expected_lse = exact(q, k, v, SINKS, causal(N, M) if is_causal else None)
    if layout == "NHD":
        q, k, v, expected = (t.transpose(1, 2) for t in (q, k, v, expected))
    out, lse = attention(q, k, v, recipe="exact", is_causal=is_causal, layout=layout, sinks=SINKS, return_lse=True)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert torch.allclose(out.double(), expected, atol=4e-6)  # (float32 sums of some 50 numbers near 1)
    assert torch.allclose(lse.double(), expected_lse, atol=4e-6)
    alone = attention(q, k, v, recipe="exact", is_causal=is_causal, layout=layout, sinks=SINKS)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("recipe", ["sage2_8b", "fast_8b", "sage2_4b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_recipe_errs_no_more_with_sinks(recipe, dtype):
    q, k, v = tensors(dtype)

    def error(sinks):
        expected, expected_lse = exact(q, k, v, torch.full((HQ,), -torch.inf) if sinks is None else sinks)
        out, lse = attention(q, k, v, recipe=recipe, sinks=sinks, return_lse=True)
        assert out.dtype == dtype
        return (out.double() - expected).norm() / expected.norm(), (lse - expected_lse).abs().max()

    (plain, plain_lse), (with_sinks, lse) = error(None), error(SINKS[:2].repeat_interleave(2))
    # σ(lse − s) errs by a quarter of lse's error at most; bf16 rounds once more, by 2⁻⁹ at most.
    assert with_sinks <= 1.02 * plain + plain_lse / 4 + (2**-9 if dtype == torch.bfloat16 else 0)
    assert lse <= plain_lse + 1e-6


def test_rows_that_see_nothing_see_the_sink():
    q, k, v = tensors()
    lengths = torch.tensor([0, M])
    out, lse = attention(
        q, k, v, recipe="sage2_8b", attn_mask=KeyPadding(lengths), sinks=SINKS, return_lse=True, on_emulation="allow"
    )
    assert bool((out[0] == 0).all())
    assert torch.equal(lse[0], SINKS[:, None].expand(-1, N))
    assert bool(out[1].isfinite().all())


def test_without_a_sink_nothing_changes():
    q, k, v = tensors(torch.bfloat16)
    none = torch.full((HQ,), -torch.inf)
    for recipe in ("exact", "sage2_8b"):
        plain, lse = attention(q, k, v, recipe=recipe, return_lse=True)
        out, same = attention(q, k, v, recipe=recipe, sinks=none, return_lse=True)
        assert torch.equal(plain, out)
        assert torch.equal(lse, same)


@pytest.mark.parametrize("recipe", ["exact", "sage2_8b"])
def test_sequences_with_sinks(recipe):
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in tensors())
    cu_q, cu_k = torch.tensor([0, 20, 30]), torch.tensor([0, 11, 50])
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, recipe=recipe, is_causal=True, sinks=SINKS, return_lse=True)
    for a, b, c, d in ((0, 20, 0, 11), (20, 30, 11, 50)):
        one = (t[None].transpose(1, 2) for t in (q[a:b], k[c:d], v[c:d]))
        own, own_lse = attention(*one, recipe=recipe, is_causal=True, sinks=SINKS, return_lse=True)
        assert torch.equal(out[a:b].transpose(0, 1), own[0])
        assert torch.allclose(lse[:, a:b], own_lse[0], atol=2e-6)  # (a vector's and a single logarithm: the last bit)
    assert bool((out[30:] == 0).all())


@pytest.mark.parametrize("recipe", ["auto", "sage2_8b"])
def test_compiled(recipe):
    q, k, v = tensors()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(q, k, v, sinks):
        return attention(q, k, v, recipe=recipe, is_causal=True, sinks=sinks) + 1

    expected = attention(q, k, v, recipe=recipe, is_causal=True, sinks=SINKS) + 1
    assert torch.allclose(step(q, k, v, SINKS), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("sinks", "text"),
    [
        (1.0, "torch.Tensor.*float"),
        (torch.zeros(HKV), r"\[Hq\] = \[4\].*\(2,\)"),
        (torch.zeros(HQ, dtype=torch.int32), "int32"),
        (torch.zeros(HQ, 1), r"\(4, 1\)"),
        (torch.zeros(HQ, device="meta"), "device.*meta"),
    ],
)
def test_wrong_sinks(sinks, text):
    q, k, v = tensors()
    with pytest.raises(InvalidArgumentError, match=text):
        attention(q, k, v, sinks=sinks)
    with pytest.raises(InvalidArgumentError, match=text):
        explain(q, k, v, sinks=sinks)
    rows = (t[0].transpose(0, 1) for t in (q, k, v))
    with pytest.raises(InvalidArgumentError, match=text):
        attention_varlen(*rows, torch.tensor([0, N]), torch.tensor([0, M]), sinks=sinks)


def test_a_gradient_is_refused():
    q, k, v = tensors()
    parameter = torch.nn.Parameter(SINKS.clone())
    with pytest.raises(UnsupportedError, match="sinks has no gradient"):
        attention(q, k, v, sinks=parameter)
    with torch.no_grad():
        assert attention(q, k, v, sinks=parameter).shape == q.shape


def test_explain_asks_for_the_lse():
    q, k, v = tensors()
    assert explain(q, k, v, sinks=SINKS).implementation == explain(q, k, v, return_lse=True).implementation
    assert la.attention(q, k, v, sinks=SINKS).shape == q.shape

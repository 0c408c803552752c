"""Properties of every recipe: finite in, finite out; what is not finite stays where it was; nothing depends on luck.

Hypothesis draws shapes (empty ones included), dtypes, masks and values from subnormal to the largest of the dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit_attention import RECIPES, attention, attention_varlen

FP32_MAX = torch.finfo(torch.float32).max
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAGNITUDES = (0.0, 1e-45, 1e-40, 1e-38, 1e-34, 1e-20, 1e-4, 1.0, 300.0, 65504.0, 1e10, 1e19, 1e30, 1e38, 3.4e38)
FEW = settings(deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
ALL = pytest.mark.parametrize("recipe", sorted(RECIPES))


@dataclass
class Call:
    """The arguments of one call, and what hides keys, expanded."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    is_causal: bool
    mask: Tensor | None

    def logits(self) -> Tensor:
        """In float64, −inf where hidden."""
        group = self.q.shape[1] // max(1, self.k.shape[1])
        s = self.scale * (self.q.double() @ self.k.double().repeat_interleave(group, dim=1).transpose(-1, -2))
        if self.mask is not None:
            s = s.masked_fill(~self.mask, -math.inf) if self.mask.dtype == torch.bool else s + self.mask
        if self.is_causal:
            rows, keys = s.shape[-2:]
            s = s.masked_fill(~torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows), -math.inf)
        return s

    def hidden_by_biases(self) -> Tensor:
        """Keys whose bias is so far below its row's largest that they are hidden, whatever they hold."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return torch.tensor(False)
        rows, keys = self.q.shape[2], self.k.shape[2]
        bias = self.mask.double().expand(*self.mask.shape[:-2], rows, keys)
        if self.is_causal:
            bias = bias.masked_fill(~torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows), -math.inf)
        return bias < bias.amax(dim=-1, keepdim=True) - 9000

    def run(self, recipe: str) -> tuple[Tensor, Tensor]:
        return attention(
            self.q, self.k, self.v,
            recipe=recipe, sm_scale=self.scale, is_causal=self.is_causal, attn_mask=self.mask, return_lse=True,
        )  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values around one magnitude, with zero channels, constant tensors, or one token much larger than the rest."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    largest = torch.finfo(dtype).max
    x = torch.randn(shape, generator=g, dtype=torch.float64) * draw(st.sampled_from(MAGNITUDES))
    kind = draw(st.sampled_from(["normal", "constant", "zero_channels", "one_large_token", "limits"]))
    if x.numel():
        if kind == "constant":
            x = x.flatten()[0].expand(shape)
        elif kind == "zero_channels":
            x[..., :: draw(st.integers(1, 3))] = 0
        elif kind == "one_large_token":
            x[..., -1, :] = draw(st.sampled_from(MAGNITUDES))
        elif kind == "limits":
            x = torch.where(torch.rand(shape, generator=g) < 0.5, largest, -largest).double()
    return x.clamp(-largest, largest).to(dtype).clone()


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Logits fit float32, their terms and a bias too: Q is made smaller where they would not."""
    dtype = draw(st.sampled_from(DTYPES))
    batch, kv_heads, group = (draw(st.integers(1, 2)) for _ in range(3))
    heads = kv_heads * group
    q_len, kv_len = (draw(st.sampled_from([0, 1, 2, 7, 33, 65, 130])) for _ in range(2))
    d, dv = (draw(st.sampled_from([1, 2, 5, 16, 31, 72])) for _ in range(2))
    q = draw(tensors((batch, heads, q_len, d), dtype))
    k = draw(tensors((batch, kv_heads, kv_len, d), dtype))
    v = draw(tensors((batch, kv_heads, kv_len, dv), dtype))
    scale = draw(st.sampled_from([d**-0.5, 1.0, -0.5, 0.0]))
    terms = abs(scale) * (q.double().abs() @ k.double().abs().repeat_interleave(group, dim=1).transpose(-1, -2))
    if terms.numel() and (top := float(terms.max())) > FP32_MAX / 4:
        q = (q.double() * (FP32_MAX / 4 / top)).to(dtype)
    return Call(q, k, v, scale, draw(st.booleans()), draw(masks(q_len, kv_len, dtype)))


@st.composite
def masks(draw: st.DrawFn, q_len: int, kv_len: int, dtype: torch.dtype) -> Tensor | None:
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(["none", "bool", "padding", "bias", "lowest"]))
    if kind == "none":
        return None
    chosen = torch.rand(1 if kind == "padding" else q_len, kv_len, generator=g) < draw(st.sampled_from([0.1, 0.7]))
    if kind in ("bool", "padding"):
        return chosen
    bias = torch.finfo(dtype).min / 2 if kind == "lowest" else -50.0  # what some callers add instead of −inf
    return torch.where(chosen, bias, 0.0).to(dtype)


@ALL
@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys", "queries_and_keys"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_empty(recipe: str, empty: str, is_causal: bool) -> None:
    batch, heads = 2 * (empty != "batch"), 2 * (empty != "heads")
    q_len, kv_len = 5 * ("queries" not in empty), 7 * ("keys" not in empty)
    q, k = torch.ones(batch, heads, q_len, 8), torch.ones(batch, heads, kv_len, 8)
    out, lse = Call(q, k, k[..., :3], 1.0, is_causal, torch.ones(q_len, kv_len, dtype=torch.bool)).run(recipe)
    assert out.shape == (batch, heads, q_len, 3)
    assert lse.shape == (batch, heads, q_len)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert attention(q, k, k, recipe=recipe, is_causal=is_causal).shape == q.shape


@ALL
@FEW
@given(call=calls())
def test_finite_in_finite_out(recipe: str, call: Call) -> None:
    out, lse = call.run(recipe)
    seen = call.logits().amax(dim=-1) > -math.inf if call.k.shape[2] else torch.zeros(lse.shape, dtype=torch.bool)
    assert out.shape == (*call.q.shape[:3], call.v.shape[3])
    assert out.dtype == call.q.dtype
    assert lse.shape == call.q.shape[:3]
    assert lse.dtype == torch.float32
    assert out.isfinite().all()
    assert lse[seen].isfinite().all()
    assert (lse[~seen] == -math.inf).all()
    assert (out[~seen] == 0).all()


@ALL
@FEW
@given(
    call=calls(), where=st.sampled_from("qkv"), what=st.sampled_from([math.nan, math.inf, -math.inf]), data=st.data()
)
def test_what_is_not_finite_shows_and_stays(
    recipe: str, call: Call, where: str, what: float, data: st.DataObject
) -> None:
    """Where the definition (float64) gives something that is not finite, ours does; what ours has beyond that is in
    the same row of Q, or the same batch and group of heads. A row whose logits are all −inf has no definition but
    torch's, zero."""
    target = getattr(call, where)
    if not call.q.numel() or not call.k.numel():
        return
    b, h, n, c = (data.draw(st.integers(0, size - 1)) for size in target.shape)
    target[b, h, n, c] = what
    out, lse = call.run(recipe)

    group = call.q.shape[1] // call.k.shape[1]
    logits = call.logits().masked_fill(call.hidden_by_biases(), -math.inf)
    p = torch.softmax(logits, dim=-1).masked_fill(logits.amax(dim=-1, keepdim=True) == -math.inf, 0.0)
    undefined = p.isnan().any(dim=-1)
    bad_values = (~call.v.isfinite()).double().repeat_interleave(group, dim=1)
    # (0 · inf of a key that is hidden, or too far below the maximum for P's format, is no claim)
    bad = undefined[..., None] | ((p > 1e-2).double() @ bad_values > 0)
    assert not out[bad].isfinite().any()
    assert not lse[undefined].isfinite().any()

    outside = torch.ones(call.q.shape[:3], dtype=torch.bool)
    if where == "q":
        outside[b, h, n] = False
    else:
        outside[b, h * group : (h + 1) * group] = False
    assert out[outside].isfinite().all()
    assert (lse[outside].isfinite() | (lse[outside] == -math.inf)).all()


@ALL
@FEW
@given(
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from(MAGNITUDES[6:]),
    seed=st.integers(0, 99),
    kv_len=st.sampled_from([1, 3, 64, 100]),
)
def test_constant_v_is_returned(recipe: str, dtype: torch.dtype, magnitude: float, seed: int, kv_len: int) -> None:
    """A convex combination of equal rows is that row. INT8 and FP8 map a channel's maximum to an exact number, so what
    is left is the row sum: over unrounded P against E4M3 P (each within 2⁻⁴, the worst case) and the accumulator
    (2⁻¹³ or 2⁻¹¹ at each of at most 8 steps)."""
    g = torch.Generator().manual_seed(seed)
    value = min(magnitude, torch.finfo(dtype).max)
    q, k = torch.randn(1, 2, 9, 16, generator=g).to(dtype), torch.randn(1, 2, kv_len, 16, generator=g).to(dtype)
    v = torch.full((1, 2, kv_len, 3), value, dtype=torch.float64).to(dtype)
    out = attention(q, k, v, recipe=recipe)
    want = v[:, :, :1].expand_as(out)
    torch.testing.assert_close(out.double(), want.double(), rtol=2**-4 + 8 * 2**-11 + torch.finfo(dtype).eps, atol=0)


@ALL
@FEW
@given(value=st.sampled_from(MAGNITUDES), dv=st.integers(1, 9), dtype=st.sampled_from(DTYPES))
def test_single_key_is_its_value(recipe: str, value: float, dv: int, dtype: torch.dtype) -> None:
    """P is exactly 1. Each channel's only entry is its own maximum: δ · V_r errs by fl(), 2⁻²², and 16-bit sums and
    outputs by their half ulp. Below 2⁻¹¹² (documented) it counts as zero."""
    v = (torch.ones(1, 1, 1, dv, dtype=torch.float64) * value).clamp(max=torch.finfo(dtype).max).to(dtype)
    q = torch.ones(1, 1, 3, 4, dtype=dtype)
    out, lse = attention(q, q[:, :, :1], v, recipe=recipe, return_lse=True)
    eps = max(2.0**-10, torch.finfo(dtype).eps)
    torch.testing.assert_close(out.double(), v.double().expand_as(out), rtol=eps, atol=2.0**-112)
    torch.testing.assert_close(lse, torch.full((1, 1, 3), 2.0), rtol=0.02, atol=0)  # 4 / √4; the scale's 2 · 2⁻⁷


@pytest.mark.parametrize("recipe", ["exact", "sage2_8b", "sage2_v1_4b", "int8_u8"])
@FEW
@given(lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), max_size=4), is_causal=st.booleans())
def test_varlen_of_any_lengths(recipe: str, lengths: list[tuple[int, int]], is_causal: bool) -> None:
    cu_q, cu_k = (torch.tensor([0, *(n[i] for n in lengths)]).cumsum(0) for i in (0, 1))
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(int(cu_q[-1]), 2, 8, generator=g), torch.randn(int(cu_k[-1]), 1, 8, generator=g)
    out, lse = attention_varlen(q, k, k, cu_q, cu_k, recipe=recipe, is_causal=is_causal, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (2, len(q))
    assert out.isfinite().all()
    for b, (n, m) in enumerate(lengths):
        for i in range(n):  # bottom-right: row i sees the first m − n + i + 1 keys
            seen = m - n + i + 1 > 0 if is_causal else m > 0
            row = int(cu_q[b]) + i
            assert lse[:, row].isfinite().all() == seen
            assert out[row].any() == seen

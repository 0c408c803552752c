"""Exact attention is softmax(scale · Q Kᵀ + mask) V, for every feature of the interface.

Two comparisons, each with an oracle that shares no code with the package: `reference.exact` (float64) against a
naive softmax written here, and ``recipe="exact"`` (float32) against ``F.scaled_dot_product_attention``.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_attention import attention, attention_varlen
from lowbit_attention.backends.base import TorchSDPA
from lowbit_attention.call.masks import Masking
from lowbit_attention.reference.exact import exact

# float64: sums of at most 600 terms of size O(1), each rounded at 2⁻⁵³: 600 · 2⁻⁵³ ≈ 7e-14.
F64 = {"rtol": 1e-12, "atol": 1e-12}
# float32: logits of size ≤ 6 from 64 products lose ≤ 64 · 2⁻²⁴ · Σ|q||k|·scale ≈ 2.5e-5 at the very worst, and the
# output (|V| ≤ 5) that relative amount of Σ p|v|; both sides may err.
F32 = {"rtol": 1e-4, "atol": 1e-4}


def naive(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, all of it in float64 at once."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    logits = scale * (q.double() @ k.transpose(-1, -2))
    if bias is not None:
        logits = logits + bias.double()
    if visible is not None:
        logits = logits.masked_fill(~visible, -math.inf)
    lse = logits.logsumexp(dim=-1)
    p = torch.where(lse[..., None] == -math.inf, 0.0, (logits - lse[..., None]).exp())
    return p @ v, lse


def inputs(
    batch: int = 2, heads: int = 4, kv_heads: int | None = None, q_len: int = 70, kv_len: int = 90, d: int = 24,
    dv: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads, q_len, d),
        (batch, kv_heads or heads, kv_len, d),
        (batch, kv_heads or heads, kv_len, dv or d),
    )
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    return q, k, v


def causal(q_len: int, kv_len: int, alignment: str) -> Tensor:
    """The explicit mask of either causal alignment, built by torch's tril."""
    shift = kv_len - q_len if alignment == "bottom_right" else 0
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril(shift)


def random_mask(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


SHAPES = [
    pytest.param({}, id="plain"),
    pytest.param({"q_len": 1, "kv_len": 600}, id="decode"),
    pytest.param({"q_len": 130, "kv_len": 3}, id="few_keys"),
    pytest.param({"q_len": 515, "kv_len": 515, "batch": 1, "heads": 1}, id="several_tiles"),
    pytest.param({"d": 1, "dv": 1}, id="d1"),
    pytest.param({"d": 256, "dv": 7}, id="d256_dv7"),
    pytest.param({"d": 40, "dv": 80}, id="dv_larger"),
    pytest.param({"heads": 6, "kv_heads": 2}, id="gqa"),
    pytest.param({"heads": 5, "kv_heads": 1}, id="mqa"),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_definition(shape: dict[str, int]) -> None:
    q, k, v = inputs(**shape, dtype=torch.float64)
    out, lse = exact(q, k, v, sm_scale=0.3)
    want, want_lse = naive(q, k, v, 0.3)
    torch.testing.assert_close(out, want, **F64)
    torch.testing.assert_close(lse, want_lse, **F64)


@pytest.mark.parametrize("shape", SHAPES)
def test_recipe_exact_is_sdpa(shape: dict[str, int]) -> None:
    q, k, v = inputs(**shape)
    group = q.shape[1] // k.shape[1]
    want = F.scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    torch.testing.assert_close(attention(q, k, v, recipe="exact"), want, **F32)
    out, lse = attention(q, k, v, recipe="exact", return_lse=True)
    torch.testing.assert_close(out, want, **F32)
    torch.testing.assert_close(lse.double(), naive(q, k, v, q.shape[3] ** -0.5)[1], **F32)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(70, 70), (40, 90), (90, 40), (1, 5), (5, 1), (600, 520), (520, 600)])
def test_causal_is_its_explicit_mask(q_len: int, kv_len: int, alignment: str) -> None:
    """More queries than keys, bottom-right: the first queries see nothing."""
    q, k, v = inputs(1, 2, q_len=q_len, kv_len=kv_len)
    want, want_lse = naive(q, k, v, 0.25, causal(q_len, kv_len, alignment))
    offset = kv_len - q_len if alignment == "bottom_right" else 0
    out, lse = exact(q, k, v, sm_scale=0.25, masking=Masking(offset))
    torch.testing.assert_close(out, want, **F64)
    torch.testing.assert_close(lse, want_lse, **F64)
    for return_lse in (False, True):
        got = attention(
            q, k, v, recipe="exact", sm_scale=0.25, is_causal=True, causal_alignment=alignment, return_lse=return_lse
        )
        torch.testing.assert_close((got[0] if return_lse else got).double(), want, **F32)
    torch.testing.assert_close(got[1].double(), want_lse, **F32)


def test_bottom_right_is_the_default() -> None:
    q, k, v = inputs(q_len=3, kv_len=8)
    got = attention(q, k, v, recipe="exact", is_causal=True)
    torch.testing.assert_close(got.double(), naive(q, k, v, 24**-0.5, causal(3, 8, "bottom_right"))[0], **F32)


MASK_SHAPES = [(70, 90), (1, 90), (70, 1), (90,), (1,), (), (4, 70, 90), (4, 1, 90), (2, 1, 1, 90), (2, 4, 70, 90)]


@pytest.mark.parametrize("shape", [*MASK_SHAPES, (1, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_broadcast(shape: tuple[int, ...], kind: str, is_causal: bool) -> None:
    q, k, v = inputs()
    mask = random_mask(*shape) if kind == "bool" else torch.randn(shape, generator=torch.Generator().manual_seed(2))
    visible = causal(70, 90, "top_left") if is_causal else torch.ones(70, 90, dtype=torch.bool)
    expanded = mask.broadcast_to(2, 4, 70, 90)
    if kind == "bool":
        want, want_lse = naive(q, k, v, 24**-0.5, visible & expanded)
    else:
        want, want_lse = naive(q, k, v, 24**-0.5, visible, expanded)
    alignment = "top_left" if is_causal else None
    options = {"recipe": "exact", "attn_mask": mask, "is_causal": is_causal, "causal_alignment": alignment}
    torch.testing.assert_close(attention(q, k, v, **options).double(), want, **F32)
    out, lse = attention(q, k, v, return_lse=True, **options)
    torch.testing.assert_close(out.double(), want, **F32)
    torch.testing.assert_close(lse.double(), want_lse, **F32)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_rows_that_see_nothing_are_zero(kind: str, return_lse: bool) -> None:
    q, k, v = inputs()
    mask = random_mask(70, 90)
    mask[3], mask[69] = False, False
    given = mask if kind == "bool" else torch.where(mask, 0.0, -math.inf)
    got = attention(q, k, v, recipe="exact", attn_mask=given, return_lse=return_lse)
    out = got[0] if return_lse else got
    assert (out[:, :, [3, 69]] == 0).all()
    torch.testing.assert_close(out.double(), naive(q, k, v, 24**-0.5, mask)[0], **F32)
    if return_lse:
        assert (got[1][:, :, [3, 69]] == -math.inf).all()
        assert got[1][:, :, :3].isfinite().all()


def test_mask_heads_are_query_heads_with_gqa() -> None:
    q, k, v = inputs(heads=6, kv_heads=2)
    mask = random_mask(1, 6, 70, 90)
    out, lse = attention(q, k, v, recipe="exact", attn_mask=mask, return_lse=True)
    want, want_lse = naive(q, k, v, 24**-0.5, mask)
    torch.testing.assert_close(out.double(), want, **F32)
    torch.testing.assert_close(lse.double(), want_lse, **F32)


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_masks_of_any_dtype(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    """A mask of multiples of ⅛ is exact in every dtype; the tolerance is that of test_dtypes."""
    q, k, v = inputs(dtype=dtype)
    bias = (8 * torch.randn(70, 90, generator=torch.Generator().manual_seed(3))).round().div(8).to(mask_dtype)
    out = attention(q, k, v, recipe="exact", attn_mask=bias)
    want, _ = naive(q, k, v, 24**-0.5, bias=bias.broadcast_to(2, 4, 70, 90))
    torch.testing.assert_close(out.double(), want, **_dtype_tolerance(dtype))


def _dtype_tolerance(dtype: torch.dtype) -> dict[str, float]:
    """The output is rounded to ``dtype`` (half an ulp: eps / 2) and torch's CPU kernel may round P to it, too
    (eps / 2 of Σ p|v| ≤ max|v| < 5), in float32 on top of F32's own. Errors of P are independent: far below 5 · eps."""
    if dtype == torch.float64:
        return F64
    eps = torch.finfo(dtype).eps
    return {"rtol": max(1e-4, eps), "atol": max(1e-4, eps)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("return_lse", [False, True])
def test_dtypes(dtype: torch.dtype, return_lse: bool) -> None:
    q, k, v = inputs(dtype=dtype)
    want, want_lse = naive(q, k, v, 24**-0.5)
    got = attention(q, k, v, recipe="exact", return_lse=return_lse)
    out = got[0] if return_lse else got
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, **_dtype_tolerance(dtype))
    if return_lse:
        assert got[1].dtype == torch.float32
        torch.testing.assert_close(got[1].double(), want_lse, **F32)


@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"is_causal": True}], ids=["out", "lse", "causal"])
def test_layouts(options: dict[str, bool]) -> None:
    """The lse is [B, Hq, Nq] in both layouts; the mask too."""
    q, k, v = inputs(heads=6, kv_heads=3, dv=5)
    mask = random_mask(6, 70, 90)
    hnd = attention(q, k, v, recipe="exact", attn_mask=mask, **options)
    nhd = attention(*(t.transpose(1, 2) for t in (q, k, v)), recipe="exact", attn_mask=mask, layout="NHD", **options)
    if "return_lse" in options:
        assert torch.equal(hnd[1], nhd[1])
        hnd, nhd = hnd[0], nhd[0]
    assert nhd.shape == (2, 70, 6, 5)
    assert nhd.is_contiguous()
    torch.testing.assert_close(nhd.transpose(1, 2), hnd, **F32)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1, 2.5])
def test_scale(scale: float) -> None:
    """2.5 makes logits of size 60 here: ten times those of F32's derivation."""
    q, k, v = inputs()
    out, lse = attention(q, k, v, recipe="exact", sm_scale=scale, return_lse=True)
    want, want_lse = naive(q, k, v, scale)
    torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), want_lse, **F32)


def _second_best(q: Tensor, k: Tensor, v: Tensor, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best key's sum leaves float32 on its way up, to −∞ if from the left; the others' are far smaller."""
    k = torch.full_like(k, 1 / size)
    k[:, :, 0, :32], k[:, :, 0, 32:] = -size / 4, size / 2
    return torch.full_like(q, size), k, v


def _at(t: Tensor, token: int, size: float) -> Tensor:
    return torch.where(torch.arange(t.shape[2])[:, None] == token, t * size, t)


LARGE = {
    "all of q and k": lambda q, k, v, size: (q * size, k * size, v),
    "all logits far below zero": lambda q, k, v, size: (q.abs() * size, k.abs() * -size, v),
    "sums that leave float32 on their way": _second_best,
    "one query": lambda q, k, v, size: (_at(q, 2, size), k, v),
    "one key": lambda q, k, v, size: (q, _at(k, 2, size), v),
    "k, beside a q that is all the smaller": lambda q, k, v, size: (q / size / 8, k * size, v),
    "v": lambda q, k, v, size: (q, k, v.sign() * size),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_len", [3, 64, 600])  # (torch's CPU kernels differ with it, and by CPU)
@pytest.mark.parametrize("case", LARGE)
def test_finite_inputs_of_any_magnitude(case: str, kv_len: int, dtype: torch.dtype) -> None:
    """Powers of two, so that float64 has each product and sum without rounding, and ties are ties.

    What float32 makes of them depends on the CPU: ±∞, NaN, zeros for the row, or the second best key.
    """
    d, scale = 64, 0.25
    size = 2.0 ** math.floor(math.log2(torch.finfo(dtype).max))
    g = torch.Generator().manual_seed(0)
    signs_q, signs_k = ((torch.rand(1, 2, n, d, generator=g) < 0.5) * 2.0 - 1 for n in (8, kv_len))
    v = torch.randn(1, 2, kv_len, 16, generator=g)
    q, k, v = (t.to(dtype) for t in LARGE[case](signs_q, signs_k, v, size))
    want = torch.softmax(scale * (q.double() @ k.double().mT), dim=-1) @ v.double()
    atol = 2 * torch.finfo(dtype).eps * float(want.abs().max())
    for mask in (None, torch.ones(8, kv_len, dtype=torch.bool)):
        got = attention(q, k, v, recipe="exact", attn_mask=mask, sm_scale=scale)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_ordinary_inputs_are_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a channel of outliers as trained models have: float64 is far slower."""
    monkeypatch.setattr(TorchSDPA, "_in_float64", lambda *_: pytest.fail("computed in float64"))
    q, k, v = inputs(dtype=dtype, d=128)
    q[..., 3] *= 20
    k[..., 3] = k[..., 3] * 20 + 400
    attention(q, k, v, recipe="exact")
    attention(q[:, :, :0], k, v, recipe="exact")
    attention(q, k[:, :, :0], v[:, :, :0], recipe="exact")


@pytest.mark.parametrize("recipe", ["exact", "auto"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_varlen_is_each_sequence_on_its_own(recipe: str, is_causal: bool) -> None:
    """Also an empty sequence, one without keys (zeros, −inf) and one without queries."""
    q_lens, k_lens = [5, 0, 3, 0, 33], [7, 0, 0, 4, 20]
    g = torch.Generator().manual_seed(0)
    q = torch.randn(sum(q_lens), 4, 16, generator=g)
    k, v = (torch.randn(sum(k_lens), 2, d, generator=g) for d in (16, 9))
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (q_lens, k_lens))
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, 33, 20, recipe=recipe, is_causal=is_causal, return_lse=True)
    assert out.shape == (41, 4, 9)
    assert lse.shape == (4, 41)
    assert lse.dtype == torch.float32
    for i, (n, m) in enumerate(zip(q_lens, k_lens, strict=True)):
        rows, keys = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        one = [t[None].transpose(1, 2) for t in (q[rows], k[keys], v[keys])]
        want, want_lse = naive(*one, 0.25, causal(n, m, "bottom_right") if is_causal else None)
        torch.testing.assert_close(out[rows].double(), want[0].transpose(0, 1), **F32)
        torch.testing.assert_close(lse[:, rows].double(), want_lse[0], **F32)


@pytest.mark.parametrize(
    "case", ["expanded_batch", "expanded_heads", "offset", "last_dim_strided", "permuted", "expanded_tokens"]
)
def test_strides(case: str) -> None:
    g = torch.Generator().manual_seed(0)

    def strided() -> Tensor:
        if case == "expanded_batch":
            return torch.randn(1, 4, 33, 16, generator=g).expand(2, 4, 33, 16)
        if case == "expanded_heads":
            return torch.randn(2, 1, 33, 16, generator=g).expand(2, 4, 33, 16)
        if case == "expanded_tokens":
            return torch.randn(2, 4, 1, 16, generator=g).expand(2, 4, 33, 16)
        if case == "offset":
            return torch.randn(2, 4, 3 * 33, 16, generator=g)[:, :, 5:38]
        if case == "last_dim_strided":
            return torch.randn(2, 4, 33, 48, generator=g)[..., 1::3]
        return torch.randn(16, 33, 2, 4, generator=g).permute(2, 3, 1, 0)

    q, k, v = strided(), strided(), strided()
    want, want_lse = naive(q, k, v, 0.25)
    torch.testing.assert_close(attention(q, k, v, recipe="exact").double(), want, **F32)
    out, lse = attention(q, k, v, recipe="exact", return_lse=True)
    torch.testing.assert_close(out.double(), want, **F32)
    torch.testing.assert_close(lse.double(), want_lse, **F32)


@pytest.mark.parametrize("varlen", [False, True])
def test_gradients_are_those_of_sdpa(varlen: bool) -> None:
    q, k, v = (t.requires_grad_() for t in inputs(batch=1))
    if varlen:
        cu_q, cu_k = torch.tensor([0, 70]), torch.tensor([0, 90])
        out = attention_varlen(*(t[0].transpose(0, 1) for t in (q, k, v)), cu_q, cu_k)
    else:
        out = attention(q, k, v, recipe="exact")
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    want = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **F32)


def test_inputs_are_left_alone() -> None:
    q, k, v = inputs()
    copies = [t.clone() for t in (q, k, v)]
    attention(q, k, v, recipe="exact", is_causal=True, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))

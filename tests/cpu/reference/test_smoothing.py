"""What is taken out before rounding comes back after it: smooth Q, K and V, SmoothQuant and the Hadamard rotation.

The identities are checked in float64 on the unquantised tensors; through the quantised path they must hold within
what the scales allow. Every bound is derived where it is used; u = 2⁻²⁴ is float32's rounding.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit_attention.call.masks import Masking
from lowbit_attention.recipes.definition import Recipe
from lowbit_attention.recipes.machine import EXACT_SUMS, Geometry, Machine
from lowbit_attention.recipes.options import AllTokens, SampledTokens
from lowbit_attention.reference.attention import Result, emulate
from lowbit_attention.reference.quantize import Packed, pack
from lowbit_attention.reference.rotation import hadamard_size, rotate
from lowbit_attention.reference.smoothing import sampled, smoothquant_factor, tile_mean, token_mean

U = 2.0**-24
FP32_MAX = float(np.finfo(np.float32).max)
TILES = Geometry(b_q=32, b_k=32, warp_rows=16)
MACHINE = Machine("test", TILES, EXACT_SUMS)
SCALE = 0.25  # sm_scale


def biased(heads: int, tokens: int, dim: int, seed: int, bias: float = 6.0) -> Tensor:
    """Normal numbers with a large mean in a third of the channels, as real K has."""
    generator = np.random.default_rng(seed)
    mean = bias * generator.standard_normal((1, heads, 1, dim)) * (np.arange(dim) % 3 == 0)
    return torch.from_numpy((mean + generator.standard_normal((1, heads, tokens, dim))).astype(np.float32))


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Exact output and log-sum-exp, float64, by the textbook."""
    s = SCALE * q.double() @ k.double().transpose(-1, -2)
    return s.softmax(-1) @ v.double(), s.logsumexp(-1)


def qkv(tokens: int = 75, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    return biased(2, 70, dim, 0, 1.0), biased(2, tokens, dim, 1), biased(2, tokens, 8, 2)


def fsum_mean(x: Tensor) -> np.ndarray:
    """Correctly rounded mean over the tokens of ``[N, D]``, float32."""
    return np.array([math.fsum(c) / len(c) for c in x.T.tolist()]).astype(np.float32)


@pytest.mark.parametrize("length", [64, 70, 3])
def test_tile_means_are_those_of_the_tiles_and_the_last_may_be_short(length: int) -> None:
    x = biased(2, length, 5, 0)
    means = tile_mean(x, 32)
    assert means.shape == (1, 2, math.ceil(length / 32), 5)
    for h, tile in np.ndindex(2, means.shape[2]):
        expected = fsum_mean(x[0, h, 32 * tile : 32 * tile + 32])
        np.testing.assert_array_equal(means[0, h, tile].numpy(), expected)


def test_token_means_are_those_of_the_chosen_tokens() -> None:
    x = biased(2, 50, 5, 0)
    chosen = torch.zeros(1, 2, 50, dtype=torch.bool)
    chosen[0, 0, [3, 7, 49]] = True  # head 1 chooses none
    for h in range(2):
        np.testing.assert_array_equal(token_mean(x, None)[0, h].numpy(), fsum_mean(x[0, h]))
    np.testing.assert_array_equal(token_mean(x, chosen)[0, 0].numpy(), fsum_mean(x[0, 0, [3, 7, 49]]))
    assert (token_mean(x, chosen)[0, 1] == 0).all()


def spread(n: int, count: int) -> set[int]:
    return {math.floor((i + Fraction(1, 2)) * n / count) for i in range(count)}


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 64, 100, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 32])
def test_a_sample_is_evenly_spread(n: int, count: int) -> None:
    chosen = sampled(None, SampledTokens(count), torch.zeros(2, 3, n, 4))
    assert chosen.shape == (2, 3, n)
    for b, h in np.ndindex(2, 3):
        assert set(chosen[b, h].nonzero().flatten().tolist()) == spread(n, count)


@pytest.mark.parametrize("count", [1, 3, 32])
def test_a_sample_is_spread_over_the_valid_tokens_of_each_head(count: int) -> None:
    usable = {0: list(range(100)), 1: list(range(50, 70)), 2: list(range(1, 100, 3)), 3: [99], 4: []}
    valid = torch.zeros(1, 5, 100, dtype=torch.bool)
    for h, tokens in usable.items():
        valid[0, h, tokens] = True
    chosen = sampled(valid, SampledTokens(count), torch.zeros(1, 5, 100, 4))
    for h, tokens in usable.items():
        expected = {tokens[rank] for rank in spread(len(tokens), count)} if tokens else set()
        assert set(chosen[0, h].nonzero().flatten().tolist()) == expected
    assert sampled(valid, AllTokens(), torch.zeros(1, 5, 100, 4)) is valid


@pytest.mark.parametrize("sample", [AllTokens(), SampledTokens(4)], ids=str)
def test_smooth_k_leaves_the_exact_output_unchanged(sample: AllTokens | SampledTokens) -> None:
    q, k, v = qkv()
    packed = pack(q, k, v, Recipe(smooth_q=True, k_sample=sample), TILES, None)
    out, _ = attend(q, k, v)
    smooth_out, _ = attend(q, packed.k_smooth, v)
    # K − k̄ is rounded once, so a logit moves by at most ε = sm_scale · u · Σ|q||K − k̄|; P changes by a factor in
    # e^±2ε, and the output by (e^2ε − 1) · max|v|; 1e-12 covers float64.
    epsilon = (SCALE * U * q.double().abs() @ packed.k_smooth.double().abs().transpose(-1, -2)).max()
    assert (out - smooth_out).abs().max() <= torch.expm1(2 * epsilon) * v.abs().max() + 1e-12
    assert packed.k_mean.abs().max() > 3, "there was a mean to remove"
    largest_channel = packed.k_mean.abs().amax(dim=(0, 1)).argmax()
    assert packed.k_smooth.mean(2).abs()[..., largest_channel].max() < 2  # and it was removed


def logit_bound(packed: Packed, q: Tensor, k: Tensor) -> Tensor:
    """By how much quantising may move each logit, ``[B, H, Nq, Nk]``.

    |q·k − q̂·k̂| ≤ Σ|q||k − k̂| + |k̂||q − q̂| with |q − q̂| ≤ δ_q/2 and |q| ≤ |q̂| + δ_q/2, k alike. The float32 arithmetic
    around it (means, factors, log2 D butterflies, products, sums of D, ΔS) makes fewer than 2 · D + 32 roundings in the
    computation of a logit. What is rounded is no larger than the 1-norm of products, ≤ √D |a||b|, where a vector is
    at most twice (a mean was taken off) the longest before or after the transform.
    """
    q_scale, k_scale = packed.q_scale[..., packed.q_group].double(), packed.k_scale[..., packed.k_group].double()
    q_hat, k_hat = packed.q.double().abs(), packed.k.double().abs()
    dim = q_hat.shape[-1]
    halves = (q_hat + 0.5).sum(-1)[..., None] + k_hat.sum(-1)[..., None, :]
    quantized = q_scale[..., None] * k_scale[..., None, :] / 2 * halves
    longest_q = max(2 * q.norm(dim=-1).max(), ((q_hat + 0.5).norm(dim=-1) * q_scale).max())
    longest_k = max(2 * k.norm(dim=-1).max(), ((k_hat + 0.5).norm(dim=-1) * k_scale).max())
    return SCALE * (quantized + U * (2 * dim + 32) * math.sqrt(dim) * longest_q * longest_k)


SMOOTH = {
    "nothing": {"smooth_k": False},
    "K": {},
    "sampled K": {"k_sample": SampledTokens(3)},
    "Q only": {"smooth_k": False, "smooth_q": True},
    "Q and K": {"smooth_q": True},
    "Q and K, rotated": {"smooth_q": True, "rotation": "hadamard"},
    "rotated": {"smooth_k": False, "rotation": "hadamard"},
    "SmoothQuant": {"smooth_k": False, "smoothquant_alpha": 0.5},
    "SmoothQuant and all": {"smooth_q": True, "rotation": "hadamard", "smoothquant_alpha": 0.25},
}


@pytest.mark.parametrize("name", SMOOTH)
def test_the_log_sum_exp_is_that_of_the_original_logits(name: str) -> None:
    """It includes the k̄ term and ΔS: no logit may move by more than its rounding, so neither may the log-sum-exp."""
    q, k, v = qkv()
    result = emulate(q, k, v, Recipe(**SMOOTH[name]), sm_scale=SCALE, machine=MACHINE)
    bound = logit_bound(result.packed, q, k).amax(-1)
    error = (result.lse.double() - attend(q, k, v)[1]).abs()
    # exp2, log and the sum of 75 terms in float32: below 128 u, relative to the sum; the stored lse: u · |lse|
    assert (error <= bound + 128 * U + U * result.lse.abs()).all()
    if result.packed.k_mean is not None:
        term = SCALE * (q.double() @ result.packed.k_mean.double()[..., None])[..., 0]
        assert (term.abs() > 2 * bound).float().mean() > 0.5, "leaving the term out would be noticed"


def test_delta_s_is_its_own_query_tiles_where_causality_skips_the_first() -> None:
    q, k, v = qkv()
    masking = Masking(causal_offset=0)
    result = emulate(q, k, v, Recipe(smooth_q=True), sm_scale=SCALE, masking=masking, machine=MACHINE)
    hidden = torch.arange(75) > torch.arange(70)[:, None]
    logits = (SCALE * q.double() @ k.double().transpose(-1, -2)).masked_fill(hidden, -math.inf)
    bound = logit_bound(result.packed, q, k).masked_fill(hidden, 0).amax(-1) + 128 * U + U * result.lse.abs()
    assert ((result.lse.double() - logits.logsumexp(-1)).abs() <= bound).all()


def test_delta_s_restores_the_logits() -> None:
    q, k, v = qkv()
    packed = pack(q, k, v, Recipe(smooth_q=True), TILES, None)
    q_mean = packed.q_mean.double().repeat_interleave(32, dim=2)[:, :, :70]
    k_smooth, k_mean = packed.k_smooth.double(), packed.k_mean.double()
    logits = q.double() @ k.double().transpose(-1, -2)
    constant = q.double() @ k_mean[..., None]  # of each row

    exact = q_mean @ k_smooth.transpose(-1, -2) + (q.double() - q_mean) @ k_smooth.transpose(-1, -2)
    # only K − k̄ was rounded to float32
    bound = U * q.double().abs() @ k_smooth.abs().transpose(-1, -2) + 1e-12
    assert ((exact - (logits - constant)).abs() <= bound).all()

    q_hat = packed.q.double() * packed.q_scale[..., packed.q_group, None]
    k_hat = packed.k.double() * packed.k_scale[..., packed.k_group, None]
    restored = q_mean @ k_smooth.transpose(-1, -2) + q_hat @ k_hat.transpose(-1, -2)
    assert ((restored - (logits - constant)).abs() <= logit_bound(packed, q, k) / SCALE).all()
    without = (q_hat @ k_hat.transpose(-1, -2) - (logits - constant)).abs()
    assert (without > logit_bound(packed, q, k) / SCALE).any(), "leaving ΔS out would be noticed"


def smooth_v(v: Tensor, masking: Masking = Masking()) -> Result:
    recipe = Recipe(qk_bits=None, smooth_k=False, smooth_v=True)
    return emulate(
        *qkv()[:1], biased(2, v.shape[2], 16, 1), v, recipe, sm_scale=SCALE, masking=masking, machine=MACHINE
    )


def test_a_constant_v_comes_back_exactly_and_fully_masked_rows_get_no_mean() -> None:
    v = torch.tensor([3.5, -100.0, 0.0, 1e-3]).expand(1, 2, 64, 4)
    mask = torch.ones(1, 2, 70, 64, dtype=torch.bool)
    mask[0, 1, 5] = False
    result = smooth_v(v, Masking(mask=mask))
    expected = v[:, :, :1].expand(1, 2, 70, 4).clone()
    expected[0, 1, 5] = 0
    assert torch.equal(result.out, expected)
    assert result.lse[0, 1, 5] == -math.inf


def test_smooth_v_shifts_the_output_with_v() -> None:
    generator = np.random.default_rng(0)
    v = torch.from_numpy(generator.integers(-9, 10, (1, 2, 64, 8))).float()  # means are multiples of 1/64: exact
    shift = torch.tensor([100.0, -64.0, 8.0, 0, 1, 2, 3, 1000])
    plain, moved = smooth_v(v).out.double(), smooth_v(v + shift).out.double()
    # the same V − v̄ is summed; adding the mean rounds each output once
    assert ((moved - plain - shift).abs() <= U * (moved.abs() + plain.abs())).all()


@pytest.mark.parametrize("sample", [AllTokens(), SampledTokens(5)], ids=str)
def test_huge_values_do_not_overflow(sample: AllTokens | SampledTokens) -> None:
    generator = np.random.default_rng(0)
    x = biased(2, 75, 16, 0)
    x[..., 0] = torch.from_numpy(generator.choice([-FP32_MAX, FP32_MAX], (1, 2, 75))).float()
    x[..., 1] = FP32_MAX
    x[..., 2] = 2.0**126 * (1 - 2**-24)  # the largest mean of a tile
    x[..., 3] = 2.0**103
    largest = x[..., 4] = 2.0**103 * (1 - 2**-24)  # the largest mean of a sequence
    x[0, 0, 0, 5] = -FP32_MAX  # outside the sample
    if isinstance(sample, SampledTokens):
        x[0, 1, 0, 4] = -FP32_MAX
    mean, tiles = token_mean(x, sampled(None, sample, x)), tile_mean(x, 32)
    assert (mean[..., :4] == 0).all()
    assert (mean[..., 4] == largest).all()
    assert (mean[0, 0, 5] == 0) == (sample == AllTokens())
    assert (x - mean[:, :, None]).isfinite().all()
    assert (tiles[..., :2] == 0).all()
    assert (tiles[..., 2] == x[0, 0, 0, 2]).all()
    recipe = Recipe(smooth_q=True, smooth_v=True, k_sample=sample, v_sample=sample)
    packed = pack(x, x, x, recipe, TILES, None)
    for tensor in (packed.q, packed.k, packed.v, packed.q_scale, packed.k_scale, packed.v_scale, packed.k_smooth):
        assert tensor.isfinite().all()
    assert packed.q.abs().max() == packed.k.abs().max() == 127


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_takes_its_channels_mean_away_and_no_more(bad: float) -> None:
    """The other tokens stay numbers, and the bad one stays what it is."""
    x = biased(2, 75, 16, 0)
    clean = token_mean(x, None)
    x[0, 1, 7, 3] = bad
    mean = token_mean(x, None)
    clean[0, 1, 3] = 0
    assert torch.equal(mean, clean)
    for sample in (SampledTokens(5), SampledTokens(4)):  # token 7 is one of the five, and none of the four
        chosen = sampled(None, sample, x)
        assert chosen[0, 1, 7] == (sample.count == 5)
        assert (token_mean(x, chosen)[0, 1, 3] == 0) == (sample.count == 5)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_smoothquant_divides_q_and_multiplies_k_by_the_same_factor(alpha: float) -> None:
    q, k = biased(4, 70, 16, 0), biased(2, 75, 16, 1)
    k[0, 1, :, 5] = 0
    valid = torch.arange(75).expand(1, 2, 75) < 60
    k[:, :, 60:] *= 50
    factor = smoothquant_factor(q, k, valid, alpha)
    for h, c in np.ndindex(2, 16):
        q_max, k_max = float(q[0, 2 * h : 2 * h + 2, :, c].abs().max()), float(k[0, h, :60, c].abs().max())
        expected = q_max**alpha / k_max ** (1 - alpha) if k_max else 1.0
        assert factor[0, h, c].item() == pytest.approx(expected, rel=2 * U)  # one rounding to float32, and float64's

    f = factor.repeat_interleave(2, dim=1)[:, :, None]
    product = (q / f).double() @ (k.repeat_interleave(2, dim=1) * f).double().transpose(-1, -2)
    exact = q.double() @ k.double().repeat_interleave(2, dim=1).transpose(-1, -2)
    size = q.double().abs() @ k.double().abs().repeat_interleave(2, dim=1).transpose(-1, -2)
    assert ((product - exact).abs() <= 2.001 * U * size).all()  # two roundings a product


def hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix by its definition: the sign is the parity of the indices' common bits."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)], dtype=np.float64)


@pytest.mark.parametrize(("dim", "size"), [(1, 1), (2, 2), (3, 4), (64, 64), (72, 128), (80, 128), (128, 128)])
def test_the_rotation_is_the_hadamard_matrix(dim: int, size: int) -> None:
    assert hadamard_size(dim) == size
    matrix = rotate(torch.eye(dim)).double().numpy()
    # the butterflies of one 1 are exact; √size and the product are rounded
    np.testing.assert_allclose(matrix, hadamard(size)[:dim] / math.sqrt(size), rtol=2.001 * U, atol=0)


def test_the_matrix_is_scipys() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    np.testing.assert_allclose(rotate(torch.eye(64)).numpy(), linalg.hadamard(64) / 8, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [1, 16, 80, 128])
def test_rotating_both_keeps_every_product_and_every_length(dim: int) -> None:
    q, k = biased(2, 20, dim, 0), biased(2, 30, dim, 1)
    turned_q, turned_k = rotate(q).double(), rotate(k).double()
    size = hadamard_size(dim)
    assert turned_q.shape == (1, 2, 20, size)
    # Each output entry is a sum of `size` terms through log2(size) rounded levels and two more roundings: its error is
    # at most e · |x|₁ / √size with e = (log2(size) + 2.01) u, so the error vector's length is at most e · |x|₁ ≤
    # e · √D · |x|₂, and a product's error at most (2 + e') times that times |k|₂.
    e = (math.log2(size) + 2.01) * U * math.sqrt(dim)
    lengths = q.double().norm(dim=-1)[..., None] * k.double().norm(dim=-1)[..., None, :]
    difference = turned_q @ turned_k.transpose(-1, -2) - q.double() @ k.double().transpose(-1, -2)
    assert (difference.abs() <= 2.01 * e * lengths).all()
    assert ((turned_q.norm(dim=-1) / q.double().norm(dim=-1) - 1).abs() <= e).all()


def test_the_rotation_of_huge_values_saturates() -> None:
    turned = rotate(torch.full((1, 64), FP32_MAX))
    assert turned[0, 0] == FP32_MAX
    assert (turned[0, 1:] == 0).all()

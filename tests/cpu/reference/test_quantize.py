"""Quantised Q, K and V against plain loops in numpy float32.

δ = fl(max / qmax), r = fl(qmax / max), rint(x · r) half to even, clamped (algorithm notes, section 3): every product
and quotient below is one numpy float32 operation, so integers and scales must agree bit for bit.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from lowbit_attention.recipes.definition import Recipe
from lowbit_attention.recipes.granularity import TOKEN_GRANULARITIES, PerBlock, PerChannelAndKeyTile
from lowbit_attention.recipes.machine import Geometry
from lowbit_attention.recipes.options import SampledTokens
from lowbit_attention.reference.quantize import Means, Packed, pack, quantize_tokens

TILES = Geometry(b_q=64, b_k=32, warp_rows=32)
GROUPS = {  # name: token → what it must share with its group, for queries and for keys of TILES
    "per_tensor": (lambda t: 0, lambda t: 0),
    "per_block": (lambda t: t // 64, lambda t: t // 32),
    "per_warp": (lambda t: t // 32, lambda t: t // 32),
    "per_thread": (lambda t: (t // 32, t % 8), lambda t: (t // 32, t % 8 // 2)),
    "per_token": (lambda t: t, lambda t: t),
}
f32 = np.float32


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers whose rows have very different sizes."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(shape) * np.exp(generator.standard_normal((*shape[:-1], 1)))
    return torch.from_numpy(x.astype(f32))


def quantize_loop(x: np.ndarray, key, qmax: int, counts=None) -> tuple[np.ndarray, np.ndarray]:
    """Integers of ``x`` ``[N, D]`` and each token's scale ``[N]``; ``counts``: which tokens make the maximum."""
    integers, scales = np.zeros_like(x), np.zeros(len(x), f32)
    for name in {key(t) for t in range(len(x))}:
        tokens = [t for t in range(len(x)) if key(t) == name]
        largest = max((np.abs(x[t]).max() for t in tokens if counts is None or counts[t]), default=f32(0))
        for t in tokens:
            if largest == 0:
                scales[t] = 1
            else:
                scales[t] = f32(largest) / f32(qmax)
                integers[t] = np.clip(np.rint(x[t] * (f32(qmax) / f32(largest))), -qmax, qmax)
    return integers, scales


def check(hat: torch.Tensor, scale: torch.Tensor, group: torch.Tensor, x: torch.Tensor, key, qmax, valid=None) -> None:
    for b, h in np.ndindex(*x.shape[:2]):
        counts = None if valid is None else valid[b, h].numpy()
        integers, scales = quantize_loop(x[b, h].numpy(), key, qmax, counts)
        np.testing.assert_array_equal(hat[b, h].numpy(), integers)
        np.testing.assert_array_equal(scale[b, h][group].numpy(), scales)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", TOKEN_GRANULARITIES)
def test_q_and_k_follow_the_formula(name: str, bits: int) -> None:
    granularity = TOKEN_GRANULARITIES[name]
    recipe = Recipe(qk_bits=bits, smooth_k=False, q_granularity=granularity, k_granularity=granularity)
    q, k = normal(2, 4, 150, 16), normal(2, 2, 75, 16, seed=1)
    packed = pack(q, k, normal(2, 2, 75, 8), recipe, TILES, None)
    qmax = {8: 127, 4: 7}[bits]
    check(packed.q, packed.q_scale, packed.q_group, q, GROUPS[name][0], qmax)
    check(packed.k, packed.k_scale, packed.k_group, k, GROUPS[name][1], qmax)
    assert packed.k_mean is packed.q_mean is packed.k_smooth is packed.v_mean is None


@pytest.mark.parametrize("qmax", [127, 7])
def test_scale_and_factor_are_one_division_each(qmax: int) -> None:
    """Entries half-way between two integers show the factor's last bit: r = fl(qmax / max), not qmax · fl(1 / max)."""
    generator = np.random.default_rng(0)
    largest = generator.uniform(1, 2, (4000, 1)).astype(f32)
    halves = (generator.integers(0, qmax, (4000, 63)) + f32(0.5)) / (f32(qmax) / largest)
    x = np.concatenate([largest, halves.astype(f32)], axis=1)
    hat, scale = quantize_tokens(torch.from_numpy(x)[None, None], torch.arange(4000), 4000, qmax)
    np.testing.assert_array_equal(scale[0, 0].numpy(), largest[:, 0] / f32(qmax))
    np.testing.assert_array_equal(hat[0, 0].numpy(), np.rint(x * (f32(qmax) / largest)))


def test_halves_go_to_even() -> None:
    x = torch.tensor([[[[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]]]])  # r = 1
    hat, scale = quantize_tokens(x, torch.zeros(1, dtype=torch.int64), 1, 127)
    assert hat.flatten().tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    assert scale.item() == 1


@pytest.mark.parametrize("largest", [0.0, 1e-45, 2.0**-113])
def test_empty_and_tiny_groups_get_scale_one_and_zeros(largest: float) -> None:
    x = torch.tensor([[[[largest, -largest], [3.0, 7.0]]]])
    hat, scale = quantize_tokens(x, torch.tensor([0, 1]), 3, 7)
    assert hat.flatten().tolist() == [0, 0, 3, 7]
    assert scale.flatten().tolist() == [1, 1, 1]  # group 2 has no token


@pytest.mark.parametrize("largest", [2.0**-112, 1e-30, 1e38, 3.4e38])
@pytest.mark.parametrize("qmax", [127, 7])
def test_small_and_huge_groups_are_scaled(largest: float, qmax: int) -> None:
    x = np.array([[largest, -largest / 3]], f32)
    hat, scale = quantize_tokens(torch.from_numpy(x)[None, None], torch.zeros(1, dtype=torch.int64), 1, qmax)
    integers, scales = quantize_loop(x, lambda t: 0, qmax)
    np.testing.assert_array_equal(hat[0, 0].numpy(), integers)
    np.testing.assert_array_equal(scale[0, 0].numpy(), scales)
    assert hat[0, 0, 0, 0] == qmax


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_stay_visible_and_spoil_their_own_group_only(bad: float) -> None:
    x = normal(1, 1, 4, 8)
    x[0, 0, 1, 3] = bad
    hat, scale = quantize_tokens(x, torch.tensor([0, 0, 1, 1]), 2, 127)
    product = hat * scale[:, :, torch.tensor([0, 0, 1, 1]), None]
    assert not product[0, 0, 1, 3].isfinite()
    assert product[0, 0, 2:].isfinite().all()
    v_hat = pack(x, x, x, Recipe(smooth_k=False), TILES, None)
    assert not (v_hat.v * v_hat.v_scale)[0, 0, 1, 3].isfinite()
    others = [c for c in range(8) if c != 3]
    assert (v_hat.v * v_hat.v_scale)[..., others].isfinite().all()


def test_a_non_finite_value_outside_the_sample_stays_visible() -> None:
    v = normal(1, 1, 8, 4)
    v[0, 0, 0, 0] = math.inf  # one sampled token of 8 is token 4
    packed = pack(v, v, v, Recipe(smooth_k=False, v_sample=SampledTokens(1)), TILES, None)
    assert packed.v[0, 0, 0, 0].isnan()
    assert packed.v_scale.isfinite().all()


def test_padding_is_left_out_of_scales_and_means() -> None:
    k, v = normal(2, 2, 75, 16), normal(2, 2, 75, 8, seed=1)
    valid = torch.ones(2, 2, 75, dtype=torch.bool)
    valid[0, :, 50:] = valid[1, 1, 3] = valid[1, 0, 32:64] = False
    junk_k, junk_v = (torch.where(valid[..., None], x, 1e6) for x in (k, v))
    recipe = Recipe(smooth_k=False, k_granularity=PerBlock())
    packed = pack(k, junk_k, junk_v, recipe, TILES, valid)
    check(packed.k, packed.k_scale, packed.k_group, junk_k, GROUPS["per_block"][1], 127, valid)
    assert (packed.k[0, :, 50:64] == 127).all()  # the junk saturates where its group has valid tokens
    assert (packed.k[1, 0, 32:64] == 0).all()  # and is dropped where it has none
    for b, h, c in np.ndindex(2, 2, 8):
        assert packed.v_scale[b, h, 0, c] == v[b, h, valid[b, h], c].abs().max() / torch.tensor(448.0)

    smooth = pack(k, junk_k, junk_v, Recipe(smooth_k=True, smooth_v=True), TILES, valid)
    for b, h in np.ndindex(2, 2):
        chosen = valid[b, h].numpy()
        np.testing.assert_array_equal(smooth.k_mean[b, h].numpy(), mean32(k[b, h].numpy()[chosen]))
        np.testing.assert_array_equal(smooth.v_mean[b, h].numpy(), mean32(v[b, h].numpy()[chosen]))


def mean32(x: np.ndarray) -> np.ndarray:
    """The correctly rounded mean of ``x`` ``[N, D]``: no order of float64 sums of these numbers moves it."""
    return np.array([math.fsum(column) / len(x) for column in x.T.tolist()]).astype(f32)


def test_a_kernels_own_means_are_used() -> None:
    q, k, v = normal(1, 2, 40, 8), normal(1, 2, 40, 8, seed=1), normal(1, 2, 40, 8, seed=2)
    means = Means(k=normal(1, 2, 8, seed=3), v=normal(1, 2, 8, seed=4))
    recipe = Recipe(smooth_v=True, v_sample=SampledTokens(4), k_sample=SampledTokens(4))
    packed = pack(q, k, v, recipe, TILES, None, means)
    plain = pack(q, k - means.k[:, :, None], v - means.v[:, :, None], recipe.replace(
        smooth_v=False, smooth_k=False, k_sample=Recipe().k_sample), TILES, None)  # fmt: skip
    for name in ("q", "q_scale", "k", "k_scale", "v", "v_scale"):
        assert torch.equal(getattr(packed, name), getattr(plain, name)), name
    assert torch.equal(packed.k_mean, means.k)
    assert torch.equal(packed.v_mean, means.v)
    q_mean = normal(1, 2, -(-40 // TILES.b_q), 8, seed=5)
    smooth = pack(q, k, v, Recipe(smooth_q=True), TILES, None, Means(q=q_mean))
    taken = q_mean.repeat_interleave(TILES.b_q, dim=2)[:, :, :40]
    assert torch.equal(smooth.q_mean, q_mean)
    assert torch.equal(smooth.q, pack(q - taken, k, v, Recipe(), TILES, None).q)
    ignored = pack(q, k, v, Recipe(smooth_k=False), TILES, None, Means(v=means.v))  # V is not smoothed
    assert ignored.v_mean is None
    assert torch.equal(ignored.v, pack(q, k, v, Recipe(smooth_k=False), TILES, None).v)


ROUNDERS = {
    "e4m3": lambda x: x.astype(ml_dtypes.float8_e4m3fn).astype(f32),
    "e5m2": lambda x: x.astype(ml_dtypes.float8_e5m2).astype(f32),
    "fp16": lambda x: x.astype(np.float16).astype(f32),
    "int8": np.rint,
    "u8": np.rint,
}
V_RECIPES = {
    "e4m3": {},
    "e4m3 narrow": {"p_max": 224.0, "v_max": 4.5},
    "e5m2": {"pv_format": "e5m2", "p_max": 57344.0, "v_max": 57344.0},
    "int8": {"pv_format": "int8", "p_max": 127.0, "v_max": 127.0, "accumulator": "int32"},
    "u8": {"pv_format": "u8", "p_max": 255.0, "v_max": 127.0, "accumulator": "int32"},
    "fp16": {"pv_format": "fp16", "p_max": 1.0, "v_max": 256.0, "accumulator": "fp32"},
    "headroom": {"v_headroom": 2.0},
    "power of two": {"v_scale_power_of_two": True},
    "power of two, headroom": {"v_scale_power_of_two": True, "v_headroom": 1.5},
    "sampled": {"v_sample": SampledTokens(3), "p_max": 56.0, "v_max": 2.25},
    "sampled, headroom": {"v_sample": SampledTokens(3), "v_headroom": 2.0},
}
SAMPLE_OF_75 = {12, 37, 62}  # ⌊(i + ½) · 75 / 3⌋


def value_loop(v: np.ndarray, recipe: Recipe, counted: list[int]) -> tuple[np.ndarray, np.float32]:
    """V̂ and the scale of one channel's tokens ``v`` ``[n]``, its maximum taken over ``counted``."""
    largest = max((abs(v[t]) for t in counted), default=f32(0)) * f32(recipe.v_headroom)
    if largest == 0:
        return np.zeros_like(v), f32(1)
    scale, factor = largest / f32(recipe.v_max), f32(recipe.v_max) / largest
    if recipe.v_scale_power_of_two:
        scale = next(f32(2.0**e) for e in range(-126, 128) if 2.0**e >= scale)
        factor = 1 / scale
    return ROUNDERS[recipe.pv_format](np.clip(v * factor, -f32(recipe.v_max), f32(recipe.v_max))), scale


def pack_values(v: torch.Tensor, recipe: Recipe) -> Packed:
    return pack(normal(*v.shape), normal(*v.shape), v, recipe, TILES, None)


V_CASES = [(name, per_tile) for name in V_RECIPES for per_tile in (False, True) if not (per_tile and "sampled" in name)]


@pytest.mark.parametrize(("name", "per_tile"), V_CASES)
def test_values_follow_the_formula(name: str, per_tile: bool) -> None:
    options = {"v_granularity": PerChannelAndKeyTile()} if per_tile else {}
    recipe = Recipe(**V_RECIPES[name], **options)
    v = normal(2, 2, 75, 5)
    v[0, 1, :, 2] = 0  # a channel of zeros: δ = 1
    v[1, 0, 3, 1] = 100.0  # outside the sample: it saturates
    v[1, 1, :, 4] = torch.ldexp(torch.ones(75), torch.arange(75) % 9)  # powers of two
    packed = pack_values(v, recipe)
    tiles = [range(32), range(32, 64), range(64, 75)] if per_tile else [range(75)]
    assert packed.v_scale.shape == (2, 2, len(tiles), 5)
    for b, h, c in np.ndindex(2, 2, 5):
        for number, tile in enumerate(tiles):
            counted = [i for i, t in enumerate(tile) if "sampled" not in name or t in SAMPLE_OF_75]
            hat, scale = value_loop(v[b, h, tile.start : tile.stop, c].numpy(), recipe, counted)
            np.testing.assert_array_equal(packed.v[b, h, tile.start : tile.stop, c].numpy(), hat)
            assert packed.v_scale[b, h, number, c] == scale


def test_the_largest_value_is_mapped_to_v_max_and_a_missed_one_saturates_there() -> None:
    v = torch.ones(1, 1, 75, 1)
    v[0, 0, 0] = -50.0
    missed = pack_values(v, Recipe(v_sample=SampledTokens(3), p_max=56.0, v_max=2.25))
    assert missed.v[0, 0, :2, 0].tolist() == [-2.25, 2.25]
    seen = pack_values(v, Recipe(p_max=56.0, v_max=2.25))
    assert seen.v[0, 0, 0, 0] == -2.25


def test_a_channel_of_zeros_in_the_sample_saturates_and_does_not_vanish() -> None:
    v = torch.zeros(1, 1, 75, 1)
    v[0, 0, :4, 0] = torch.tensor([0.5, -1.0, 3.0, -300.0])
    packed = pack_values(v, Recipe(v_sample=SampledTokens(3), p_max=56.0, v_max=2.25))
    assert packed.v_scale.item() == 1
    assert packed.v[0, 0, :5, 0].tolist() == [0.5, -1.0, 2.25, -2.25, 0.0]


def test_what_is_not_quantized_is_not_touched() -> None:
    q, k, v = normal(1, 2, 9, 4), normal(1, 1, 7, 4), normal(1, 1, 7, 3)
    nothing = Recipe(qk_bits=None, smooth_k=False, pv_format="fp32", p_max=1.0, v_max=1.0, accumulator="fp32")
    packed = pack(q, k, v, nothing, TILES, None)
    unscaled = packed.v * packed.v_scale  # a power of two changes no digit
    for got, expected in ((packed.q, q), (packed.k, k), (unscaled, v)):
        assert torch.equal(got, expected)
    assert (packed.q_scale == 1).all()
    assert (packed.k_scale == 1).all()


# ---- V's means by key tile


def tile_means_loop(x: np.ndarray, v_max: float) -> np.ndarray:
    """The rule of docs/numerics.md for one tile ``x`` ``[tokens, channels]`` in units of V's scale, in float64."""
    means = np.zeros(x.shape[1])
    if any(np.abs(token).max() < v_max / 8 for token in x):
        return means
    for c, channel in enumerate(x.T):
        mean = float(np.float16(channel.mean()))
        if abs(channel.mean()) > channel.std() / 2 and np.abs(channel - mean).max() <= v_max:
            means[c] = mean
    return means


TILE_MEANS = Recipe(smooth_k=False, v_max=4.5, row_sum="accumulator", v_tile_means=True)


def test_means_by_tile_follow_the_rule() -> None:
    v = normal(2, 2, 75, 8)
    v += torch.linspace(-3, 3, 8)
    v[..., 7] = 0  # a channel of zeros
    v[:, :, 40, 2] = 40.0  # one large number: its channel's others are near 0 in units of the scale
    v[0, 1, 3] *= 0.01  # a token of tiny V: nothing is taken off its tile, and off no other
    v[1, 1, :, 5] = -2.0  # constant
    packed = pack_values(v, TILE_MEANS)
    assert packed.v_tile_means is not None
    assert packed.v_mean is None
    kept = 0
    for b, h, tile in np.ndindex(2, 2, 3):
        tokens = slice(32 * tile, min(32 * tile + 32, 75))
        factor = f32(4.5) / v[b, h].abs().amax(dim=0).clamp(min=1e-30)
        factor[7] = 0
        x = (v[b, h, tokens] * factor).numpy()
        means = packed.v_tile_means[b, h, tile].numpy()
        np.testing.assert_array_equal(means, tile_means_loop(x.astype(np.float64), 4.5))
        fma = v[b, h, tokens].double().numpy() * factor.double().numpy() - means
        codes = fma.astype(f32).astype(ml_dtypes.float8_e4m3fn).astype(f32)
        np.testing.assert_array_equal(packed.v[b, h, tokens].numpy(), codes)
        assert np.abs(codes).max() <= 4.5
        kept += int((means != 0).sum())
    assert not packed.v_tile_means[0, 1, 0].any()
    assert packed.v_tile_means[0, 1, 1].any()
    assert (packed.v_tile_means[1, 1, 1:, 5] == -4.5).all()
    assert kept > 20


def test_means_by_tile_beside_what_is_not_finite_and_what_is_hidden() -> None:
    v = 3 + normal(1, 1, 64, 4).sign() + 0.1 * normal(1, 1, 64, 4).clamp(-1, 1)
    clean = pack_values(v, TILE_MEANS)
    assert clean.v_tile_means is not None
    assert clean.v_tile_means.all()
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = v.clone()
        spoilt[0, 0, 40, 1] = bad
        packed = pack_values(spoilt, TILE_MEANS)
        assert packed.v_tile_means is not None
        assert not packed.v_tile_means[..., 1].any()
        others = torch.tensor([0, 2, 3])
        assert torch.equal(packed.v_tile_means[..., others], clean.v_tile_means[..., others])
        assert torch.equal(packed.v[..., others], clean.v[..., others])
        assert packed.v[0, 0, 40, 1].isnan()

    valid = torch.ones(1, 1, 64, dtype=torch.bool)
    valid[..., 20:32] = False
    junk = v.clone()
    junk[:, :, 20:32] = 1e30
    packed = pack(v, v, junk, TILE_MEANS, TILES, valid)
    assert packed.v_tile_means is not None
    assert packed.v.abs().max() <= 4.5
    short = pack_values(v[:, :, :20], TILE_MEANS.replace(v_scale_power_of_two=False))
    ratio = (short.v_scale / packed.v_scale)[:, :, 0]
    assert torch.allclose(packed.v_tile_means[:, :, 0], short.v_tile_means[:, :, 0] * ratio, rtol=2e-3)


def test_a_kernels_own_means_by_tile_are_used() -> None:
    v = 1 + normal(1, 2, 75, 8, seed=1)
    own = torch.zeros(1, 2, 3, 8)
    own[:, :, 1] = 0.5
    packed = pack(v, v, v, TILE_MEANS, TILES, None, Means(v_tiles=own))
    plain = pack_values(v, TILE_MEANS.replace(v_tile_means=False))
    assert packed.v_tile_means is own
    assert torch.equal(packed.v[:, :, :32], plain.v[:, :, :32])
    assert not torch.equal(packed.v[:, :, 32:64], plain.v[:, :, 32:64])
    assert pack_values(v, TILE_MEANS.replace(v_tile_means=False)).v_tile_means is None

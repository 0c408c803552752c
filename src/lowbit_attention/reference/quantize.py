"""From Q, K and V to the small integers and FP8 numbers that the tensor cores multiply, and their scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..recipes.definition import Recipe
from ..recipes.formats import FP32_MAX, power_of_two, round_e4m3, round_e5m2, round_fp16, round_int
from ..recipes.granularity import PerChannelAndKeyTile
from ..recipes.machine import Geometry
from ..recipes.options import AllTokens, PVFormat
from .rotation import rotate
from .smoothing import sampled, smoothquant_factor, tile_mean, token_mean, value_tile_means

TINY = 2.0**-112
"""A group whose largest magnitude is below this (1.9e-34) is rounded to zeros: 1 / scale would overflow float32."""


@dataclass(frozen=True)
class Means:
    """Means that a kernel computed itself, to be used instead of the reference's own when that kernel is proved.

    ``k``: k̄ ``[B, Hkv, D]``; ``v``: v̄ ``[B, Hkv, Dv]``; ``q``: q̄ ``[B, Hq, ceil(Nq / b_q), D]``; ``v_tiles``: V's means
    by key tile as `Packed` has them; ``None`` means: compute it. Those of what the recipe does not smooth are ignored.
    """

    k: Tensor | None = None
    v: Tensor | None = None
    q: Tensor | None = None
    v_tiles: Tensor | None = None


@dataclass(frozen=True)
class Packed:
    """Quantised Q, K and V; integers and FP8 numbers are held as float32.

    Shapes (D' is the head dimension after rotation, T the number of key tiles or 1):
        q ``[B, Hq, Nq, D']``, q_scale ``[B, Hq, Gq]``, q_group ``[Nq]``: token → scale
        k ``[B, Hkv, Nk, D']``, k_scale ``[B, Hkv, Gk]``, k_group ``[Nk]``
        v ``[B, Hkv, Nk, Dv]``, v_scale ``[B, Hkv, T, Dv]``
        q_mean ``[B, Hq, ceil(Nq / b_q), D]`` and k_smooth ``[B, Hkv, Nk, D]``: for ΔS, with smooth Q only
        k_mean ``[B, Hkv, D]``, v_mean ``[B, Hkv, Dv]``: with smooth K, smooth V only
        v_tile_means ``[B, Hkv, ceil(Nk / b_k), Dv]``: with V's means by key tile only; FP16 numbers, in V's scales
    """

    q: Tensor
    q_scale: Tensor
    q_group: Tensor
    k: Tensor
    k_scale: Tensor
    k_group: Tensor
    v: Tensor
    v_scale: Tensor
    q_mean: Tensor | None
    k_smooth: Tensor | None
    k_mean: Tensor | None
    v_mean: Tensor | None
    v_tile_means: Tensor | None

    def of_rows(self, rows: Tensor, geometry: Geometry) -> Packed:
        """The same with some of Q's rows, int64 ``[R]``: whole query tiles of it (the last may be cut)."""
        q_mean = None if self.q_mean is None else self.q_mean[:, :, rows[:: geometry.b_q] // geometry.b_q]
        return replace(self, q=self.q[:, :, rows], q_group=self.q_group[rows], q_mean=q_mean)

    def of_heads(self, batches: slice, q_heads: slice, kv_heads: slice) -> Packed:
        """The same with some of the batches and heads."""
        of_q, of_kv = (batches, q_heads), (batches, kv_heads)
        heads = {"q": of_q, "q_scale": of_q, "q_mean": of_q} | dict.fromkeys(
            ("k", "k_scale", "v", "v_scale", "k_smooth", "k_mean", "v_mean", "v_tile_means"), of_kv
        )
        chosen: dict[str, Any] = {n: getattr(self, n) for n in heads}
        chosen = {n: None if of is None else of[heads[n]] for n, of in chosen.items()}
        return replace(self, **chosen)

    def of_tiles(self, tiles: Tensor, size: int) -> Packed:
        """The same with some key tiles of ``size`` keys, int64 ``[T]``, one behind the other."""
        keys = key_positions(tiles, size, self.k.shape[2])
        return replace(
            self,
            k=self.k[:, :, keys],
            k_group=self.k_group[keys],
            v=self.v[:, :, keys],
            v_scale=self.v_scale if self.v_scale.shape[2] == 1 else self.v_scale[:, :, tiles],
            k_smooth=None if self.k_smooth is None else self.k_smooth[:, :, keys],
            v_tile_means=None if self.v_tile_means is None else self.v_tile_means[:, :, tiles],
        )


def key_positions(tiles: Tensor, size: int, length: int) -> Tensor:
    """The keys of some tiles of ``size`` keys, of ``length`` in all."""
    keys = (tiles[:, None] * size + torch.arange(size, dtype=torch.int64, device=tiles.device)).flatten()
    return keys[keys < length]


def pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recipe: Recipe,
    geometry: Geometry,
    valid: Tensor | None,
    means: Means | None = None,
    seeing: Tensor | None = None,
) -> Packed:
    """Quantise float32 Q ``[B, Hq, Nq, D]``, K ``[B, Hkv, Nk, D]`` and V ``[B, Hkv, Nk, Dv]``.

    ``valid`` (bool ``[B, Hkv, Nk]`` or ``None`` for all) says which keys count in means and scales, ``seeing`` (bool
    ``[B or 1, Hq or 1, Nq]`` or ``None`` for all) which queries.
    """
    if seeing is not None:
        q = torch.where(seeing[..., None], q, 0.0)
    if valid is not None:  # (P is 0 there, and 0 · NaN would be NaN)
        v = torch.where(valid[..., None], v, 0.0)
    means = means or Means()
    v_hat, v_scale, v_mean, v_tiles = _pack_values(v, recipe, geometry, valid, means)
    if recipe.qk_bits is None:
        one_q, one_k = q.new_ones(*q.shape[:2], 1), k.new_ones(*k.shape[:2], 1)
        q_group = torch.zeros(q.shape[2], dtype=torch.int64, device=q.device)
        k_group = torch.zeros(k.shape[2], dtype=torch.int64, device=q.device)
        return Packed(q, one_q, q_group, k, one_k, k_group, v_hat, v_scale, None, None, None, v_mean, v_tiles)

    k_mean = q_mean = k_smooth = None
    if recipe.smooth_k:
        k_mean = token_mean(k, sampled(valid, recipe.k_sample, k)) if means.k is None else means.k.float()
        k = k - k_mean[:, :, None]
    if recipe.smooth_q:
        q_mean, k_smooth = tile_mean(q, geometry.b_q, seeing) if means.q is None else means.q.float(), k
        q = q - q_mean.repeat_interleave(geometry.b_q, dim=2)[:, :, : q.shape[2]]
        q = q if seeing is None else torch.where(seeing[..., None], q, 0.0)
    if recipe.smoothquant_alpha is not None:
        factor = smoothquant_factor(q, k, valid, recipe.smoothquant_alpha)[:, :, None]
        q = q / factor.repeat_interleave(q.shape[1] // max(1, k.shape[1]), dim=1)
        k = torch.where(k.isfinite(), (k * factor).clamp(-FP32_MAX, FP32_MAX), k)
    if recipe.rotation == "hadamard":
        q, k = rotate(q), rotate(k)

    q_group = recipe.q_granularity.q_group(torch.arange(q.shape[2], dtype=torch.int64, device=q.device), geometry)
    k_group = recipe.k_granularity.k_group(torch.arange(k.shape[2], dtype=torch.int64, device=k.device), geometry)
    q_groups = recipe.q_granularity.q_groups(q.shape[2], geometry)
    k_groups = recipe.k_granularity.k_groups(k.shape[2], geometry)
    q_hat, q_scale = quantize_tokens(q, q_group, q_groups, recipe.qk_max)
    k_hat, k_scale = quantize_tokens(k, k_group, k_groups, recipe.qk_max, valid)
    return Packed(
        q_hat, q_scale, q_group, k_hat, k_scale, k_group, v_hat, v_scale, q_mean, k_smooth, k_mean, v_mean, v_tiles
    )


def quantize_tokens(
    x: Tensor, group: Tensor, groups: int, largest: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Integers ``rint(x · fl(largest / max|x|))`` and scales ``fl(max|x| / largest)``, the maximum over each group.

    Args:
        x: ``[B, H, N, D]`` float32; group: ``[N]`` int64, each token's group; valid: tokens that count.
    Returns:
        Integers as float32 ``[B, H, N, D]`` and scales ``[B, H, groups]``. A group without a number above `TINY`
        gets the scale 1 and zeros.
    """
    token_max = x.abs().amax(dim=-1)
    if valid is not None:
        token_max = torch.where(valid, token_max, 0.0)
    group_max = token_max.new_zeros(*token_max.shape[:2], groups)
    group_max.scatter_reduce_(2, group.expand_as(token_max), token_max, reduce="amax")
    scale, factor = _scale_and_factor(group_max, float(largest))
    return round_int(x * factor[:, :, group, None], largest), scale


def _scale_and_factor(largest_seen: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """``δ = fl(max / largest)`` and ``r = fl(largest / max)``; 1 and 0 where there is nothing to scale.

    Both operands are tensors: torch turns a division by or of a Python number into a product with a reciprocal, which
    is rounded twice.
    """
    nothing = largest_seen < TINY
    divisor = torch.full_like(largest_seen, largest)
    scale = torch.where(nothing, 1.0, largest_seen / divisor)
    factor = torch.where(nothing, 0.0, divisor / largest_seen)
    return scale, factor


def _pack_values(
    v: Tensor, recipe: Recipe, geometry: Geometry, valid: Tensor | None, means: Means
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """V̂ in its format, its scale ``[B, Hkv, T or 1, Dv]``, v̄ if V is smoothed, and its means by key tile if asked."""
    tokens = sampled(valid, recipe.v_sample, v)
    mean: Tensor | None = None
    if recipe.smooth_v:
        mean = token_mean(v, tokens) if means.v is None else means.v.float()
        v = v - mean[:, :, None]
    magnitude = v.abs() if tokens is None else torch.where(tokens[..., None], v.abs(), 0.0)
    per_tile = isinstance(recipe.v_granularity, PerChannelAndKeyTile)
    tile = geometry.b_k if per_tile else max(1, v.shape[2])
    tiles = max(1, -(-v.shape[2] // tile))
    padded = torch.nn.functional.pad(magnitude, (0, 0, 0, tiles * tile - v.shape[2]))
    channel_max = padded.reshape(*v.shape[:2], tiles, tile, v.shape[3]).amax(dim=3)

    scale, factor = _scale_and_factor(channel_max, recipe.v_max / recipe.v_headroom)
    if recipe.v_sample != AllTokens():
        factor = torch.where(channel_max < TINY, 1.0, factor)  # a channel of zeros in the sample only: δ = 1
    if recipe.v_scale_power_of_two or not recipe.quantizes_pv:  # (unrounded, a power of two only keeps sums in range)
        scale = _next_power_of_two(scale)
        factor = torch.where(factor == 0, 0.0, torch.ones_like(scale) / scale)
    expanded = factor.repeat_interleave(tile, dim=2)[:, :, : v.shape[2]]
    scaled = v * expanded
    tile_means = None
    if recipe.v_tile_means:
        tile_means = means.v_tiles
        if tile_means is None:
            tile_means = value_tile_means(scaled, geometry.b_k, recipe.v_max, tokens)
        taken = tile_means.repeat_interleave(geometry.b_k, dim=2)[:, :, : v.shape[2]]
        scaled = (v.double() * expanded.double() - taken.double()).float()  # (rounded once, as an FMA does)
    scaled = scaled.clamp(-recipe.v_max, recipe.v_max)
    scaled = torch.where(v.isfinite(), scaled, torch.nan)  # a token outside the sample must not saturate silently
    return round_values(scaled, recipe.pv_format), scale, mean, tile_means


def _next_power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two at or above each positive entry."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa · 2^exponent, ½ ≤ mantissa < 1
    power = power_of_two(exponent - (mantissa == 0.5).to(exponent.dtype)).float()
    return torch.where(x.isfinite(), power, x)


def round_values(x: Tensor, pv_format: PVFormat) -> Tensor:
    """``x``, already scaled, in V's format."""
    if pv_format in ("int8", "u8"):
        return round_int(x, 127)
    return _ROUND_FLOAT[pv_format](x)


def round_probabilities(x: Tensor, pv_format: PVFormat) -> Tensor:
    """``x``, already scaled by P_r, in P's format."""
    if pv_format == "int8":
        return round_int(x, 127)
    if pv_format == "u8":
        return round_int(x, 255, 0)
    return _ROUND_FLOAT[pv_format](x)


_ROUND_FLOAT: dict[PVFormat, Callable[[Tensor], Tensor]] = {
    "e4m3": round_e4m3,
    "e5m2": round_e5m2,
    "fp16": round_fp16,
    "fp32": lambda x: x,
}

SIGNIFICANT_BITS: dict[PVFormat, int] = {"e4m3": 4, "e5m2": 3, "int8": 7, "u8": 8, "fp16": 11, "fp32": 24}
"""Of the largest number of P's and V's format."""

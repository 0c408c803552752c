"""Means that are taken out before rounding and put back after it (SageAttention §4.2, SageAttention2 §3.1).

Means are summed in float64 and rounded to float32. Any constant vector is a valid mean: where subtracting it could
overflow float32, or it is not finite, none is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipes.formats import FP32_MAX
from ..recipes.options import SampledTokens, TokenSample

_LARGEST_SMOOTHED = 2.0**126  # |a − mean(a)| ≤ 2 · max|a| < 2^128
_LARGEST_MEAN = 2.0**103  # |a − mean| < FP32_MAX + 2^103, half its ulp, for every a: rounded, FP32_MAX at the most
_TINY = 2.0**-112
SMALL_TOKEN = 8
"""A token whose V is everywhere below an eighth of its channels' largest is kept where it is (`value_tile_means`)."""


def sampled(valid: Tensor | None, sample: TokenSample, like: Tensor) -> Tensor | None:
    """Tokens that statistics of ``like`` ``[B, H, N, D]`` are taken over, bool ``[B, H, N]``; ``None`` for all."""
    if not isinstance(sample, SampledTokens):
        return valid
    batch, heads, length, _ = like.shape
    usable = torch.ones(batch, heads, length, dtype=torch.bool, device=like.device) if valid is None else valid
    rank = usable.cumsum(dim=-1)
    total = rank[..., -1:] if length else rank.new_zeros(batch, heads, 1)
    steps = torch.arange(sample.count, dtype=torch.int64, device=like.device)
    wanted = ((2 * steps + 1) * total) // (2 * sample.count)  # ⌊(i + ½) · n / count⌋, a rank among the usable
    token = torch.searchsorted(rank, (wanted + 1).clamp(max=total))
    chosen = torch.zeros_like(usable)
    if length:
        chosen.scatter_(-1, token.clamp(max=length - 1), True)
    return chosen & usable


def token_mean(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Mean over the chosen tokens (``None``: all) of ``x`` ``[B, H, N, D]``, float32 ``[B, H, D]``.

    A channel whose mean is not below 2¹⁰³ gets 0 instead: what was not chosen may be of any size.
    """
    if x.shape[2] == 0:
        return x.new_zeros(x.shape[0], x.shape[1], x.shape[3])
    if tokens is None:
        mean = x.mean(dim=2, dtype=torch.float64)
    else:
        chosen = torch.where(tokens[..., None], x, 0.0)
        count = tokens.sum(dim=-1).clamp(min=1)
        mean = chosen.sum(dim=2, dtype=torch.float64) / count[..., None]
    mean = mean.float()
    return torch.where(mean.abs() < _LARGEST_MEAN, mean, 0.0)  # (NaN is not below)


def tile_mean(x: Tensor, tile: int, tokens: Tensor | None = None) -> Tensor:
    """Mean over each tile of ``tile`` tokens of ``x`` ``[B, H, N, D]``, float32 ``[B, H, ceil(N / tile), D]``.

    ``tokens``: those that count, bool ``[B or 1, H or 1, N]``; the others are zeros.
    """
    batch, heads, length, dim = x.shape
    tiles = -(-length // tile)
    padded = torch.nn.functional.pad(x, (0, 0, 0, tiles * tile - length)).reshape(batch, heads, tiles, tile, dim)
    count = torch.full((tiles, 1), tile, dtype=torch.float64, device=x.device)
    if tiles:
        count[-1] = length - (tiles - 1) * tile
    if tokens is not None:
        counted = torch.nn.functional.pad(tokens, (0, tiles * tile - length)).reshape(*tokens.shape[:2], tiles, tile)
        count = counted.sum(dim=3).clamp(min=1)[..., None].double()
    mean = (padded.sum(dim=3, dtype=torch.float64) / count).float()
    return torch.where(padded.abs().amax(dim=3) >= _LARGEST_SMOOTHED, 0.0, mean)


def value_tile_means(x: Tensor, tile: int, v_max: float, tokens: Tensor | None) -> Tensor:
    """What is subtracted from each tile of ``tile`` tokens of V, once V is in units of its scale: FP16 numbers.

    A channel's mean where it is more than half as large as the standard deviation beside it, else 0: a smaller one
    would only take V off the grid of its own dtype. And 0 for the whole tile where some token is small in every
    channel: an attention sink's V, which rounds well as long as it stays near 0.

    Args:
        x: V over its scale ``[B, H, N, D]`` float32, up to ``v_max``; tokens: that count, ``[B, H, N]`` or ``None``.
    Returns:
        ``[B, H, ceil(N / tile), D]`` float32.
    """
    batch, heads, length, dim = x.shape
    tiles = -(-length // tile)
    counted = x.new_ones(batch, heads, length, dtype=torch.bool) if tokens is None else tokens
    x = torch.where(counted[..., None], x, 0.0)
    small = counted & ~(x.abs() >= v_max / SMALL_TOKEN).any(dim=-1)
    x = torch.nn.functional.pad(x, (0, 0, 0, tiles * tile - length)).reshape(batch, heads, tiles, tile, dim)
    counted, small = (
        torch.nn.functional.pad(y, (0, tiles * tile - length)).reshape(batch, heads, tiles, tile)
        for y in (counted, small)
    )
    number = counted.sum(dim=3).clamp(min=1)[..., None].double()
    total, squares = x.sum(dim=3, dtype=torch.float64), x.double().square().sum(dim=3)
    mean = (total / number).half().float()
    # mean² > σ² / 4, with n · Σx² − (Σx)² = n² σ²
    large = 5 * total.square() > number * squares
    inside = (x.amax(dim=3) - mean <= v_max) & (mean - x.amin(dim=3) <= v_max)  # (false where something is NaN)
    return torch.where(large & inside & ~small.any(dim=3)[..., None], mean, 0.0)


def smoothquant_factor(q: Tensor, k: Tensor, valid: Tensor | None, alpha: float) -> Tensor:
    """SmoothQuant's per-channel factor ``max|Q|^α / max|K|^(1−α)``: Q is divided by it and K multiplied.

    Q heads that share a K head share the factor. Non-finite entries do not count, so they spoil their own rows only.

    Args:
        q: ``[B, Hq, Nq, D]``; k: ``[B, Hkv, Nk, D]``; valid: keys that count, ``[B, Hkv, Nk]`` or ``None``.
    Returns:
        ``[B, Hkv, D]`` float32, 1 where a channel of either is zero.
    """
    if q.shape[2] == 0 or k.shape[2] == 0:
        return k.new_ones(k.shape[0], k.shape[1], k.shape[3])
    counted = k if valid is None else torch.where(valid[..., None], k, 0.0)
    q_max = torch.where(q.isfinite(), q, 0.0).abs().amax(dim=2)
    group = q.shape[1] // max(1, k.shape[1])
    q_max = q_max.reshape(k.shape[0], k.shape[1], group, k.shape[3])
    q_max = q_max.amax(dim=2) if group else k.new_ones(k.shape[0], k.shape[1], k.shape[3])
    k_max = torch.where(counted.isfinite(), counted, 0.0).abs().amax(dim=2)
    usable = (q_max > _TINY) & (k_max > _TINY)
    factor = q_max.double() ** alpha / k_max.double().clamp(min=_TINY) ** (1 - alpha)
    return torch.where(usable, factor.float().clamp(_TINY, FP32_MAX), 1.0)

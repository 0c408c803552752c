"""What the answer of a fuzzed call must be: attention in float64 by plain formulas, and how far off a recipe may be.

The oracle shares nothing with the library but torch's matrix product. Tolerances are derived, not fitted:

*Logits.* INT8 rounds each of D components of q and of k − k̄ by at most half a step δ = max / 127, evenly: the error
of a logit has variance scale² · (|q|² δk² + |k|² δq²) / 12 for independent roundings, and is at most
scale · (Σ|q| δk + Σ|k| δq) / 2 + … for any. k̄ is within K's range, so the range bounds |k − k̄|.

*P·V.* FP8 (E4M3) rounds by at most a 16th, with a relative deviation of at most 2⁻³ / √12, P and V each; a P that
falls among the subnormals by half of one, 2⁻¹⁰ / P_r of the largest. Independent roundings add up as √Σ p²v²; those
that all go the same way (equal P, equal V) change the output by up to |o| / 16 each. FP16 rounds by 2⁻¹¹. Sums of an
FP8 or FP16 accumulator lose up to 32 products · 2⁻¹³ = 2⁻⁸, on average half of it, of the sum an instruction. With
smooth V, v − v̄ takes V's place; with means by tile what is larger, v or v less the mean of its 64 or 128 keys.

An element may be off by 7 of the deviations so found (one in 10¹¹), and a whole call's root mean square by 3 times
what they say; where inputs are not random (constant, zero, …) the worst cases bound instead. Changed weights never
leave the hull of V: its range bounds every error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from fuzz_cases import DTYPES, RANDOM_FAMILIES, Case
from torch import Tensor

from lowbit_attention import RECIPES, Recipe, RestartedMax

SIGMAS = 7.0


@dataclass(frozen=True)
class Answer:
    """Float64: the output, which rows see a key, bounds of each element's error and of their root mean square."""

    out: Tensor
    seen: Tensor
    bound: Tensor
    rms: float


def expected(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Answer:
    """The answer and its tolerance."""
    q, k, v = (t.detach().double() for t in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if case.scale is None else case.scale
    if case.enable_gqa:
        group = q.shape[-3] // k.shape[-3]
        k, v = (t.repeat_interleave(group, dim=-3) for t in (k, v))
    logits = scale * (q @ k.transpose(-1, -2))
    visible = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device)
    if case.is_causal:
        visible = visible.tril()
    visible = visible.expand(logits.shape)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        logits = logits + mask.double()
    logits = logits.masked_fill(~visible, -torch.inf)
    if not logits.numel():
        lead = torch.broadcast_shapes(logits.shape[:-2], v.shape[:-2])  # type: ignore[no-untyped-call]
        out = torch.zeros(*lead, q.shape[-2], v.shape[-1], dtype=torch.float64, device=q.device)
        return Answer(out, torch.zeros_like(out[..., 0], dtype=torch.bool), torch.zeros_like(out), 0.0)
    seen = logits.amax(dim=-1) > -torch.inf
    p = torch.softmax(logits, dim=-1).masked_fill(~seen[..., None], 0.0)
    out = p @ v
    bound, rms = _tolerance(case, q, k, v, p, logits, out, abs(scale))
    return Answer(out, seen.expand(out.shape[:-1]), bound, rms)


def _tolerance(
    case: Case, q: Tensor, k: Tensor, v: Tensor, p: Tensor, logits: Tensor, out: Tensor, scale: float
) -> tuple[Tensor, float]:
    eps = torch.finfo(DTYPES[case.dtype]).eps
    spread = (v.amax(dim=-2, keepdim=True) - v.amin(dim=-2, keepdim=True)).expand(*out.shape[:-2], 1, out.shape[-1])
    largest = v.abs().amax(dim=-2, keepdim=True)
    size = p @ v.abs()  # Σ p |v|
    finite = logits.masked_fill(logits == -torch.inf, 0.0).abs().amax(dim=-1, keepdim=True)
    floor = eps * out.abs() + 2.0**-18 * (largest + size)  # the output's rounding; float32 itself
    if case.recipe in ("exact", "auto"):  # torch's own: logits and P in q's dtype
        off = 4 * eps * (finite + 1)
        return torch.minimum(torch.expm1(2 * off) * size, spread) + 4 * eps * size + floor, math.inf
    recipe = RECIPES[case.recipe]
    u = v  # what is rounded
    if recipe.smooth_v:  # (with a mask the mean may be over fewer keys, anywhere in V's range)
        u = v - v.mean(dim=-2, keepdim=True)
        u = u if case.mask_shape is None else u.abs() + spread
        largest, size = u.abs().amax(dim=-2, keepdim=True), p @ u.abs()
    if recipe.v_tile_means:  # (a tile's mean is taken off or not, by channel)
        u = torch.maximum(v.abs(), torch.maximum(*((v - _tile_means(v, tile)).abs() for tile in (64, 128))))
        u = u if case.mask_shape is None else u + spread
    before = (p @ u).abs()
    sigma, worst, unit = _logit_errors(recipe, q, k, scale)
    float32 = 2.0**-18 * (finite + 1) + 2 * unit  # (a kernel's logits are rounded to 1.75 of the integers' units)
    p2 = p.square()
    square = (p2 @ u.square()).sqrt()  # √Σ p²u²
    centred = p2 @ v.square() - 2 * out * (p2 @ v) + out.square() * p2.sum(dim=-1, keepdim=True)
    centred = centred.clamp(min=0).sqrt()  # √Σ p²(v − o)²
    sums = _sums(recipe) * (before + 3 * square)
    round_p, round_v, lost, same_way = _pv_errors(recipe, p, largest)
    if case.family in RANDOM_FAMILIES:
        grow = torch.exp((SIGMAS * sigma).clamp(max=20))  # the second order of exp
        deviation = (sigma * centred).square() + (round_p**2 + round_v**2) * square.square()
        deviation = deviation.sqrt()
        bound = SIGMAS * grow * deviation + same_way * before + float32 * size
        rms = grow.square() * deviation.square() + (same_way * before).square() + (sums + lost).square()
        total = 3 * float(rms.mean().sqrt()) + float(floor.max())
    else:
        bound = torch.expm1((2 * (worst + float32)).clamp(max=50)) * (size + before) + 2 * same_way * (size + before)
        total = math.inf
    bound = torch.minimum(bound, spread + 2 * same_way * (size + before)) + lost + sums + floor
    return bound, total


def _tile_means(v: Tensor, tile: int) -> Tensor:
    """Each channel's mean over the keys of its tile, as large as ``v``."""
    return torch.cat([part.mean(dim=-2, keepdim=True).expand_as(part) for part in torch.split(v, tile, dim=-2)], dim=-2)


def _logit_errors(recipe: Recipe, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Standard deviation and bound of a logit's error, ``[..., Nq, 1]`` (for the worst key), and a unit of Q̂·K̂."""
    steps = 127.0
    around = k - k.mean(dim=-2, keepdim=True)
    if recipe.smooth_k:
        k_largest = (k.amax(dim=-2) - k.amin(dim=-2)).amax(dim=-1)[..., None, None]
    else:
        around, k_largest = k, k.abs().amax(dim=(-2, -1), keepdim=True)
    q_step = q.abs().amax(dim=(-2, -1), keepdim=True) / steps
    k_step = k_largest / steps
    k_norm = around.norm(dim=-1).amax(dim=-1)[..., None, None]
    variance = (q.norm(dim=-1, keepdim=True) * k_step).square() + (k_norm * q_step).square()
    k_sum = around.abs().sum(dim=-1).amax(dim=-1)[..., None, None]
    # (K's mean may be over fewer keys than all: then |k − k̄| is up to its range away from the one taken here)
    k_sum = k_sum + (k_largest * k.shape[-1] if recipe.smooth_k else 0)
    worst = (q.abs().sum(dim=-1, keepdim=True) * k_step + k_sum * q_step) / 2 + q.shape[-1] * q_step * k_step / 4
    return scale * (variance / 12).sqrt(), scale * worst, scale * q_step * k_step


def _pv_errors(recipe: Recipe, p: Tensor, largest: Tensor) -> tuple[float, float, Tensor, float]:
    """Relative deviations of P and V, what subnormals lose, and how much of |o| goes when all round the same way."""
    fp8 = recipe.pv_format == "e4m3"
    relative = 2.0**-3 if fp8 else 2.0**-10
    restart = 2.0**recipe.softmax_max.headroom if isinstance(recipe.softmax_max, RestartedMax) else 1.0
    half = (2.0**-10 if fp8 else 2.0**-25) / recipe.p_max * restart
    few = p.amax(dim=-1, keepdim=True) * half * p.shape[-1]
    lost = (few + (2.0**-10 if fp8 else 2.0**-25) / recipe.v_max) * largest
    deviation = relative / math.sqrt(12)
    return deviation, deviation, lost, relative


def _sums(recipe: Recipe) -> float:
    """Of a sum, what its accumulator may lose."""
    if recipe.accumulator == "fp32":
        return 2.0**-18
    keys = recipe.keys_per_promotion if isinstance(recipe.keys_per_promotion, int) else 128
    return keys / 32 * 2.0**-9

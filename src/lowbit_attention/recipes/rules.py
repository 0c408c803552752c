"""Which recipes contradict themselves, and why: each function returns every reason it finds."""

from __future__ import annotations

import math
from typing import Any, get_args

from .fields import RecipeFields
from .formats import E4M3_MAX, E5M2_MAX, FP16_MAX, FP32_MAX
from .granularity import PerChannel, PerChannelAndKeyTile, TokenGranularity, ValueGranularity
from .options import Accumulator, AllTokens, PVFormat, RestartedMax, Rotation, RowSum, SoftmaxMax, TileMax, TokenSample

MMA_DEPTH = 32
"""Keys one 8-bit MMA sums (``m16n8k32``; a wgmma's k is 32, too)."""
INT32_MAX = 2**31 - 1
TILE_MEAN_KEYS = 1024
"""Keys a promotion with V's means by tile: eight columns of ones, an MMA's least, hold eight tiles' row sums."""

_FORMAT_MAX = {"e4m3": E4M3_MAX, "e5m2": E5M2_MAX, "int8": 127.0, "u8": 255.0, "fp16": FP16_MAX, "fp32": math.inf}
_FORMAT_FRACTION_BITS = {"e4m3": 3, "e5m2": 2, "fp16": 10}
_ACCUMULATORS_OF = {
    "e4m3": ("fp8_f32", "fp8_f16", "fp32"),
    "e5m2": ("fp8_f32", "fp8_f16", "fp32"),
    "int8": ("int32",),
    "u8": ("int32",),
    "fp16": ("fp32", "fp16"),
    "fp32": ("fp32",),
}


def largest_rounded(value: float, pv_format: PVFormat) -> float:
    """The largest magnitude that numbers up to ``value`` have after rounding to ``pv_format``."""
    if pv_format in ("int8", "u8"):
        return float(round(value))
    bits = _FORMAT_FRACTION_BITS.get(pv_format)
    if bits is None or value == 0:
        return value
    quantum = 2.0 ** (math.floor(math.log2(value)) - bits)
    return min(round(value / quantum) * quantum, _FORMAT_MAX[pv_format])


def contradictions(r: RecipeFields) -> list[str]:
    """Why these options do not go together; wrong types hide the rest."""
    return type_reasons(r) or [*_qk_reasons(r), *_pv_reasons(r), *_sum_reasons(r), *_tile_mean_reasons(r)]


def type_reasons(r: RecipeFields) -> list[str]:
    """Wrong types and values outside an option's own range, before options are held against each other."""
    choices = {
        "qk_bits": (8, 4, None),
        "rotation": get_args(Rotation),
        "pv_format": get_args(PVFormat),
        "accumulator": get_args(Accumulator),
        "row_sum": get_args(RowSum),
    }
    kinds: dict[str, Any] = {
        "name": str,
        "summary": str,
        "q_granularity": TokenGranularity,
        "k_granularity": TokenGranularity,
        "v_granularity": ValueGranularity,
        "k_sample": TokenSample,
        "v_sample": TokenSample,
        "softmax_max": SoftmaxMax,
    }
    booleans = ("smooth_q", "smooth_k", "smooth_v", "v_scale_power_of_two", "v_tile_means", "promote_first_tile")
    reasons = [
        f"{name}={getattr(r, name)!r} is not one of {', '.join(map(str, allowed))}"
        for name, allowed in choices.items()
        if isinstance(getattr(r, name), bool | float) or getattr(r, name) not in allowed
    ]
    reasons += [
        f"{name}={getattr(r, name)!r} has the wrong type"
        for name, k in kinds.items()
        if not isinstance(getattr(r, name), k)
    ]
    reasons += [
        f"{name}={getattr(r, name)!r} is no bool" for name in booleans if not isinstance(getattr(r, name), bool)
    ]
    for name, low in (("p_max", 0.0), ("v_max", 0.0), ("v_headroom", 1.0)):
        value = getattr(r, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FP32_MAX:
            reasons.append(f"{name}={value!r} is no finite number")
        elif value < low or value == 0:
            reasons.append(f"{name}={value} must be " + ("positive" if low == 0 else f"at least {low:g}"))
    alpha = r.smoothquant_alpha
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1):
        reasons.append(f"smoothquant_alpha={alpha!r} is neither None nor in [0, 1]")
    keys = r.keys_per_promotion
    if keys not in ("tile", "never") and (
        isinstance(keys, bool) or not isinstance(keys, int) or keys < MMA_DEPTH or keys % MMA_DEPTH
    ):
        reasons.append(
            f"keys_per_promotion={keys!r} is neither 'tile', 'never' nor a positive multiple of {MMA_DEPTH}, "
            "the keys one MMA sums"
        )
    return reasons


def _qk_reasons(r: RecipeFields) -> list[str]:
    reasons = []
    if not r.quantizes_qk:
        idle = [name for name in ("smooth_q", "smooth_k") if getattr(r, name)]
        idle += ["rotation"] if r.rotation != "none" else []
        idle += ["smoothquant_alpha"] if r.smoothquant_alpha is not None else []
        reasons += [f"{name} does nothing where Q·K is not quantised (qk_bits=None)" for name in idle]
    if not r.smooth_k and r.k_sample != AllTokens():
        reasons.append(f"k_sample={r.k_sample} does nothing without smooth_k")
    return reasons


def _pv_reasons(r: RecipeFields) -> list[str]:
    reasons = []
    if not r.quantizes_pv:
        idle = [name for name in ("smooth_v", "v_scale_power_of_two") if getattr(r, name)]
        idle += [name for name in ("v_headroom", "p_max", "v_max") if getattr(r, name) != 1]
        idle += ["v_granularity"] if r.v_granularity != PerChannel() else []
        idle += ["v_sample"] if r.v_sample != AllTokens() else []
        reasons += [f"{name} does nothing where P·V is not quantised (pv_format=fp32)" for name in idle]
        return reasons
    if r.p_max < 1:
        reasons.append(f"p_max={r.p_max:g} is below 1: most of P would round to zero")
    least = 2.0 if r.v_scale_power_of_two else 1.0
    if r.v_max / r.v_headroom < least:
        reasons.append(
            f"v_max / v_headroom = {r.v_max:g} / {r.v_headroom:g} is below {least:g}: the scale of a large V overflows"
        )
    p_limit = _FORMAT_MAX[r.pv_format]
    v_limit = 127.0 if r.pv_format == "u8" else p_limit
    if r.p_max > p_limit:
        reasons.append(f"p_max={r.p_max:g} is above the largest {r.pv_format} number, {p_limit:g}")
    if r.v_max > v_limit:
        reasons.append(f"v_max={r.v_max:g} is above the largest number of V's format, {v_limit:g}")
    return reasons


def _sum_reasons(r: RecipeFields) -> list[str]:
    reasons = []
    if r.accumulator not in _ACCUMULATORS_OF[r.pv_format]:
        allowed = ", ".join(_ACCUMULATORS_OF[r.pv_format])
        reasons.append(f"accumulator={r.accumulator} cannot sum {r.pv_format} products (possible: {allowed})")
    once_a_tile = r.keys_per_promotion == "tile"
    if r.accumulator == "int32" and not once_a_tile:
        reasons.append(
            f"integer sums cannot follow a moving maximum, so keys_per_promotion must be 'tile', "
            f"not {r.keys_per_promotion!r}"
        )
    if isinstance(r.softmax_max, TileMax) and not once_a_tile:
        reasons.append(f"softmax_max=tile needs keys_per_promotion='tile', not {r.keys_per_promotion!r}")
    if isinstance(r.softmax_max, RestartedMax) and r.keys_per_promotion == "never":
        reasons.append(f"softmax_max={r.softmax_max} restarts at promotions, and keys_per_promotion is 'never'")
    if isinstance(r.v_granularity, PerChannelAndKeyTile) and r.v_sample != AllTokens():
        reasons.append(f"v_sample={r.v_sample} leaves most key tiles without a token for their own scale")
    if isinstance(r.v_granularity, PerChannelAndKeyTile) and not once_a_tile:
        reasons.append(
            "v_granularity=per_channel_and_key_tile needs keys_per_promotion='tile': each tile has its scale"
        )
    if isinstance(r.softmax_max, RestartedMax) and r.softmax_max.jump is not None and not r.promote_first_tile:
        reasons.append(f"softmax_max={r.softmax_max} gives the first tile its own interval: promote_first_tile=true")
    if r.promote_first_tile and not isinstance(r.keys_per_promotion, int):
        reasons.append("promote_first_tile needs keys_per_promotion to be a number of keys")
    if r.row_sum == "accumulator" and r.accumulator not in ("fp8_f32", "fp8_f16", "fp16"):
        reasons.append(f"row_sum=accumulator is the same as rounded where the accumulator is {r.accumulator}")
    if r.row_sum == "accumulator" and r.keys_per_promotion == "never":
        reasons.append("row_sum=accumulator drifts without promotions (keys_per_promotion='never')")
    if isinstance(r.keys_per_promotion, int):
        reasons += range_reasons(r, r.keys_per_promotion)
    elif r.keys_per_promotion == "never" and r.accumulator in ("fp8_f16", "fp16"):
        reasons.append("FP16 sums that are never promoted overflow (keys_per_promotion='never')")
    return reasons


def _tile_mean_reasons(r: RecipeFields) -> list[str]:
    """What goes together with V's means by key tile: they are put back by sums that only P·V's own columns have."""
    if not r.v_tile_means:
        return []
    reasons = []
    if r.pv_format != "e4m3":
        reasons.append(f"v_tile_means needs pv_format=e4m3, not {r.pv_format}")
    if r.row_sum != "accumulator":
        reasons.append(f"v_tile_means needs row_sum=accumulator, whose columns hold the tiles' sums, not {r.row_sum}")
    if r.smooth_v:
        reasons.append("v_tile_means and smooth_v both take a mean off V: choose one")
    if r.v_granularity != PerChannel():
        reasons.append(f"v_tile_means needs v_granularity=per_channel, not {r.v_granularity}")
    if r.v_headroom != 1 or r.v_sample != AllTokens():
        reasons.append("v_tile_means needs scales from V's own maximum: v_headroom=1 and v_sample=all")
    keys = r.keys_per_promotion
    if keys == "never" or (isinstance(keys, int) and keys > TILE_MEAN_KEYS):
        reasons.append(f"v_tile_means needs a promotion after at most {TILE_MEAN_KEYS} keys, not {keys!r}")
    return reasons


def _most_of_one(r: RecipeFields) -> float:
    """What may become of P = 1: Hopper makes up to 1.0066 of it: .565 %, and two roundings of the exponent by 2⁻¹¹."""
    return 1.007 if r.accumulator == "fp8_f16" else 1.0


def alone_bits(r: RecipeFields, tiles: int) -> int:
    """log2 of how much larger P may be in a tile that has an interval of ``tiles`` tiles to itself.

    Its sum then stays in the same range; and P below its format's largest number.
    """
    room = _FORMAT_MAX[r.pv_format] / (r.p_max * _most_of_one(r))
    return max(0, math.floor(math.log2(min(tiles, room))))


def range_reasons(r: RecipeFields, keys: int | None) -> list[str]:
    """Whether a sum over ``keys`` keys stays in the accumulator's range, on the values *after* rounding."""
    if keys is None:
        return []
    polynomial = _most_of_one(r)
    p, v = (
        largest_rounded(r.p_max * polynomial, r.pv_format),
        largest_rounded(r.v_max, "int8" if r.pv_format == "u8" else r.pv_format),
    )
    total = keys * p * v
    fp16 = r.accumulator in ("fp8_f16", "fp16")
    if total <= (FP16_MAX if fp16 else INT32_MAX if r.accumulator == "int32" else math.inf):
        return []
    what = f"keys · P_r · V_r = {keys} · {p:g} · {v:g} = {total:g}"
    if fp16:
        return [f"{what} (after rounding to {r.pv_format}) overflows FP16 sums ({FP16_MAX:g})"]
    return [f"{what} overflows INT32 sums"]

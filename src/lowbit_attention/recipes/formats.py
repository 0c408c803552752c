"""The number formats, bit for bit: every function takes float32 and returns float32 holding numbers of the format.

Rounding is to nearest, ties to even. Conversions saturate, as the hardware's ``cvt.rn.satfinite`` does. NaN stays
NaN, so a non-finite input shows in the output instead of turning into a plausible number.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
E5M2_MAX = 57344.0
FP16_MAX = 65504.0
FP32_MAX = torch.finfo(torch.float32).max

_FP32_FRACTION_BITS = 23
_EXPONENT_MASK = 0x7F800000
_FP64_BIAS, _FP64_FRACTION_BITS = 1023, 52


def round_int(x: Tensor, largest: int, smallest: int | None = None) -> Tensor:
    """Nearest integer, clamped to ``smallest…largest`` (``−largest`` if not given)."""
    return torch.round(x).clamp_(-largest if smallest is None else smallest, largest)


def round_float(x: Tensor, fraction_bits: int, min_exponent: int, largest: float) -> Tensor:
    """Round to a binary format with ``fraction_bits``, smallest normal ``2^min_exponent`` and that largest number.

    Adding and subtracting ``1.5 · 2^(e + 23 − fraction_bits)``, with e the exponent of x (at least that of the
    smallest normal, which gives the subnormals), leaves float32's own rounding at the wanted bit.
    """
    x = x.clamp(-largest, largest)
    power = x.view(torch.int32).bitwise_and(_EXPONENT_MASK).view(torch.float32)
    shift = power.clamp_(min=2.0**min_exponent).mul_(1.5 * 2.0 ** (_FP32_FRACTION_BITS - fraction_bits))
    return x.add_(shift).sub_(shift)


def round_e4m3(x: Tensor) -> Tensor:
    """E4M3: 3 fraction bits, normal from 2⁻⁶, subnormal from 2⁻⁹, largest 448."""
    return round_float(x, fraction_bits=3, min_exponent=-6, largest=E4M3_MAX)


def round_e5m2(x: Tensor) -> Tensor:
    """E5M2: 2 fraction bits, normal from 2⁻¹⁴, subnormal from 2⁻¹⁶, largest 57344."""
    return round_float(x, fraction_bits=2, min_exponent=-14, largest=E5M2_MAX)


def round_fp16(x: Tensor) -> Tensor:
    """FP16: 10 fraction bits, largest 65504."""
    return x.clamp(-FP16_MAX, FP16_MAX).half().float()


def power_of_two(exponent: Tensor) -> Tensor:
    """``2^exponent`` in float64, exactly, for integers in −1022…1023.

    (``torch.ldexp`` takes the power in the *default* dtype: too small a one overflows.)
    """
    return (exponent.to(torch.int64) + _FP64_BIAS << _FP64_FRACTION_BITS).view(torch.float64)


def truncate_fraction(x: Tensor, fraction_bits: int) -> Tensor:
    """Drop (toward zero) all but the first ``fraction_bits`` of float32's 23; 13 gives FP22. Works in place.

    Infinities stay; a NaN whose payload sits in the dropped bits alone would become infinite, still not finite.
    """
    mask = -(1 << (_FP32_FRACTION_BITS - fraction_bits))
    x.view(torch.int32).bitwise_and_(mask)
    return x

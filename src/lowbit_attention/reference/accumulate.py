"""Sums of P·V as the tensor cores make them.

`accumulate` adds the product of a few keys to a running sum. What the sum loses on the way depends on the recipe's
accumulator and on the machine's `AccumulatorModel`.

On an H200 (bit for bit, see tests/cpu/reference/test_h200.py):

- FP8 wgmma: the accumulator and the 32 products are truncated toward zero at 13 bits below the largest exponent among
  them and added exactly; a product's exponent is the sum of its operands' exponents, so 1.75 · 1.75 counts as 2⁰. The
  f32 result keeps 13 fraction bits (truncated), the f16 result is rounded to nearest even.
- FP8 mma.sync is two FP16 MMAs and an addition: one sums from zero the keys whose number mod 4 is 0 or 1, the next adds
  those with 2 or 3, and an ordinary FADD or HADD2 adds that to the accumulator.
- FP16 MMA: the same alignment at 25 bits below the largest exponent; the f32 result keeps 23 fraction bits (truncated),
  the f16 result is rounded to nearest even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipes.formats import power_of_two, truncate_fraction
from ..recipes.machine import AccumulatorModel, Fidelity
from ..recipes.options import Accumulator
from ..recipes.rules import MMA_DEPTH
from .arithmetic import EXACT_BITS

FP16_MMA_DEPTH = 16
FP16_MMA_ALIGN_BITS = 25
FP8_MMA_ALIGN_BITS = 13

E4M3_MIN_EXPONENT = -6
"""Exponent of E4M3's subnormals; FP16's and E5M2's is −14."""
FP16_MIN_EXPONENT = -14

_EXACT_INT_KEYS = 512
"""Keys whose integer sum float32 holds exactly: 512 · 255 · 127 < 2^24."""
_CHUNK_ELEMENTS = 1 << 19
_CHUNK_ELEMENTS_CUDA = 1 << 27
"""Products held at once by the instruction fidelity: what a core's cache holds; on a GPU 1 GiB of float64."""
_SMALLEST_POWER = 2.0**-100
"""Least of the terms' largest exponents, and its inverse the most: all terms are zero, or the accumulator is infinite.
(No product is below 2^-48; an accumulator below 2^-100 has nothing left to tell.)"""


def accumulate(
    acc: Tensor,
    p: Tensor,
    v: Tensor,
    kind: Accumulator,
    model: AccumulatorModel,
    fidelity: Fidelity,
    min_exponent: int = E4M3_MIN_EXPONENT,
    bits: int = EXACT_BITS,
) -> None:
    """Add ``p @ v`` to ``acc``, in place, in the accumulator's arithmetic.

    Args:
        acc: the running sum, ``[S, R, Dv]``; float64 if the model is lossless, else float32.
        p: ``[S, R, keys]`` float32, numbers of P's format.
        v: ``[S, keys, Dv]`` float32, numbers of V's format.
        min_exponent: the exponent of the operands' subnormals. bits: the operands' significant bits.
    """
    if model.lossless:
        acc.baddbmm_(p.double(), v.double())
    elif kind == "int32" and p.shape[-1] > _EXACT_INT_KEYS:
        acc.add_(torch.bmm(p.double(), v.double()).float())
    elif kind in ("fp32", "int32"):
        _add_product(acc, p, v, bits)
    else:
        depth = FP16_MMA_DEPTH if kind == "fp16" else MMA_DEPTH
        for start in range(0, p.shape[-1], depth):
            operands = p[..., start : start + depth], v[..., start : start + depth, :]
            if fidelity == "instruction":
                acc.copy_(_instruction(acc, *operands, kind, model, min_exponent))
            else:
                _step(acc, *operands, kind, model, bits)


def round_to_accumulator(x: Tensor, kind: Accumulator, model: AccumulatorModel) -> Tensor:
    """What is left of ``x`` when it is written to the accumulator by ordinary arithmetic (a rescale)."""
    if kind in ("fp8_f16", "fp16") and not model.lossless:
        return x.half().float()
    return x


def _add_product(acc: Tensor, p: Tensor, v: Tensor, bits: int) -> None:
    """Add ``p @ v`` to ``acc`` in float32, in place (see `arithmetic`)."""
    if bits <= EXACT_BITS:
        acc.baddbmm_(p, v)
    else:
        acc.copy_(torch.baddbmm(acc.double(), p.double(), v.double()))


def _step(acc: Tensor, p: Tensor, v: Tensor, kind: Accumulator, model: AccumulatorModel, bits: int) -> None:
    """One instruction, its products summed in float32, then truncated or rounded as its result is."""
    if kind == "fp8_f16" and model.fp8_by_fp16:
        total = torch.zeros_like(acc)
        for keys in _fp16_halves(p.shape[-1], p.device):
            total = total.baddbmm(p[..., keys], v[..., keys, :]).half().float()
        acc.copy_((acc + total).half())
        return
    _add_product(acc, p, v, bits)
    if kind in ("fp8_f16", "fp16"):
        acc.copy_(acc.half())
    elif model.f32_fraction_bits is not None:
        truncate_fraction(acc, model.f32_fraction_bits)


def _instruction(
    acc: Tensor, p: Tensor, v: Tensor, kind: Accumulator, model: AccumulatorModel, min_exponent: int
) -> Tensor:
    """One instruction, product by product; the new accumulator as float32 (holding FP16 numbers for FP16 sums)."""
    f16 = kind in ("fp8_f16", "fp16")
    if kind == "fp16":
        return _fp16_mma(acc, p, v, f16, FP16_MIN_EXPONENT)
    if model.fp8_by_fp16:
        total = torch.zeros_like(acc)
        for keys in _fp16_halves(p.shape[-1], p.device):
            if len(keys):  # (the last keys of a sequence may leave nothing for the second)
                total = _fp16_mma(total, p[..., keys], v[..., keys, :], f16, FP16_MIN_EXPONENT)
        return _to_fp16(acc.double() + total.double()) if f16 else acc + total
    if model.fp8_align_bits is None:
        raise ValueError(f"{model} says nothing about FP8 instructions")
    exact = _aligned_sum(acc, p, v, model.fp8_align_bits, min_exponent)
    return _to_fp16(exact) if f16 else _truncate(exact, model.f32_fraction_bits or 23)


def _fp16_halves(keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The keys that the two FP16 MMAs of an emulated FP8 MMA sum: registers unpack to bytes 0, 1 and bytes 2, 3."""
    number = torch.arange(keys, dtype=torch.int64, device=device)
    return number[number % 4 < 2], number[number % 4 >= 2]


def _fp16_mma(acc: Tensor, p: Tensor, v: Tensor, f16: bool, min_exponent: int) -> Tensor:
    exact = _aligned_sum(acc, p, v, FP16_MMA_ALIGN_BITS, min_exponent)
    return _to_fp16(exact) if f16 else _truncate(exact, 23)


def _aligned_sum(acc: Tensor, p: Tensor, v: Tensor, align_bits: int, min_exponent: int) -> Tensor:
    """``acc + p @ v``, exactly, every term truncated toward zero at ``2^(e_max − align_bits)``; ``[S, R, Dv]``.

    Products of 8-bit floats and the few bits of their aligned sums are exact in float32, others in float64.
    """
    dtype = torch.float32 if align_bits <= FP8_MMA_ALIGN_BITS else torch.float64
    out = torch.empty(acc.shape, dtype=dtype, device=acc.device)
    p_power, v_power = (torch.where(x == 0, 0.0, _power(x).clamp_(min=2.0**min_exponent)).to(dtype) for x in (p, v))
    acc_power = _power(acc).to(dtype)
    p, v, acc = p.to(dtype), v.to(dtype), acc.to(dtype)
    elements = _CHUNK_ELEMENTS_CUDA if acc.is_cuda else _CHUNK_ELEMENTS
    rows = max(1, elements // max(1, v.shape[-2] * v.shape[-1]))
    slices = max(1, rows // max(1, acc.shape[1]))
    for s in range(0, acc.shape[0], slices):
        of_v = slice(s, s + slices)
        for start in range(0, acc.shape[1], rows):
            part = (of_v, slice(start, start + rows))
            largest = (p_power[part][..., None] * v_power[of_v, None]).amax(dim=2)
            largest = torch.maximum(largest, acc_power[part]).clamp_(_SMALLEST_POWER, 1 / _SMALLEST_POWER)
            quantum = largest.mul_(2.0**-align_bits)
            inverse = quantum.reciprocal()
            products = (p[part][..., None] * v[of_v, None]).mul_(inverse[:, :, None]).trunc_()
            total = products.sum(dim=2).add_((acc[part] * inverse).trunc_())
            torch.mul(total, quantum, out=out[part])
    return out


def _power(x: Tensor) -> Tensor:
    """``2^⌊log2 |x|⌋`` of float32 numbers, 0 of zeros and subnormal ones."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def _to_fp16(x: Tensor) -> Tensor:
    """Float32 or float64 to the nearest FP16 number, ties to even, as float32."""
    if x.dtype == torch.float32:
        return x.half().float()
    # (torch's own cast of float64 rounds to float32 on the way)
    exponent = (torch.frexp(x).exponent - 1).clamp(min=FP16_MIN_EXPONENT)
    quantum = power_of_two(exponent - 10)
    return (torch.round(x / quantum) * quantum).half().float()


def _truncate(x: Tensor, fraction_bits: int) -> Tensor:
    """Float32 or float64 to float32 that keeps ``fraction_bits``, truncated toward zero."""
    if x.dtype == torch.float32:
        truncate_fraction(x, fraction_bits)
        return x
    return (x.view(torch.int64) & -(1 << (52 - fraction_bits))).view(torch.float64).float()

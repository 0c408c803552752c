"""Sums of P·V as the tensor cores make them (algorithm notes, "The accumulators").

`accumulate` adds the product of a few keys to a running sum. What the sum loses on the way depends on the recipe's
accumulator and on the machine's `AccumulatorModel`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..machine import AccumulatorModel, Fidelity
from ..recipe import Accumulator
from .formats import truncate_fraction

FP8_MMA_DEPTH = 32
"""Keys one FP8 MMA sums (``m16n8k32``; a wgmma's k is 32, too)."""
FP16_MMA_DEPTH = 16

_EXACT_INT_KEYS = 512
"""Keys whose integer sum float32 holds exactly: 512 · 255 · 127 < 2^24."""

_CHUNK_ELEMENTS = 1 << 24
"""Products held at once by the instruction fidelity: 64 MiB of float32."""


def accumulate(
    acc: Tensor, p: Tensor, v: Tensor, kind: Accumulator, model: AccumulatorModel, fidelity: Fidelity
) -> None:
    """Add ``p @ v`` to ``acc``, in place, in the accumulator's arithmetic.

    Args:
        acc: the running sum, ``[S, R, Dv]``; float64 if the model is lossless, else float32.
        p: ``[S, R, keys]`` float32, numbers of P's format.
        v: ``[S, keys, Dv]`` float32, numbers of V's format.
    """
    if model.lossless:
        acc.baddbmm_(p.double(), v.double())
    elif kind == "int32" and p.shape[-1] > _EXACT_INT_KEYS:
        acc.add_(torch.bmm(p.double(), v.double()).float())
    elif kind in ("fp32", "int32"):
        acc.baddbmm_(p, v)
    else:
        depth = FP16_MMA_DEPTH if kind == "fp16" else FP8_MMA_DEPTH
        align = None if kind == "fp16" else model.align_fraction_bits
        for start in range(0, p.shape[-1], depth):
            operands = p[..., start : start + depth], v[..., start : start + depth, :]
            if fidelity == "instruction":
                acc.copy_(_write_back(_instruction(acc, *operands, align), kind, model))
            elif kind in ("fp8_f16", "fp16"):
                acc.baddbmm_(*operands)
                acc.copy_(acc.half())
            else:
                acc.baddbmm_(*operands)
                if model.f32_fraction_bits is not None:
                    truncate_fraction(acc, model.f32_fraction_bits)


def round_to_accumulator(x: Tensor, kind: Accumulator, model: AccumulatorModel) -> Tensor:
    """What is left of ``x`` when it is written to the accumulator by ordinary arithmetic (a rescale)."""
    if kind in ("fp8_f16", "fp16") and not model.lossless:
        return x.half().float()
    return x


def _write_back(total: Tensor, kind: Accumulator, model: AccumulatorModel) -> Tensor:
    """What an instruction writes of its exact (float64) sum: FP16 to nearest even, or f32 with its kept bits."""
    if kind in ("fp8_f16", "fp16"):
        return total.to(torch.float16)
    if model.f32_fraction_bits is None:
        return total.float()
    mantissa, exponent = torch.frexp(total)  # ½ ≤ |mantissa| < 1: one bit more than the fraction's
    bits = model.f32_fraction_bits + 1
    return torch.ldexp(torch.trunc(torch.ldexp(mantissa, torch.tensor(bits))), exponent - bits).float()


def _instruction(acc: Tensor, p: Tensor, v: Tensor, align_bits: int | None) -> Tensor:
    """One instruction, product by product, before its result is written back; float64.

    The accumulator and all products are truncated toward zero at ``2^(e_max − align_bits)``, ``e_max`` being the
    largest (normalised) exponent among them, and added exactly.
    """
    if align_bits is None:
        return acc.double() + p.double() @ v.double()
    out = torch.empty(acc.shape, dtype=torch.float64, device=acc.device)
    rows = max(1, _CHUNK_ELEMENTS // max(1, v.shape[-2] * v.shape[-1]))
    for s in range(acc.shape[0]):
        for start in range(0, acc.shape[1], rows):
            part = slice(start, start + rows)
            products = p[s, part, :, None] * v[s, None]  # 4 + 4 significant bits: exact in float32
            terms = torch.cat([acc[s, part, None], products], dim=1)
            out[s, part] = _align_and_add(terms, align_bits)
    return out


def _align_and_add(terms: Tensor, align_bits: int) -> Tensor:
    """Sum over dim 1 of terms truncated toward zero at ``2^(e_max − align_bits)``."""
    largest = terms.abs().amax(dim=1, keepdim=True)
    exponent = torch.frexp(largest).exponent - 1  # largest = m · 2^(exponent), 1 ≤ m < 2
    terms = terms.double()
    quantum = torch.ldexp(torch.ones_like(largest, dtype=torch.float64), exponent - align_bits)
    return (torch.trunc(terms / quantum) * quantum).sum(dim=1)

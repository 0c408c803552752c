"""Matrix products that are what they say, whatever precision the caller allows his model's.

`torch.set_float32_matmul_precision` and ``torch.backends.*.fp32_precision`` let float32 products round their operands
to TF32 (11 significant bits) or bfloat16 (8). They belong to the process, other threads run under them, too, and torch
refuses to read one of them where the other was set. So nothing here looks at them:

- operands of at most 8 bits (INT8 and INT4 numbers, E4M3, E5M2) lose nothing by either rounding: a float32 product;
- all others are multiplied in float64, which no setting touches, and rounded once;
- exact attention on GPUs, where float64 may be 64 times slower, multiplies 16-bit numbers, which TF32 holds, and P in
  two parts that it holds.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

EXACT_BITS = 8
"""Significant bits that survive every rounding a float32 product may be given: bfloat16's."""


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Within the block autocast rounds no float32 operand. It belongs to the thread, and torch gives it back."""
    context: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return context


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of float32 or float64 ``[S, n, m]`` and ``[S, m, p]`` in their dtype, every digit counted."""
    return torch.bmm(a.double(), b.double()).to(a.dtype)


def split_product(p: Tensor, v: Tensor) -> Tensor:
    """``p @ v`` in their dtype, float64 or float32; in float32 ``v`` must be 16-bit numbers.

    P is cut into 11 significant bits and the rest, whose own rounding to 11 bits moves P by less than 2⁻²¹ of it.
    """
    if p.dtype == torch.float64:
        return torch.bmm(p, v)
    high = p.view(torch.int32).bitwise_and(-(1 << 13)).view(torch.float32)
    return torch.bmm(high, v).baddbmm_(p - high, v)

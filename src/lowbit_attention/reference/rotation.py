"""The orthonormal Hadamard rotation of the head dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..recipes.formats import FP32_MAX


def hadamard_size(head_dim: int) -> int:
    """The power of two that ``head_dim`` is padded to before it is rotated."""
    return 1 << max(0, head_dim - 1).bit_length()


def rotate(x: Tensor) -> Tensor:
    """``x H`` with H the orthonormal (Sylvester) Hadamard matrix; the last dimension is zero-padded to a power of two.

    Rotating both Q and K leaves Q·Kᵀ unchanged, and spreads a few large channels over all of them.

    Args:
        x: ``[..., D]`` float32.
    Returns:
        ``[..., hadamard_size(D)]`` float32, saturated to float32's range.
    """
    size = hadamard_size(x.shape[-1])
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1])) / size  # a power of two: no sum of `size` can overflow
    shape = x.shape
    width = 1
    while width < size:  # butterflies: pairs of runs of `width` become their sum and difference
        a, b = x.reshape(-1, size // (2 * width), 2, width).unbind(dim=2)
        x = torch.stack((a + b, a - b), dim=2)
        width *= 2
    x = x.reshape(shape)
    return torch.where(x.isfinite(), (x * math.sqrt(size)).clamp(-FP32_MAX, FP32_MAX), x)

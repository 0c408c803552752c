"""Rotary position embedding, as Llama and the video transformers use it."""

from __future__ import annotations

import torch
from torch import Tensor


def angles(positions: Tensor, dim: int, base: float) -> Tensor:
    """Angles ``[N, dim / 2]`` of ``positions`` ``[N]``: ``position · base^(−2i / dim)``, float32."""
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    return positions.float()[:, None] * base**-exponent


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Turn each pair ``(x[i], x[i + D/2])`` of ``x`` ``[B, H, N, D]`` by its ``angle`` ``[N, D / 2]``; x's dtype.

    >>> x = torch.randn(1, 2, 5, 8)
    >>> turned = turn(x, angles(torch.arange(5), 8, 10_000.0))
    >>> bool(torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5))
    True
    """
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)

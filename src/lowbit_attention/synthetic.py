"""Named families of synthetic Q, K and V, each with one property that breaks some quantised attention.

Every channel bias sits on 1 / 16 of a head's channels, chosen per head, with random signs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InvalidArgumentError

Make = Callable[[torch.Generator, tuple[int, int, int, int]], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Family:
    """A named family: ``make(generator, (B, H, N, D))`` gives Q, K and V in float32, HND."""

    name: str
    summary: str
    make: Make


def _randn(g: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float32, device="cpu")


def _bias(g: torch.Generator, shape: tuple[int, int, int, int], size: float) -> Tensor:
    """``±size`` on 1 / 16 of the channels of each head, ``[B, H, 1, D]``."""
    batch, heads, _, dim = shape
    order = torch.rand((batch, heads, 1, dim), generator=g, dtype=torch.float32, device="cpu").argsort(dim=-1)
    sign = torch.randint(0, 2, (batch, heads, 1, dim), generator=g, dtype=torch.int64, device="cpu").float() * 2 - 1
    return torch.where(order < max(1, dim // 16), size * sign, 0.0)


def rope(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding of ``x`` ``[..., N, D]``, D even: channel c turns with channel c + D/2."""
    length, dim = x.shape[-2:]
    if dim % 2:
        raise InvalidArgumentError(f"rotary embedding needs an even head_dim, got {dim}")
    half = dim // 2
    turns = torch.arange(half, dtype=x.dtype, device=x.device) / half
    angle = torch.arange(length, dtype=x.dtype, device=x.device)[:, None] * base**-turns
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _biased(q_bias: float, k_bias: float, v_bias: float, rotary: bool = False) -> Make:
    def make(g: torch.Generator, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (_randn(g, shape) + _bias(g, shape, size) for size in (q_bias, k_bias, v_bias))
        return (rope(q), rope(k), v) if rotary else (q, k, v)

    return make


def _outlier_tokens(g: torch.Generator, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_randn(g, shape) for _ in range(3))
    order = torch.rand((*shape[:3], 1), generator=g, dtype=torch.float32, device="cpu").argsort(dim=2)
    factor = torch.where(order < max(1, shape[2] // 500), 10.0, 1.0)
    return q, k * factor, v * factor


def _peaked(g: torch.Generator, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_randn(g, shape) for _ in range(3))
    return 4.0 * q, k, v


def _sink(g: torch.Generator, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, dim = shape
    q, k, v = (_randn(g, shape) for _ in range(3))
    direction = torch.nn.functional.normalize(_randn(g, (batch, heads, 1, dim)), dim=-1)
    shared = math.sqrt(dim)  # as long as the rest of a query
    # nine times the mass of the other keys: |q|² is 2d, so their logits are N(0, 2) and E[eˣ] = e
    logit = math.log(9 * length) + 1.0
    q = q + shared * direction
    k[:, :, :1] = logit * math.sqrt(dim) / shared * direction
    v[:, :, :1] = 0.1 * v[:, :, :1]
    return q, k, v


def _v_mean(g: torch.Generator, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_randn(g, shape) for _ in range(3))
    return q, k, v + 4.0


def _local(g: torch.Generator, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_randn(g, shape) for _ in range(3))
    dim = shape[3]
    carried = max(2, dim // 4 * 2)  # half of the channels carry the position
    slow = torch.zeros(*shape[:3], carried, dtype=torch.float32, device="cpu")
    slow[..., : carried // 2] = 1.0
    position = rope(slow, base=500.0) * math.sqrt(16.0 * math.sqrt(dim) / (carried // 2))  # logit 16 at distance 0
    q[..., :carried] = 0.25 * q[..., :carried] + position
    k[..., :carried] = 0.25 * k[..., :carried] + position
    return q, k, v


FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Family("normal", "independent N(0, 1) everywhere", _biased(0, 0, 0)),
        Family("k_bias", "K has channels around ±8", _biased(0, 8, 0)),
        Family("qk_bias", "K has channels around ±8, Q around ±4", _biased(4, 8, 0)),
        Family("qkv_bias", "K and V have channels around ±8, Q around ±4", _biased(4, 8, 8)),
        Family("rope_bias", "qk_bias, turned by rotary position embedding", _biased(4, 8, 0, rotary=True)),
        Family("outlier_tokens", "1 token in 500 of K and V is ten times larger", _outlier_tokens),
        Family("peaked", "Q four times larger: few keys take the mass", _peaked),
        Family("sink", "key 0 takes about 90 % of the mass, its V is small", _sink),
        Family("v_mean", "all of V around 4", _v_mean),
        Family("local", "logits fall with the distance of query and key", _local),
    )
}
"""Every synthetic family, by name."""


def make(
    family: str,
    *,
    batch: int = 1,
    heads: int = 8,
    length: int = 1024,
    head_dim: int = 128,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V ``[batch, heads, length, head_dim]`` (float32, on the CPU) of a named family.

    >>> q, k, v = make("k_bias", heads=2, length=64, head_dim=32)
    >>> tuple(q.shape)
    (1, 2, 64, 32)

    Raises:
        InvalidArgumentError: for an unknown family.
    """
    if family not in FAMILIES:
        raise InvalidArgumentError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    generator = torch.Generator().manual_seed(seed)
    return FAMILIES[family].make(generator, (batch, heads, length, head_dim))

"""Named families of synthetic Q, K and V, each with one property that breaks some quantised attention.

Every channel bias sits on 1 / 16 of a head's channels, chosen per head, with random signs. The families of channels
(`CHANNEL_FAMILIES`) look alike anywhere in a sequence; those of sequences, whose tokens are not exchangeable, are in
`synthetic_sequences`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from . import synthetic_sequences as sequences
from .synthetic_sequences import Shape, Triple
from .synthetic_sequences import channel_bias as _bias
from .synthetic_sequences import normal as _randn

Make = Callable[[torch.Generator, Shape], Triple]


@dataclass(frozen=True)
class Family:
    """A named family: ``make(generator, (B, H, N, D))`` gives Q, K and V in float32, HND, on the generator's device."""

    name: str
    summary: str
    make: Make


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
    def make(g: torch.Generator, shape: Shape) -> Triple:
        q, k, v = (_randn(g, shape) + _bias(g, shape, size) for size in (q_bias, k_bias, v_bias))
        return (rope(q), rope(k), v) if rotary else (q, k, v)

    return make


def _outlier_tokens(g: torch.Generator, shape: Shape) -> Triple:
    q, k, v = (_randn(g, shape) for _ in range(3))
    order = torch.rand((*shape[:3], 1), generator=g, dtype=torch.float32, device=g.device).argsort(dim=2)
    factor = torch.where(order < max(1, shape[2] // 500), 10.0, 1.0)
    return q, k * factor, v * factor


def _peaked(g: torch.Generator, shape: Shape) -> Triple:
    q, k, v = (_randn(g, shape) for _ in range(3))
    return 4.0 * q, k, v


def _v_mean(g: torch.Generator, shape: Shape) -> Triple:
    q, k, v = (_randn(g, shape) for _ in range(3))
    return q, k, v + 4.0


def _local(g: torch.Generator, shape: Shape) -> Triple:
    q, k, v = (_randn(g, shape) for _ in range(3))
    dim = shape[3]
    carried = max(2, dim // 4 * 2)  # half of the channels carry the position
    slow = torch.zeros(*shape[:3], carried, dtype=torch.float32, device=g.device)
    slow[..., : carried // 2] = 1.0
    position = rope(slow, base=500.0) * math.sqrt(16.0 * math.sqrt(dim) / (carried // 2))  # logit 16 at distance 0
    q[..., :carried] = 0.25 * q[..., :carried] + position
    k[..., :carried] = 0.25 * k[..., :carried] + position
    return q, k, v


_CHANNELS = (
    Family("normal", "independent N(0, 1) everywhere", _biased(0, 0, 0)),
    Family("k_bias", "K has channels around ±8", _biased(0, 8, 0)),
    Family("qk_bias", "K has channels around ±8, Q around ±4", _biased(4, 8, 0)),
    Family("qkv_bias", "K and V have channels around ±8, Q around ±4", _biased(4, 8, 8)),
    Family("rope_bias", "qk_bias, turned by rotary position embedding", _biased(4, 8, 0, rotary=True)),
    Family("outlier_tokens", "1 token in 500 of K and V is ten times larger", _outlier_tokens),
    Family("peaked", "Q four times larger: few keys take the mass", _peaked),
    Family("sink", "key 0 takes about 90 % of the mass, its V is small", sequences.sink),
    Family("v_mean", "all of V around 4", _v_mean),
    Family("local", "logits fall with the distance of query and key", _local),
)
_SEQUENCES = (
    Family("drift", "K and V drift along the sequence, V's channels from −3 to 3 or back", sequences.drift),
    Family("blocky", "V is nearly constant over each 300 tokens", sequences.blocky),
    Family("sink_whole", "key 0 takes about 99.9 % of the mass, its V is small", sequences.sink_whole),
    Family("sink_middle", "four keys in the middle take about 90 %, their V is small", sequences.sink_middle),
    Family("sink_last", "the last key takes about 90 %, its V is small", sequences.sink_last),
    Family("sinks", "eight keys anywhere take about 90 % together, their V is small", sequences.sinks),
    Family("sink_eighth", "key 0 takes about 90 % of every eighth 128 queries, its V is small", sequences.sink_eighth),
    Family("sink_zero", "key 0 takes about 90 %, its V is 0", sequences.sink_zero),
    Family("sink_v_bias", "sink_middle in a V with channels around ±8", sequences.sink_v_bias),
    Family("heavy_tokens", "tokens of K and V of log-normal size", sequences.heavy_tokens),
    Family("grid", "every 16th token has other K (channels around ±8) and three times larger V", sequences.grid),
    Family("two_segments", "512 tokens (or a quarter) of text, then an image, of other means and sizes",
           sequences.two_segments),
)  # fmt: skip

FAMILIES: dict[str, Family] = {f.name: f for f in (*_CHANNELS, *_SEQUENCES)}
"""Every synthetic family, by name."""

CHANNEL_FAMILIES: tuple[str, ...] = tuple(f.name for f in _CHANNELS)
"""Those that the papers' ablations are shown on."""


def make(
    family: str,
    *,
    batch: int = 1,
    heads: int = 8,
    length: int = 1024,
    head_dim: int = 128,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V ``[batch, heads, length, head_dim]`` (float32) of a named family.

    The numbers follow from the seed and from the kind of ``device``, whose own generator draws them.

    >>> q, k, v = make("k_bias", heads=2, length=64, head_dim=32)
    >>> tuple(q.shape)
    (1, 2, 64, 32)

    Raises:
        InvalidArgumentError: for an unknown family.
    """
    if family not in FAMILIES:
        raise InvalidArgumentError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    generator = torch.Generator(device).manual_seed(seed)
    return FAMILIES[family].make(generator, (batch, heads, length, head_dim))

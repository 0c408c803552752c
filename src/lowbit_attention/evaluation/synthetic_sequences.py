"""Synthetic families whose tokens are not exchangeable: drifts, blocks, sinks, sizes, grids, segments.

What real sequences have and independent tokens do not: neighbours that are alike, and a few tokens unlike all others.
`synthetic.FAMILIES` names them; every function takes a generator and ``(B, H, N, D)`` and gives Q, K and V in float32
on the generator's device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]
Triple = tuple[Tensor, Tensor, Tensor]

BLOCK_TOKENS = 300
"""Of one level of V in `blocky`: a few rows of an image's patches, and no multiple of any tile."""
SEEING_TOKENS = 128
"""Queries that see a sink together in `sink_eighth`: one query tile of Ada's kernels, two of Hopper's."""
GRID_STEP = 16
"""An image 16 patches wide: divides the key tiles, and the steps of samples of K at most lengths."""
TEXT_TOKENS = 512
"""Of a prompt, as Flux pads it."""

SINK_V = 0.01
"""Of a sink's V beside the others': language models' is 1 to 10 % (`sink` has the latter)."""


def normal(g: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Independent N(0, 1)."""
    return torch.randn(shape, generator=g, dtype=torch.float32, device=g.device)


def channel_bias(g: torch.Generator, shape: Shape, size: float) -> Tensor:
    """``±size`` on 1 / 16 of the channels of each head, ``[B, H, 1, D]``."""
    batch, heads, _, dim = shape
    order = torch.rand((batch, heads, 1, dim), generator=g, dtype=torch.float32, device=g.device).argsort(dim=-1)
    return torch.where(order < max(1, dim // 16), size * _signs(g, (batch, heads, 1, dim)), 0.0)


def _signs(g: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 2, shape, generator=g, dtype=torch.int64, device=g.device).float() * 2 - 1


def _three_normal(g: torch.Generator, shape: Shape) -> Triple:
    return normal(g, shape), normal(g, shape), normal(g, shape)


def drift(g: torch.Generator, shape: Shape) -> Triple:
    """A video whose scene changes slowly, or features that grow with the position.

    Each channel's mean moves along the sequence, in K from −1 to 1 and in V from −3 to 3, or back. Sums over
    neighbouring keys then have one sign, so that what truncation takes from each product adds up.
    """
    q, k, v = _three_normal(g, shape)
    batch, heads, length, dim = shape
    at = torch.linspace(-1, 1, length, dtype=torch.float32, device=g.device)[:, None]
    return q, k + at * _signs(g, (batch, heads, 1, dim)), v + 3.0 * at * _signs(g, (batch, heads, 1, dim))


def blocky(g: torch.Generator, shape: Shape) -> Triple:
    """Neighbouring pixels of a flat region: V repeats itself over `BLOCK_TOKENS` tokens, up to a tenth.

    Key tiles have large means although the sequence has none.
    """
    q, k, v = _three_normal(g, shape)
    batch, heads, length, dim = shape
    levels = normal(g, (batch, heads, -(-length // BLOCK_TOKENS), dim))
    return q, k, levels.repeat_interleave(BLOCK_TOKENS, dim=2)[:, :, :length] + 0.1 * v


def heavy_tokens(g: torch.Generator, shape: Shape) -> Triple:
    """Tokens of very different size, as after layers without a norm on K and V.

    Each token of K and of V is e^N(0, ½²) times longer, so that one in 10⁴ is 6.4 times as long as the median.
    """
    q, k, v = _three_normal(g, shape)
    return q, k * (0.5 * normal(g, (*shape[:3], 1))).exp(), v * (0.5 * normal(g, (*shape[:3], 1))).exp()


def grid(g: torch.Generator, shape: Shape) -> Triple:
    """The first patch of each row of an image `GRID_STEP` wide is unlike the rest (a border, a token of registers).

    Its K has channels around ±8 and its V is three times larger. A sample of K at regular steps can meet nothing but
    such tokens, or none.
    """
    q, k, v = _three_normal(g, shape)
    on_grid = (torch.arange(shape[2], dtype=torch.int64, device=g.device) % GRID_STEP == 0)[:, None]
    return q, k + on_grid * channel_bias(g, shape, 8.0), torch.where(on_grid, 3.0 * v, v)


def two_segments(g: torch.Generator, shape: Shape) -> Triple:
    """Joint attention of text and image (Flux, HunyuanVideo): the prompt first, with means and sizes of its own.

    Text, `TEXT_TOKENS` or a quarter of the sequence: Q and K have channels around ±4 and ±8, V is half as large and has
    channels around ±4. Image: other channels of K around ±4. One mean of K and one scale of V serve both badly.
    """
    q, k, v = _three_normal(g, shape)
    text = (torch.arange(shape[2], dtype=torch.int64, device=g.device) < min(TEXT_TOKENS, -(-shape[2] // 4)))[:, None]
    q = q + text * channel_bias(g, shape, 4.0)
    k = k + torch.where(text, channel_bias(g, shape, 8.0), channel_bias(g, shape, 4.0))
    return q, k, torch.where(text, 0.5 * v + channel_bias(g, shape, 4.0), v)


# ---- attention sinks


def _with_sinks(
    g: torch.Generator,
    qkv: Triple,
    tokens: Tensor,
    *,
    share: float = 0.9,
    size_of_v: float = SINK_V,
    seeing: Tensor | None = None,
) -> Triple:
    """Make ``tokens`` (int64 ``[B, H, count]``) attention sinks that take ``share`` of a row's mass together.

    Every query that is ``seeing`` (bool, broadcastable to ``[B, H, N, 1]``; ``None``: all) is moved by a direction of
    the head's own, along which the sinks' K lie and the other keys do not. Their V becomes ``size_of_v`` times as
    large.
    """
    q, k, v = qkv
    batch, heads, length, dim = q.shape
    direction = torch.nn.functional.normalize(normal(g, (batch, heads, 1, dim)), dim=-1)
    shared = math.sqrt(dim)  # as long as the rest of a query
    # |q|² is 2d, so that the other keys' logits are N(0, 2), and E[eˣ] = e
    logit = math.log(share / (1 - share) * length / tokens.shape[2]) + 1.0
    q = q + shared * (direction if seeing is None else direction * seeing)
    at = tokens[..., None].expand(-1, -1, -1, dim)
    k = k.scatter(2, at, (logit * math.sqrt(dim) / shared * direction).expand(at.shape))
    return q, k, v.scatter(2, at, size_of_v * v.gather(2, at))


def _tokens(g: torch.Generator, shape: Shape, *tokens: int) -> Tensor:
    """The same tokens (those within the sequence) for every head, ``[B, H, count]``."""
    inside = sorted({min(max(0, token), shape[2] - 1) for token in tokens})
    return torch.tensor(inside, dtype=torch.int64, device=g.device).expand(*shape[:2], -1)


def _middle(g: torch.Generator, shape: Shape) -> Tensor:
    return _tokens(g, shape, *range(shape[2] // 2, shape[2] // 2 + 4))


def sink(g: torch.Generator, shape: Shape) -> Triple:
    """The first token of most language models: it takes 90 % of the mass and has next to nothing to say."""
    return _with_sinks(g, _three_normal(g, shape), _tokens(g, shape, 0), size_of_v=0.1)


def sink_whole(g: torch.Generator, shape: Shape) -> Triple:
    """A head that does nothing: all but a thousandth of the mass rests on the first token, so the output is its V."""
    return _with_sinks(g, _three_normal(g, shape), _tokens(g, shape, 0), share=0.999)


def sink_middle(g: torch.Generator, shape: Shape) -> Triple:
    """Separators, or the prompt's end before a long answer: four sinks that stand in no first tile."""
    return _with_sinks(g, _three_normal(g, shape), _middle(g, shape))


def sink_last(g: torch.Generator, shape: Shape) -> Triple:
    """A sink that comes when everything else has been summed (a class or register token at the end)."""
    return _with_sinks(g, _three_normal(g, shape), _tokens(g, shape, shape[2] - 1))


def sinks(g: torch.Generator, shape: Shape) -> Triple:
    """Register tokens, punctuation: eight sinks at places of the head's own (of fewer tokens, one in eight)."""
    order = torch.rand(shape[:3], generator=g, dtype=torch.float32, device=g.device).argsort(dim=-1)
    return _with_sinks(g, _three_normal(g, shape), order[..., : max(1, min(8, shape[2] // 8))])


def sink_eighth(g: torch.Generator, shape: Shape) -> Triple:
    """A sink that only some queries turn to: every eighth run of `SEEING_TOKENS`, other runs in the next head."""
    qkv = _three_normal(g, shape)
    batch, heads, length, _ = shape
    start = int(torch.randint(0, 8, (1,), generator=g, dtype=torch.int64, device=g.device))
    head = torch.arange(batch * heads, dtype=torch.int64, device=g.device).reshape(batch, heads, 1, 1)
    run = (torch.arange(length, dtype=torch.int64, device=g.device) // SEEING_TOKENS)[:, None]
    return _with_sinks(g, qkv, _tokens(g, shape, 0), seeing=(run + head + start) % 8 == 0)


def sink_zero(g: torch.Generator, shape: Shape) -> Triple:
    """A sink whose V is 0, as a learned sink's (gpt-oss): what it takes is taken from every other token."""
    return _with_sinks(g, _three_normal(g, shape), _tokens(g, shape, 0), size_of_v=0.0)


def sink_v_bias(g: torch.Generator, shape: Shape) -> Triple:
    """`sink_middle` where V has channels around ±8 and the sinks' V does not: V's mean is far from where rows end."""
    tokens = _middle(g, shape)
    q, k, v = _with_sinks(g, _three_normal(g, shape), tokens)
    others = torch.ones(shape[:3], dtype=torch.float32, device=g.device).scatter(2, tokens, 0.0)
    return q, k, v + others[..., None] * channel_bias(g, shape, 8.0)

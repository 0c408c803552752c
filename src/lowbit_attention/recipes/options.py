"""The small option types of a recipe: formats, accumulators, softmax maxima, token samples."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..errors import InvalidArgumentError, shown

Rotation = Literal["none", "hadamard"]
PVFormat = Literal["e4m3", "e5m2", "int8", "u8", "fp16", "fp32"]
Accumulator = Literal["fp32", "fp8_f32", "fp8_f16", "fp16", "int32"]
RowSum = Literal["unrounded", "rounded", "accumulator"]

MOST_SAMPLED = 1 << 16
"""Tokens of a sample, which are held at once: 64 times what a kernel takes, and all of most sequences."""


@dataclass(frozen=True)
class RunningMax:
    """The maximum of all keys seen so far: FlashAttention's online softmax."""

    def __str__(self) -> str:
        return "running"


@dataclass(frozen=True)
class TileMax:
    """Every key tile's own row maximum, so each tile uses the whole range of P's format."""

    def __str__(self) -> str:
        return "tile"


@dataclass(frozen=True)
class RestartedMax:
    """The running maximum, restarted at each promotion at ``max(M − slack, min(M, tile maximum + headroom))``.

    M is the maximum of all keys seen so far, in base-2 logits; ``slack`` (also base 2) bounds by ``2^slack`` the
    factor that the promoted sum is rescaled by. It keeps small terms apart from an attention sink's. With ``headroom``
    an interval that begins not far below M keeps M, which later tiles seldom exceed: fewer rescales.

    ``jump`` (base 2, too; ``None``: off) gives tiles with attention sinks intervals of their own. A tile *jumps* if in
    each of a warp's pairs of rows (r and r + 8) a maximum exceeds what was subtracted before by more than ``jump``; the
    first tile always does. All of that warp's sums are then promoted before it and after it. Its own sum being short,
    its P takes as much more of the format's range as leaves the sum no larger (`Recipe.jump_bits`). And with ``jump``
    an interval begins with M where that is at most ``headroom`` above its first tile's maximum, else with the latter:
    bits below a sink are lost to all other keys. After a tile that jumps, "before" is before that.
    """

    slack: float = 20.0
    headroom: float = 0.0
    jump: float | None = None

    def __post_init__(self) -> None:
        for name in ("slack", "headroom", "jump"):
            value = getattr(self, name)
            if name == "jump" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidArgumentError(f"{name}={shown(value)} is no number")
        if not 0 <= self.headroom <= self.slack:
            raise InvalidArgumentError(
                f"headroom={shown(self.headroom)}: a base-2 exponent in [0, slack={shown(self.slack)}]"
            )
        if not 0 < self.slack <= 60:
            raise InvalidArgumentError(
                f"slack={shown(self.slack)}: a base-2 exponent in (0, 60], or sums leave FP32's range"
            )
        if self.jump is not None and not 0 < self.jump <= 60:
            raise InvalidArgumentError(f"jump={shown(self.jump)}: a base-2 exponent in (0, 60]")

    def __str__(self) -> str:
        numbers = [self.slack, self.headroom] if self.headroom or self.jump is not None else [self.slack]
        if self.jump is not None:
            numbers.append(self.jump)
        short = (f"{x:g}" if float(f"{x:g}") == x else repr(x) for x in numbers)
        return f"restarted({';'.join(short)})"


SoftmaxMax = RunningMax | TileMax | RestartedMax


def parse_softmax_max(text: str) -> SoftmaxMax:
    """``running``, ``tile``, ``restarted``, ``restarted(20)``, ``restarted(20;4)`` or ``restarted(20;4;4)``."""
    if text == "running":
        return RunningMax()
    if text == "tile":
        return TileMax()
    number = r"([0-9.]+(?:e[+-]?[0-9]+)?)"
    if match := re.fullmatch(rf"restarted(?:\({number}(?:;{number}(?:;{number})?)?\))?", text):
        return RestartedMax(*(float(x) for x in match.groups() if x))
    raise InvalidArgumentError(f"{text!r} is no softmax maximum: 'running', 'tile' or 'restarted(20)'")


@dataclass(frozen=True)
class AllTokens:
    """Statistics over every valid token."""

    def __str__(self) -> str:
        return "all"


@dataclass(frozen=True)
class SampledTokens:
    """Statistics over ``count`` valid tokens, evenly spread: token ``⌊(i + ½) · n / count⌋`` for i < count.

    Exact for k̄ and v̄ (any constant vector is) and one pass cheaper; a scale taken from a sample saturates what the
    sample missed, unless the recipe leaves headroom.
    """

    count: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or not 1 <= self.count <= MOST_SAMPLED:
            raise InvalidArgumentError(
                f"count={shown(self.count)}: a positive number of tokens, at most {MOST_SAMPLED}"
            )

    def __str__(self) -> str:
        return f"sampled({self.count})"


TokenSample = AllTokens | SampledTokens


def parse_token_sample(text: str) -> TokenSample:
    """``all``, ``sampled`` or ``sampled(32)``."""
    if text == "all":
        return AllTokens()
    if match := re.fullmatch(r"sampled(?:\(([0-9]{1,99})\))?", text):
        return SampledTokens(int(match[1])) if match[1] else SampledTokens()
    raise InvalidArgumentError(f"{text!r} is no token sample: 'all' or 'sampled(32)'")

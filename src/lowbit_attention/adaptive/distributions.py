"""What Q, K and V look like before and after smoothing and rotation: histograms that add up, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..reference.rotation import rotate
from ..reference.smoothing import tile_mean, token_mean
from .documents import count_of, list_of, number_of
from .scoring import ScoredCall, spread

BINS = 192
_MOST_CHANNELS = 1 << 16
"""Of a summary in a file: more than any head has."""
_LINEAR, _LARGEST = 0.01, 500.0
_EDGE = math.asinh(_LARGEST / _LINEAR)
"""Bins are equally wide in asinh(x / 0.01): about 12 % of x above 0.01; what is beyond ±500 falls in the last ones."""

STAGES = {"q": ("raw", "smooth", "rotated"), "k": ("raw", "smooth", "rotated"), "v": ("raw", "smooth")}
"""What is kept of each tensor. ``smooth``: less its mean (over the tile for Q); ``rotated``: and then turned."""


def edges() -> list[float]:
    """The ``BINS + 1`` edges of the histograms."""
    return [_LINEAR * math.sinh(_EDGE * (2 * i / BINS - 1)) for i in range(BINS + 1)]


@dataclass
class Summary:
    """One stage of one tensor.

    counts: the histogram of its numbers (see `edges`). channels: the largest magnitude seen in each channel (over the
    sampled heads). crest: the mean over tokens of max|x| / rms(x), what a scale per token loses by (√D at worst).
    """

    counts: list[int] = field(default_factory=lambda: [0] * BINS)
    channels: list[float] = field(default_factory=list)
    tokens: int = 0
    crest_sum: float = 0.0

    @property
    def crest(self) -> float:
        """The mean over tokens of max|x| / rms(x); NaN without a token."""
        return self.crest_sum / self.tokens if self.tokens else math.nan

    def add(self, x: Tensor) -> None:
        """Count ``x`` ``[…, tokens, D]``."""
        x = x.reshape(-1, x.shape[-1])
        x = x[x.isfinite().all(dim=1)]
        if not x.numel():
            return
        place = (torch.asinh(x / _LINEAR) / _EDGE + 1) * (BINS / 2)
        counts = torch.bincount(place.long().clamp(0, BINS - 1).flatten(), minlength=BINS).tolist()
        largest = x.abs().amax(dim=0).tolist()
        rms = x.square().mean(dim=1).sqrt()
        crest = torch.where(rms > 0, x.abs().amax(dim=1) / rms, 1.0)
        self._join(counts, largest, len(x), float(crest.sum()))

    def _join(self, counts: list[int], channels: list[float], tokens: int, crest_sum: float) -> None:
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        if len(channels) > len(self.channels):
            self.channels += [0.0] * (len(channels) - len(self.channels))
        for c, value in enumerate(channels):
            self.channels[c] = max(self.channels[c], value)
        self.tokens += tokens
        self.crest_sum += crest_sum

    def merge(self, other: Summary) -> None:
        """Add what another one counted."""
        self._join(other.counts, other.channels, other.tokens, other.crest_sum)

    def to_json(self) -> dict[str, Any]:
        """Its numbers; the histogram without the zeros at its ends."""
        used = [i for i, c in enumerate(self.counts) if c] or [0]
        return {
            "first_bin": used[0],
            "counts": self.counts[used[0] : used[-1] + 1],
            "channels": [float(f"{c:.4g}") for c in self.channels],
            "tokens": self.tokens,
            "crest_sum": self.crest_sum,
        }

    @classmethod
    def from_json(cls, data: Any) -> Summary:
        """What `to_json` gave.

        Raises:
            InvalidArgumentError: not that.
        """
        try:
            inner = list_of(data["counts"], "counts")
            first = count_of(data["first_bin"], "first_bin", BINS)
            if first + len(inner) > BINS:
                raise ValueError(f"{len(inner)} counts from bin {first}, and there are {BINS} bins")
            counts = [0] * first + [count_of(c, "a count") for c in inner] + [0] * (BINS - first - len(inner))
            largest = list_of(data["channels"], "channels")
            if len(largest) > _MOST_CHANNELS:
                raise ValueError(f"{len(largest)} channels, more than {_MOST_CHANNELS}")
            channels = [number_of(c, "a channel", 0.0) for c in largest]
            crest_sum = number_of(data["crest_sum"], "crest_sum", 0.0)
            return cls(counts, channels, count_of(data["tokens"], "tokens"), crest_sum)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidArgumentError(f"no histogram: {error}") from None


Distribution = dict[str, dict[str, Summary]]
"""Summaries by tensor (q, k, v) and stage, of all calls of one name."""


def new_distribution() -> Distribution:
    """Empty summaries."""
    return {tensor: {stage: Summary() for stage in stages} for tensor, stages in STAGES.items()}


def add_call(distribution: Distribution, call: ScoredCall, tile: int, tokens: int, turn: int) -> None:
    """Count some tokens of the sampled heads of a call (``[1, S, N, D]``); means are over all of them."""
    q, k, v = (t.float() for t in (call.q, call.k, call.v))
    if 0 in q.shape or 0 in k.shape:
        return
    q_smooth = q - tile_mean(q, tile).repeat_interleave(tile, dim=2)[:, :, : q.shape[2]]
    k_smooth, v_smooth = (t - token_mean(t, None)[:, :, None] for t in (k, v))

    def some(t: Tensor) -> Tensor:
        return t[:, :, spread(max(1, tokens // t.shape[1]), t.shape[2], turn)]

    q, k, v, q_smooth, k_smooth, v_smooth = map(some, (q, k, v, q_smooth, k_smooth, v_smooth))
    seen = {
        "q": (q, q_smooth, rotate(q_smooth)),
        "k": (k, k_smooth, rotate(k_smooth)),
        "v": (v, v_smooth),
    }
    for tensor, stages in seen.items():
        for stage, x in zip(STAGES[tensor], stages, strict=True):
            distribution[tensor][stage].add(x)

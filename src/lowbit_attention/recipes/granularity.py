"""Who shares a quantisation scale (SageAttention2, section 3.2).

A granularity is a frozen type, never an integer code. For Q and K it answers one question: which group does
token ``t`` belong to? All tokens of a group share one scale. `b_q`, `b_k` and `warp_rows` come from the
kernel's `Geometry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .machine import Geometry


class TokenGranularity(ABC):
    """How the tokens of Q or K are grouped; each group of each batch × head has one scale."""

    name: ClassVar[str]

    @abstractmethod
    def q_group(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        """Group index of each query token, shape and dtype of ``tokens`` (int64)."""

    @abstractmethod
    def k_group(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        """Group index of each key token, shape and dtype of ``tokens`` (int64)."""

    def q_groups(self, length: int, geometry: Geometry) -> int:
        """How many query scales one head has: those of every tile that is touched, whole tiles."""
        return self._count(self.q_group, length, geometry.b_q, geometry)

    def k_groups(self, length: int, geometry: Geometry) -> int:
        """How many key scales one head has: those of every tile that is touched, whole tiles."""
        return self._count(self.k_group, length, geometry.b_k, geometry)

    @staticmethod
    def _count(group: Callable[[Tensor, Geometry], Tensor], length: int, tile: int, geometry: Geometry) -> int:
        padded = -(-length // tile) * tile
        return int(group(torch.arange(padded, dtype=torch.int64, device="cpu"), geometry).max()) + 1 if padded else 0

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class PerTensor(TokenGranularity):
    """One scale a head.

    Scales: Q ``[B, Hq, 1]``, K ``[B, Hkv, 1]``.
    """

    name: ClassVar[str] = "per_tensor"

    def q_group(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return torch.zeros_like(tokens)

    def k_group(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return torch.zeros_like(tokens)


@dataclass(frozen=True)
class PerBlock(TokenGranularity):
    """One scale a tile: ``b_q`` query tokens or ``b_k`` key tokens (SageAttention).

    Scales: Q ``[B, Hq, ceil(Nq / b_q)]``, K ``[B, Hkv, ceil(Nk / b_k)]``.
    """

    name: ClassVar[str] = "per_block"

    def q_group(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens // geometry.b_q

    def k_group(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens // geometry.b_k


@dataclass(frozen=True)
class PerWarp(PerBlock):
    """One scale for the ``warp_rows`` query tokens of one warp; keys as in `PerBlock`.

    Scales: Q ``[B, Hq, ceil(Nq / b_q) · b_q / warp_rows]``, K ``[B, Hkv, ceil(Nk / b_k)]``.
    """

    name: ClassVar[str] = "per_warp"

    def q_group(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens // geometry.warp_rows


@dataclass(frozen=True)
class PerThread(TokenGranularity):
    """One scale for what one thread of an ``mma.m16n8`` holds of a warp's rows and of a key tile.

    A thread owns rows ``{lane / 4, lane / 4 + 8}`` and columns ``{2 · (lane % 4), + 1}`` of every 8. So within a
    warp's rows, rows with equal ``row mod 8`` share a scale (8 a warp), and within a key tile, columns with equal
    ``(col mod 8) div 2`` (4 a tile): each thread needs one Q scale and one K scale.

    Scales: Q ``[B, Hq, ceil(Nq / b_q) · b_q / warp_rows · 8]``, K ``[B, Hkv, ceil(Nk / b_k) · 4]``.
    """

    name: ClassVar[str] = "per_thread"

    def q_group(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens // geometry.warp_rows * 8 + tokens % 8

    def k_group(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens // geometry.b_k * 4 + tokens % 8 // 2


@dataclass(frozen=True)
class PerToken(TokenGranularity):
    """One scale a token.

    Scales: Q ``[B, Hq, ceil(Nq / b_q) · b_q]``, K ``[B, Hkv, ceil(Nk / b_k) · b_k]``.
    """

    name: ClassVar[str] = "per_token"

    def q_group(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens

    def k_group(self, tokens: Tensor, geometry: Geometry) -> Tensor:
        return tokens


@dataclass(frozen=True)
class ValueGranularity:
    """How V's scales are shared; V is always scaled per channel."""

    name: ClassVar[str]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class PerChannel(ValueGranularity):
    """One scale a channel of V, over all keys.

    Scales: ``[B, Hkv, Dv]``.
    """

    name: ClassVar[str] = "per_channel"


@dataclass(frozen=True)
class PerChannelAndKeyTile(ValueGranularity):
    """One scale a channel and key tile: finer, and quantising V needs one pass over it.

    Scales: ``[B, Hkv, ceil(Nk / b_k), Dv]``. The sums must be promoted at least once a key tile.
    """

    name: ClassVar[str] = "per_channel_and_key_tile"


TOKEN_GRANULARITIES: dict[str, TokenGranularity] = {
    g.name: g for g in (PerTensor(), PerBlock(), PerWarp(), PerThread(), PerToken())
}
VALUE_GRANULARITIES: dict[str, ValueGranularity] = {g.name: g for g in (PerChannel(), PerChannelAndKeyTile())}

"""Which query may see which key: causality and a mask, tile by tile, without an N × N copy of anything."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
_ROWS_AT_ONCE = 256
_HIDING_BIAS = 9000.0
"""e^−9000 is zero in every format; −10000 becomes −9984 in bfloat16."""


@dataclass(frozen=True)
class Masking:
    """Query ``i`` sees key ``j`` if ``j ≤ i + causal_offset`` (when causal) and the mask allows it.

    ``mask`` is bool (True: may see) or floating (added to the logits in natural units; −inf hides), of four dimensions
    that broadcast to ``[B, Hq, Nq, Nk]``; it is expanded tile by tile only.
    """

    causal_offset: int | None = None
    mask: Tensor | None = None
    positions: tuple[int, ...] | None = None
    """Where the query rows stand, ascending, if they are some of a longer Q (`of_rows`)."""

    def of_rows(self, rows: Tensor) -> Masking:
        """The same for some of the query rows, int64 ``[R]``, ascending."""
        mask = self.mask if self.mask is None or self.mask.shape[2] == 1 else self.mask[:, :, rows.to(self.mask.device)]
        return replace(self, mask=mask, positions=tuple(rows.tolist()))

    def first_row(self, first_key: int, tile: int) -> int:
        """The first query row, rounded down to its tile, that causality lets see ``first_key`` or a later key."""
        if self.causal_offset is None:
            return 0
        first = max(0, first_key - self.causal_offset)
        if self.positions is not None:
            first = bisect_left(self.positions, first)
            if first == len(self.positions):
                return first
        return first // tile * tile

    def hide(self, x: Tensor, heads: tuple[Tensor, Tensor], rows: slice, keys: slice, unit: float = LOG2E) -> Tensor:
        """Logits ``x`` ``[S, rows, keys]`` with the mask added (times ``unit``) and −inf where a key is hidden.

        ``heads`` holds the batch and head index of each of the S slices. Finite biases never turn a logit infinite.
        """
        if self.mask is not None:
            tile = _tile(self.mask, heads, rows, keys)
            if tile.dtype == torch.bool:
                x = x.masked_fill(~tile, -math.inf)
            else:
                limit = torch.finfo(x.dtype).max
                bias = tile.to(x.dtype)
                shifted = x + (bias * unit).clamp(-limit, limit)
                finite = x.isfinite() & bias.isfinite()
                x = torch.where(finite, shifted.clamp(-limit, limit), x + bias)
        first = rows.start if self.positions is None else self.positions[rows.start]
        if self.causal_offset is not None and keys.stop - 1 > first + self.causal_offset:
            if self.positions is None:
                i = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=x.device)[:, None]
            else:
                i = torch.tensor(self.positions[rows], dtype=torch.int64, device=x.device)[:, None]
            j = torch.arange(keys.start, keys.stop, dtype=torch.int64, device=x.device)
            x = x.masked_fill(j > i + self.causal_offset, -math.inf)
        return x


def _tile(mask: Tensor, heads: tuple[Tensor, Tensor], rows: slice, keys: slice) -> Tensor:
    """``[S or 1, rows or 1, keys or 1]`` of a broadcastable mask."""
    everything = slice(None)
    if mask.shape[2] == 1:
        rows = everything
    if mask.shape[3] == 1:
        keys = everything
    b, h = (index if size > 1 else torch.zeros_like(index) for index, size in zip(heads, mask.shape[:2], strict=True))
    if mask.shape[:2] == (1, 1):
        b, h = b[:1], h[:1]
    return mask[b, h, rows, keys]


def valid_keys(masking: Masking, q: Tensor, k: Tensor) -> Tensor | None:
    """Keys that a key-padding mask lets any query see, bool ``[B, Hkv, Nk]``; ``None`` if the mask is not of that kind.

    A mask is key padding if its rows are the same for every query (and hide anything). Statistics of K and V leave the
    hidden keys out. Query heads that share a K head see the union.
    """
    mask = masking.mask
    if mask is None or 0 in mask.shape or 0 in q.shape[:3] or k.shape[2] == 0:
        return None
    first = _counts(mask[:, :, :1])
    if bool(first.all()):
        return None
    for start in range(1, mask.shape[2], _ROWS_AT_ONCE):  # (all at once would be another N × N)
        if not bool((_counts(mask[:, :, start : start + _ROWS_AT_ONCE]) == first).all()):
            return None
    first = first.expand(q.shape[0], q.shape[1], 1, k.shape[2])
    return first.reshape(q.shape[0], k.shape[1], -1, k.shape[2]).any(dim=2)


def _counts(rows: Tensor) -> Tensor:
    """Keys that a row's mask lets count.

    A bias far below the row's largest (−10000, or a dtype's lowest number, as some models mark padding) hides a key
    from softmax as −∞ does.
    """
    if rows.dtype == torch.bool:
        return rows
    bias = rows.double()
    return (bias > -math.inf) & (bias >= bias.amax(dim=-1, keepdim=True) - _HIDING_BIAS)

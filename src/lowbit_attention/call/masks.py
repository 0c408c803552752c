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

    def written_out(self, rows: int, keys: int) -> Tensor:
        """The mask and causality as one mask ``[B or 1, Hq or 1, rows, keys]`` (rows 1 if all are alike)."""
        assert self.mask is not None
        if self.causal_offset is None:
            return self.mask.expand(-1, -1, -1, keys)
        visible = self.mask.expand(-1, -1, rows, keys)
        i = torch.arange(rows, dtype=torch.int64, device=visible.device)
        if self.positions is not None:
            i = torch.tensor(self.positions, dtype=torch.int64, device=visible.device)
        j = torch.arange(keys, dtype=torch.int64, device=visible.device)
        sees = j <= i[:, None] + self.causal_offset
        return visible & sees if visible.dtype == torch.bool else visible.masked_fill(~sees, -math.inf)

    def relative(self, rows: int, keys: int) -> tuple[Masking, Tensor]:
        """A float mask as kernels read it, less each row's largest; and that, ``[B or 1, Hq or 1, rows]``.

        In base-2 logits it is FP16 numbers; here they are in natural units.

        What is far below a row's largest (−10000, or a dtype's lowest number, as some models mark padding) hides a key
        from softmax as −∞ does. A row of such numbers alone sees all of them.
        """
        bias = self.written_out(rows, keys).float()
        largest = bias.amax(dim=-1, keepdim=True)
        less = torch.where(largest == -math.inf, -math.inf, bias - largest)
        less = torch.where(less < -_HIDING_BIAS, -math.inf, less * LOG2E).half()
        return replace(self, mask=less.float() / LOG2E), largest[..., 0].expand(-1, -1, rows)

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


def lists_keys(shape: tuple[int, ...], q_heads: int, kv_heads: int, is_causal: bool) -> bool:
    """Whether a bool mask of this shape, 1 where it repeats, hides keys from all rows alike.

    Then attention is that of the keys which are left. (Not with causality, nor where the query heads of a head of K see
    different keys.)
    """
    return shape[2] == 1 and not is_causal and (shape[1] == 1 or q_heads == kv_heads)


def seen_keys(masking: Masking, q: Tensor, k: Tensor) -> Tensor | None:
    """Keys that some query sees, bool ``[B, Hkv, Nk]``; ``None`` for all. Statistics of K and V leave the others out.

    Query heads that share a K head see the union. A bias far below its row's largest hides, too (`_counts`).
    """
    rows, keys = q.shape[2], k.shape[2]
    if 0 in q.shape[:3] or 0 in k.shape[:3] or (masking.mask is not None and 0 in masking.mask.shape):
        return None
    mask, offset = masking.mask, masking.causal_offset
    if mask is None:
        if offset is None or rows + offset >= keys:
            return None
        seen = (torch.arange(keys, dtype=torch.int64, device=q.device) < rows + offset)[None, None]
        return seen.expand(k.shape[0], k.shape[1], -1)
    seen = _any_row_sees(masking, rows, keys).expand(q.shape[0], q.shape[1], -1)
    seen = seen.reshape(q.shape[0], k.shape[1], -1, keys).any(dim=2)
    return None if bool(seen.all()) else seen


def _any_row_sees(masking: Masking, rows: int, keys: int) -> Tensor:
    """Keys that some query row sees, bool ``[B or 1, Hq or 1, Nk]``."""
    mask, offset = masking.mask, masking.causal_offset
    assert mask is not None
    seen = mask.new_zeros(*mask.shape[:2], keys, dtype=torch.bool)
    for start in range(0, rows if offset is not None else mask.shape[2], _ROWS_AT_ONCE):  # (not N × N at once)
        some = _counts(mask if mask.shape[2] == 1 else mask[:, :, start : start + _ROWS_AT_ONCE])
        if offset is not None:
            count = min(_ROWS_AT_ONCE, rows - start)
            some = some.expand(-1, -1, count, keys).tril(start + offset)
        seen |= some.any(dim=2)
    return seen


def seeing_rows(masking: Masking, q: Tensor, k: Tensor) -> Tensor | None:
    """Query rows that see some key, bool ``[B or 1, Hq or 1, Nq]``; ``None`` for all. The others count in no scale."""
    rows, keys = q.shape[2], k.shape[2]
    if 0 in q.shape[:3] or keys == 0 or (masking.mask is not None and 0 in masking.mask.shape):
        return None
    mask, offset = masking.mask, masking.causal_offset
    if mask is None:
        if offset is None or offset >= 0:
            return None
        return (torch.arange(rows, dtype=torch.int64, device=q.device) >= -offset)[None, None]
    parts = []
    for start in range(0, rows, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, rows - start)
        some = mask if mask.shape[2] == 1 else mask[:, :, start : start + count]
        some = some if some.dtype == torch.bool else some > -math.inf
        if offset is not None:
            some = some.expand(-1, -1, count, keys).tril(start + offset)
        parts.append(some.any(dim=3).expand(-1, -1, count))
    seen = torch.cat(parts, dim=2)
    return None if bool(seen.all()) else seen


def _counts(rows: Tensor) -> Tensor:
    """Keys that a row's mask lets count.

    A bias far below the row's largest (−10000, or a dtype's lowest number, as some models mark padding) hides a key
    from softmax as −∞ does.
    """
    if rows.dtype == torch.bool:
        return rows
    bias = rows.double()
    return (bias > -math.inf) & (bias >= bias.amax(dim=-1, keepdim=True) - _HIDING_BIAS)

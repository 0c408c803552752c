"""Which query may see which key: causality and a mask, tile by tile, without an N × N copy of anything."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import FP32_MAX

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Masking:
    """Query ``i`` sees key ``j`` if ``j ≤ i + causal_offset`` (when causal) and the mask allows it.

    ``mask`` is bool (True: may see) or floating (added to the logits in natural units; −inf hides), expanded to
    ``[B, Hq, Nq, Nk]`` as a view.
    """

    causal_offset: int | None = None
    mask: Tensor | None = None

    def first_row(self, first_key: int, tile: int) -> int:
        """The first query row, rounded down to its tile, that causality lets see ``first_key`` or a later key."""
        if self.causal_offset is None:
            return 0
        return max(0, first_key - self.causal_offset) // tile * tile

    def hide(self, x: Tensor, heads: tuple[Tensor, Tensor], rows: slice, keys: slice, unit: float = LOG2E) -> Tensor:
        """Logits ``x`` ``[S, rows, keys]`` with the mask added (times ``unit``) and −inf where a key is hidden.

        ``heads`` holds the batch and head index of each of the S slices. Finite biases never turn a logit infinite.
        """
        if self.mask is not None:
            tile = self.mask[heads[0], heads[1], rows, keys]
            if tile.dtype == torch.bool:
                x = x.masked_fill(~tile, -math.inf)
            else:
                limit = FP32_MAX if x.dtype == torch.float32 else torch.finfo(x.dtype).max
                bias = tile.to(x.dtype)
                shifted = x + (bias * unit).clamp(-limit, limit)
                finite = x.isfinite() & bias.isfinite()
                x = torch.where(finite, shifted.clamp(-limit, limit), x + bias)
        if self.causal_offset is not None and keys.stop - 1 > rows.start + self.causal_offset:
            i = torch.arange(rows.start, rows.stop, device=x.device)[:, None]
            j = torch.arange(keys.start, keys.stop, device=x.device)
            x = x.masked_fill(j > i + self.causal_offset, -math.inf)
        return x


def valid_keys(mask: Tensor | None, kv_heads: int) -> Tensor | None:
    """Keys that a key-padding mask lets any query see, bool ``[B, Hkv, Nk]``; ``None`` if the mask is not of that kind.

    A mask is key padding if its rows are the same for every query (and not the same for every key). Statistics of K
    and V leave the other keys out. Query heads that share a K head see the union.
    """
    if mask is None or mask.shape[2] == 0 or mask.shape[3] == 0 or mask.shape[1] == 0:
        return None
    visible = mask if mask.dtype == torch.bool else mask > -math.inf
    first = visible[:, :, :1]
    same_for_all_queries = mask.shape[2] == 1 or mask.stride(2) == 0 or bool((visible == first).all())
    if not same_for_all_queries or bool(first.all()):
        return None
    batch, q_heads, _, keys = first.shape
    return first.reshape(batch, kv_heads, q_heads // kv_heads, keys).any(dim=2)

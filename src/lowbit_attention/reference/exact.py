"""Exact attention on the original inputs, in float64 (or nearly float32's precision), with every feature of the
emulation.

It judges the *method*: what a recipe loses against it is the price of quantisation. O(N · tile) memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..call.masks import Masking
from .arithmetic import split_product, without_autocast

_TILE_KEYS = 512
_TILE_ELEMENTS = 1 << 21


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sm_scale: float,
    masking: Masking = Masking(),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``softmax(sm_scale · Q Kᵀ) V`` and its log-sum-exp.

    Args:
        q: ``[B, Hq, Nq, D]``; k: ``[B, Hkv, Nk, D]``; v: ``[B, Hkv, Nk, Dv]``; Hq a multiple of Hkv.
        dtype: float64, or float32 for speed: then Q, K and V must be 16-bit numbers on a device that may round float32
            operands to TF32 (`arithmetic`), and ``sm_scale`` and the logits within float32's range.
    Returns:
        out ``[B, Hq, Nq, Dv]`` and lse ``[B, Hq, Nq]`` (natural log) in ``dtype``; 0 and −inf for
        rows that see no key.
    """
    batch, heads, rows = q.shape[:3]
    out = q.new_zeros(batch * heads, rows, v.shape[3], dtype=dtype)
    lse = q.new_full((batch * heads, rows), -math.inf, dtype=dtype)
    if lse.numel():
        at_once = max(1, _TILE_ELEMENTS // (rows * _TILE_KEYS))
        with without_autocast(q.device):
            for first in range(0, batch * heads, at_once):
                part = slice(first, min(first + at_once, batch * heads))
                out[part], lse[part] = _slices(q, k, v, sm_scale, masking, dtype, part)
    return out.reshape(batch, heads, rows, v.shape[3]), lse.reshape(batch, heads, rows)


def _slices(
    q: Tensor, k: Tensor, v: Tensor, sm_scale: float, masking: Masking, dtype: torch.dtype, part: slice
) -> tuple[Tensor, Tensor]:
    index = torch.arange(part.start, part.stop, dtype=torch.int64, device=q.device)
    b, h = index // q.shape[1], index % q.shape[1]
    h_kv = h // (q.shape[1] // k.shape[1])
    # The power of two goes to Q, which loses no digit by it, so that an intermediate leaves the range only if a logit
    # does; the rest is for the logits.
    mantissa, exponent = math.frexp(sm_scale)
    power, factor = (2.0 ** (exponent - 1), 2 * mantissa) if sm_scale else (0.0, 1.0)
    scaled_q = q[b, h].to(dtype) * power
    keys_of, values_of = k[b, h_kv], v[b, h_kv]
    rows = q.shape[2]
    m = torch.full((len(index), rows), -math.inf, dtype=dtype, device=q.device)
    row_sum = torch.zeros_like(m)
    out = torch.zeros(len(index), rows, v.shape[3], dtype=dtype, device=q.device)
    for start in range(0, k.shape[2], _TILE_KEYS):
        first = masking.first_row(start, 1)
        if first >= rows:
            break
        seeing, tile = slice(first, rows), slice(start, min(start + _TILE_KEYS, k.shape[2]))
        x = torch.bmm(scaled_q[:, seeing], keys_of[:, tile].to(dtype).transpose(1, 2)).mul_(factor)
        x = masking.hide(x, (b, h), seeing, tile, unit=1.0)
        new = torch.maximum(m[:, seeing], x.amax(dim=-1))
        shift = torch.where(new == -math.inf, 0.0, new)
        p = torch.exp(x - shift[..., None])
        old = torch.exp(m[:, seeing] - shift)
        kept = row_sum[:, seeing] * old
        total = kept + p.sum(dim=-1)
        share = 1.0 / torch.where(total == 0, 1.0, total)[..., None]
        # always normalised: the sum of many large values of V would leave the range that their mean is in
        out[:, seeing] = out[:, seeing] * (kept[..., None] * share) + split_product(
            p * share, values_of[:, tile].to(dtype)
        )
        row_sum[:, seeing] = total
        m[:, seeing] = new
    return out, m + row_sum.log()

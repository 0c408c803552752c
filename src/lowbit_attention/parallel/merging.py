"""Partial results over different keys of the same queries become one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.checks import check_kind, fail


def merge_state(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over two sets of keys, from that over each.

    Args:
        out, other_out: ``[B, Hq, Nq, Dv]`` (HND) of one shape, dtype and device: what `attention` returned for some
            keys, and for others.
        lse, other_lse: their float32 ``[B, Hq, Nq]``, natural logarithms, from ``return_lse=True``.
    Returns:
        Output and lse over all keys, in out's dtype and float32. A row that saw no key in one part is the other's row,
        bit for bit; one that saw none in either is 0 and −inf, never NaN.

    It is computed in float32 (float64 for float64 outputs), so a result in 16 bits is rounded once more a merge: merge
    float32 outputs where there are many parts. Like all of attention over parts it does not depend on their order but
    for rounding.

    >>> from lowbit_attention import attention
    >>> q, k, v = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 32, 16), torch.randn(1, 2, 32, 16)
    >>> parts = [attention(q, k[:, :, i : i + 16], v[:, :, i : i + 16], return_lse=True) for i in (0, 16)]
    >>> merged, _ = merge_state(*parts[0], *parts[1])
    >>> torch.allclose(merged, attention(q, k, v), atol=1e-6)
    True

    Raises:
        InvalidArgumentError: shapes, dtypes or devices that do not fit.
    """
    for name, t in (("out", out), ("lse", lse), ("other_out", other_out), ("other_lse", other_lse)):
        if not isinstance(t, Tensor):
            fail(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        check_kind(name, t)
    if out.shape != other_out.shape or out.dtype != other_out.dtype or not out.dtype.is_floating_point:
        fail(
            f"out and other_out must be floating tensors of one shape and dtype, got {out.dtype} {tuple(out.shape)} "
            f"and {other_out.dtype} {tuple(other_out.shape)}"
        )
    if lse.dtype != torch.float32 or other_lse.dtype != torch.float32:
        fail(f"lse and other_lse must be float32, got {lse.dtype} and {other_lse.dtype}")
    if lse.shape != out.shape[:-1] or other_lse.shape != lse.shape:
        fail(
            f"lse and other_lse must have out's shape without its last dimension, {tuple(out.shape[:-1])}, got "
            f"{tuple(lse.shape)} and {tuple(other_lse.shape)}"
        )
    if not out.device == lse.device == other_out.device == other_lse.device:
        fail(f"out is on {out.device}, lse on {lse.device}, the others on {other_out.device}, {other_lse.device}")
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    largest = torch.maximum(lse, other_lse)
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    mine, others = (lse - shift).exp().to(dtype), (other_lse - shift).exp().to(dtype)
    total = mine + others
    weight = torch.where(total > 0, others / total, 0.0)[..., None]
    # (a weight of 0 or 1 is a row of one part alone; 0 · NaN of a part that nobody asks for must not come in)
    mixed = out.to(dtype) * (1 - weight) + other_out.to(dtype) * weight
    merged = torch.where(weight == 0, out, torch.where(weight == 1, other_out, mixed.to(out.dtype)))
    return merged, torch.where(total > 0, shift + total.log().float(), -torch.inf)

"""The quantisers of ``sageattention.quant`` and ``sageattention.core``: same names, shapes and layouts, by torch.

They show what is quantised, to be looked at, measured, or given to kernels of one's own. The functions of
`compat.sageattention` quantise by themselves and need none of them; the compiled modules (``_qattn_sm80``, …) that take
their output are not here.

Numbers are rounded to nearest, ties to even; a scale is the group's largest magnitude over the format's largest number,
and 1 where a group holds nothing. On any device; float16, bfloat16 or float32.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..call import checks
from ..errors import InvalidArgumentError, UnsupportedError
from ..recipes.formats import FP16_MAX
from ..reference.quantize import TINY, quantize_tokens
from .words import check_layout

__all__ = [
    "attn_false",
    "attn_true",
    "get_cuda_arch_versions",
    "per_block_int8",
    "per_channel_fp8",
    "per_thread_int8",
    "per_warp_int8",
    "sub_mean",
]

Packed = tuple[Tensor, Tensor, Tensor, Tensor]

_LOG2_E = 1.44269504
"""As many digits of log2(e) as the original multiplies Q by."""
_ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
"""Which token stands where in every 16: what one thread's P holds lies in one word of V."""
_V_TILE = 64


def get_cuda_arch_versions() -> list[str]:
    """``["sm89", …]``, the architecture of each CUDA device; empty without one."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return ["sm{}{}".format(*torch.cuda.get_device_capability(device)) for device in devices]


def per_block_int8(
    q: Tensor,
    k: Tensor,
    km: Tensor | None = None,
    BLKQ: int = 128,
    BLKK: int = 64,
    sm_scale: float | None = None,
    tensor_layout: str = "HND",
) -> Packed:
    """INT8 with a scale for every ``BLKQ`` queries and every ``BLKK`` keys; Q is multiplied by ``sm_scale · log2(e)``.

    Args:
        q: ``[B, Hq, Nq, D]`` (HND) or ``[B, Nq, Hq, D]`` (NHD); k alike.
        km: the mean of k over the tokens, which is subtracted: ``[B, Hkv, D]``, or with the token's axis kept.
        sm_scale: ``1 / √D`` if ``None``.
    Returns:
        q int8, its scales float32 ``[B, Hq, ceil(Nq / BLKQ)]``, k int8, its scales ``[B, Hkv, ceil(Nk / BLKK)]``.

    >>> q = torch.randn(1, 2, 100, 32)
    >>> [tuple(t.shape) for t in per_block_int8(q, q)]
    [(1, 2, 100, 32), (1, 2, 1), (1, 2, 100, 32), (1, 2, 2)]

    Raises:
        InvalidArgumentError: a wrong shape, dtype, layout or tile.
    """
    q, k = _heads_first(q, k, km, tensor_layout)
    scale = checks.resolve_scale("sm_scale", sm_scale, q.shape[-1])
    packed_q = _quantised(q * (scale * _LOG2_E), _blocks(q, BLKQ, BLKQ))
    return _in_layout(*packed_q, *_quantised(k, _blocks(k, BLKK, BLKK)), tensor_layout)


def per_warp_int8(
    q: Tensor,
    k: Tensor,
    km: Tensor | None = None,
    BLKQ: int = 128,
    WARPQ: int = 32,
    BLKK: int = 64,
    tensor_layout: str = "HND",
) -> Packed:
    """INT8 with a scale for every ``WARPQ`` queries and every ``BLKK`` keys.

    Arguments and returns as `per_block_int8`; Q's scales are ``[B, Hq, ceil(Nq / BLKQ) · BLKQ / WARPQ]``.
    """
    q, k = _heads_first(q, k, km, tensor_layout)
    return _in_layout(
        *_quantised(q, _blocks(q, BLKQ, WARPQ)), *_quantised(k, _blocks(k, BLKK, BLKK)), tensor_layout
    )  # fmt: skip


def per_thread_int8(
    q: Tensor,
    k: Tensor,
    km: Tensor | None = None,
    BLKQ: int = 128,
    WARPQ: int = 32,
    BLKK: int = 64,
    WARPK: int = 64,
    sm_scale: float | None = None,
    tensor_layout: str = "HND",
) -> Packed:
    """INT8 with a scale for what one thread holds: queries of a warp with equal ``n mod 8``, keys with equal
    ``n mod 8 div 2``.

    Arguments and returns as `per_block_int8`; Q's scales are ``[B, Hq, ceil(Nq / BLKQ) · BLKQ / WARPQ · 8]``, K's
    ``[B, Hkv, ceil(Nk / BLKK) · BLKK / WARPK · 4]``. ``sm_scale`` is only looked at, as in the original: the attention
    itself is what scales.
    """
    q, k = _heads_first(q, k, km, tensor_layout)
    checks.resolve_scale("sm_scale", sm_scale, q.shape[-1])
    (warps, n_warps), (tiles, n_tiles) = _blocks(q, BLKQ, WARPQ), _blocks(k, BLKK, WARPK)
    of_q = warps * 8 + _tokens(q) % 8, n_warps * 8
    of_k = tiles * 4 + _tokens(k) % 8 // 2, n_tiles * 4
    return _in_layout(*_quantised(q, of_q), *_quantised(k, of_k), tensor_layout)


def sub_mean(v: Tensor, tensor_layout: str = "HND") -> tuple[Tensor, Tensor]:
    """``v − v̄`` as float16 (saturated), and v̄, the mean over the tokens, ``[B, Hkv, D]`` in v's dtype.

    Raises:
        InvalidArgumentError: a wrong shape, dtype or layout.
    """
    (first,) = _checked(tensor_layout, v=v)
    mean = first.mean(dim=2).to(v.dtype)
    rest = (first - mean.float()[:, :, None]).clamp(-FP16_MAX, FP16_MAX).to(torch.float16)
    return _back(rest, tensor_layout), mean


def per_channel_fp8(
    v: Tensor, tensor_layout: str = "HND", scale_max: float = 448.0, smooth_v: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """E4M3 with a scale for every channel, as a tensor core takes it: transposed, padded with zeros to a multiple of
    64 tokens, and of every 16 tokens in the order 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15.

    Args:
        v: ``[B, Hkv, Nk, D]`` (HND) or ``[B, Nk, Hkv, D]`` (NHD).
        scale_max: the largest number that a channel is scaled to; at most 448.
        smooth_v: subtract the mean over the tokens.
    Returns:
        float8_e4m3fn ``[B, Hkv, D, N']`` (HND) or ``[B, D, Hkv, N']`` (NHD); the scales, float32 ``[B, Hkv, D]``; the
        mean, float32 ``[B, Hkv, D]``, ``None`` without ``smooth_v``.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, layout or scale.
    """
    (first,) = _checked(tensor_layout, v=v)
    checks.check_flag("smooth_v", smooth_v)
    if isinstance(scale_max, bool) or not isinstance(scale_max, int | float) or not 0 < scale_max <= 448:
        raise InvalidArgumentError(f"scale_max={scale_max!r} is no number above 0 and up to 448, E4M3's largest")
    mean = first.mean(dim=2) if smooth_v else None
    if mean is not None:
        first = first - mean[:, :, None]
    largest = first.abs().amax(dim=2) if first.shape[2] else first.new_zeros(*first.shape[:2], first.shape[3])
    nothing = largest < TINY
    scale = torch.where(nothing, 1.0, largest / scale_max)
    scaled = torch.where(nothing[:, :, None], 0.0, first / scale[:, :, None]).clamp(-scale_max, scale_max)
    padded = torch.nn.functional.pad(scaled, (0, 0, 0, -scaled.shape[2] % _V_TILE)).transpose(2, 3)
    ordered = padded.reshape(*padded.shape[:3], padded.shape[3] // len(_ORDER), len(_ORDER))[..., list(_ORDER)].flatten(
        3
    )
    out = ordered.to(torch.float8_e4m3fn)
    return (out if tensor_layout == "HND" else out.transpose(1, 2).contiguous()), scale, mean


def attn_false(*args: Any, **options: Any) -> NoReturn:
    """The original's Triton kernel on numbers that are quantised already: not here.

    Raises:
        UnsupportedError: always, with the function to call instead.
    """
    del args, options
    raise UnsupportedError(
        "sageattention.core.attn_false and attn_true take packed Q and K, and these kernels are not here: call "
        "sageattn_qk_int8_pv_fp16_triton(q, k, v, …), which packs them itself"
    )


attn_true = attn_false


# ---- what they share

_Groups = tuple[Tensor, int]
"""The group of each token, int64 ``[N]``, and how many groups there are."""


def _checked(tensor_layout: object, **given: Any) -> list[Tensor]:
    """The tensors as float32 ``[B, H, N, D]``."""
    check_layout(tensor_layout)
    found = []
    for name, t in given.items():
        if not isinstance(t, Tensor) or t.dim() != 4:
            what = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise InvalidArgumentError(f"{name} must be a tensor with 4 dimensions, got {what}")
        if t.shape[3] == 0:
            raise InvalidArgumentError(f"{name} must have a head dimension of at least 1, got shape {tuple(t.shape)}")
        if t.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise InvalidArgumentError(f"{name} must be float16, bfloat16 or float32, got {t.dtype}")
        found.append((t if tensor_layout == "HND" else t.transpose(1, 2)).float())
    return found


def _heads_first(q: Any, k: Any, km: Any, tensor_layout: object) -> tuple[Tensor, Tensor]:
    """Q and K as float32 ``[B, H, N, D]``, K without its mean."""
    first_q, first_k = _checked(tensor_layout, q=q, k=k)
    if km is None:
        return first_q, first_k
    shape = (first_k.shape[0], first_k.shape[1], first_k.shape[3])
    if not isinstance(km, Tensor) or km.numel() != math.prod(shape):
        what = f"shape {tuple(km.shape)}" if isinstance(km, Tensor) else type(km).__name__
        raise InvalidArgumentError(f"km must be the mean of k over the tokens, of shape {list(shape)}, got {what}")
    return first_q, first_k - km.float().reshape(shape)[:, :, None]


def _tokens(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2], dtype=torch.int64, device=x.device)


def _blocks(x: Tensor, tile: Any, part: Any) -> _Groups:
    """Tokens in groups of ``part``, in whole tiles."""
    plain = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in (tile, part))
    if not plain or tile % part or part % 8:
        raise InvalidArgumentError(f"tiles of {tile!r} tokens in parts of {part!r}: positive multiples of 8, and whole")
    return _tokens(x) // part, -(-x.shape[2] // tile) * (tile // part)


def _quantised(x: Tensor, groups: _Groups) -> tuple[Tensor, Tensor]:
    numbers, scales = quantize_tokens(x, *groups, 127)
    return numbers.to(torch.int8), scales


def _in_layout(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, tensor_layout: str) -> Packed:
    return _back(q, tensor_layout), q_scale, _back(k, tensor_layout), k_scale


def _back(x: Tensor, tensor_layout: str) -> Tensor:
    return (x if tensor_layout == "HND" else x.transpose(1, 2)).contiguous()

"""Masks that are said in a few numbers instead of a tensor of every pair: ``attn_mask`` takes them, too.

Kernels read most of them as they are (`docs/api.md` says which). Others who run a call take tensors, so `as_tensor`
writes them out, and refuses to where that would be gigabytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedError, shown
from .checks import check_kind, check_mask, fail

_MOST_BYTES = 1 << 30
"""Of what writing a mask out takes: 32K × 32K pairs of a `Window`, 11K × 11K distances (int64) of an `ALiBi`."""
_DISTANCE = 8
"""Bytes of a distance."""


@dataclass(frozen=True, eq=False)
class KeyPadding:
    """Batch entry b sees its first ``kv_lens[b]`` keys: sequences of different lengths, padded at their ends.

    kv_lens: int32 or int64 ``[B]`` on q's device. A length of 0 or less hides every key (the rows are 0, lse −inf), one
    above Nk hides none.

    >>> KeyPadding(torch.tensor([77, 12])).kv_lens.tolist()
    [77, 12]

    Raises:
        InvalidArgumentError: no such tensor.
    """

    kv_lens: Tensor

    def __post_init__(self) -> None:
        t = self.kv_lens
        if not isinstance(t, Tensor) or t.dim() != 1 or t.dtype not in (torch.int32, torch.int64):
            fail(f"kv_lens must be an int32 or int64 tensor of shape [B], got {_what(t)}")


@dataclass(frozen=True)
class Window:
    """Query i sees keys from ``i + s − left`` to ``i + s + right`` with ``s = Nk − Nq``; ``None``: as far as there are.

    The last query stands at the last key, as with bottom-right causality; ``Window(left, 0)`` is a causal window.

    >>> Window(4096, 0)
    Window(left=4096, right=0)

    Raises:
        InvalidArgumentError: a bound that is neither ``None`` nor an integer of at least 0.
    """

    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        for name, bound in (("left", self.left), ("right", self.right)):
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 0):
                fail(f"{name}={shown(bound)} is neither None nor a number of tokens (flash-attn's −1 is None here)")


@dataclass(frozen=True, eq=False)
class ALiBi:
    """Logits fall with the distance: ``− slope · |i + Nk − Nq − j|`` is added (Press et al., 2022).

    slopes: float32 ``[Hq]`` or ``[B, Hq]`` on q's device, none below 0 (which a kernel answers with NaN).

    Raises:
        InvalidArgumentError: no such tensor.
    """

    slopes: Tensor

    def __post_init__(self) -> None:
        t = self.slopes
        if not isinstance(t, Tensor) or t.dim() not in (1, 2) or t.dtype != torch.float32:
            fail(f"slopes must be a float32 tensor of shape [Hq] or [B, Hq], got {_what(t)}")


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Blocks of queries see blocks of keys.

    blocks: bool, broadcastable to ``[B, Hq, ⌈Nq / q_block⌉, ⌈Nk / kv_block⌉]``, on q's device; True: may see.

    Raises:
        InvalidArgumentError: no such tensor, or a block of no tokens.
    """

    blocks: Tensor
    q_block: int = 128
    kv_block: int = 128

    def __post_init__(self) -> None:
        t = self.blocks
        if not isinstance(t, Tensor) or t.dim() != 4 or t.dtype != torch.bool:
            fail(f"blocks must be a bool tensor of four dimensions [B, Hq, query blocks, key blocks], got {_what(t)}")
        for name, size in (("q_block", self.q_block), ("kv_block", self.kv_block)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                fail(f"{name}={shown(size)} is no number of tokens")


MaskType = KeyPadding | Window | ALiBi | BlockMask
Mask = Tensor | MaskType


def _what(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def tensors_of(mask: Mask | None) -> list[Tensor]:
    """The tensors that a mask holds."""
    if mask is None:
        return []
    if isinstance(mask, Tensor):
        return [mask]
    return [value for value in getattr(mask, "__dict__", {}).values() if isinstance(value, Tensor)]


def to_text(mask: Mask | None) -> str:
    """What an operator is told of a mask beside its tensors.

    >>> to_text(Window(128, None)), to_text(BlockMask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 64, 128))
    ('window:128,none', 'block:64,128')
    """
    # (one by one: torch.compile traces neither match nor unions in torch 2.5)
    if mask is None:
        return "none"
    if isinstance(mask, KeyPadding):
        return "key_padding"
    if isinstance(mask, Window):
        return f"window:{_bound(mask.left)},{_bound(mask.right)}"
    if isinstance(mask, ALiBi):
        return "alibi"
    if isinstance(mask, BlockMask):
        return f"block:{mask.q_block},{mask.kv_block}"
    return "tensor"


def _bound(tokens: int | None) -> str:
    return "none" if tokens is None else str(tokens)


def from_text(text: str, tensors: Sequence[Tensor]) -> Mask | None:
    """The mask that `to_text` and `tensors_of` were taken from.

    >>> from_text("window:128,none", [])
    Window(left=128, right=None)
    """
    kind, _, numbers = text.partition(":")
    values = [None if n == "none" else int(n) for n in numbers.split(",")] if numbers else []
    if kind == "none":
        return None
    if kind == "window":
        return Window(*values)
    (tensor,) = tensors
    if kind == "block":
        q_block, kv_block = (n or 0 for n in values)
        return BlockMask(tensor, q_block, kv_block)
    if kind == "key_padding":
        return KeyPadding(tensor)
    return ALiBi(tensor) if kind == "alibi" else tensor


def checked_mask(mask: Mask | None, q: Tensor, k: Tensor) -> Mask | None:
    """A mask of ``[B, H, N, D]`` tensors as requests have it: a tensor with four dimensions, or a type but `BlockMask`.

    Raises:
        InvalidArgumentError: it does not fit q and k.
        UnsupportedError: blocks that written out would take more than 1 GB.
    """
    batch, heads, rows, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if mask is None or isinstance(mask, Tensor):
        return check_mask(mask, q, (batch, heads, rows, keys))
    if not isinstance(mask, (KeyPadding, Window, ALiBi, BlockMask)):
        fail(f"attn_mask must be a torch.Tensor, KeyPadding, Window, ALiBi, BlockMask or None, got {_what(mask)}")
    for t in tensors_of(mask):
        check_kind("attn_mask", t)
        if t.device != q.device:
            fail(f"attn_mask is on {t.device}, q on {q.device}")
    if isinstance(mask, BlockMask):
        return check_mask(_blocks(mask, (batch, heads, rows, keys)), q, (batch, heads, rows, keys))
    if isinstance(mask, KeyPadding) and mask.kv_lens.shape[0] != batch:
        fail(f"kv_lens has {mask.kv_lens.shape[0]} lengths, and q has a batch of {batch}")
    if isinstance(mask, ALiBi):
        *batches, of_heads = mask.slopes.shape
        if of_heads != heads or any(size not in (1, batch) for size in batches):
            fail(f"slopes of shape {tuple(mask.slopes.shape)}, and q has a batch of {batch} and {heads} heads")
    return mask


def shape_and_dtype(
    mask: Mask | None, q: Tensor, k: Tensor
) -> tuple[tuple[int, int, int, int] | None, torch.dtype | None]:
    """Of a `checked_mask`, as it would be written out: its shape, 1 where it repeats, and its dtype."""
    if mask is None:
        return None, None
    rows, keys = q.shape[2], k.shape[2]
    if isinstance(mask, KeyPadding):
        return (mask.kv_lens.shape[0], 1, 1, keys), torch.bool
    if isinstance(mask, Window):
        return (1, 1, rows, keys), torch.bool
    if isinstance(mask, ALiBi):
        batches = 1 if mask.slopes.dim() == 1 else mask.slopes.shape[0]
        return (batches, mask.slopes.shape[-1], rows, keys), mask.slopes.dtype
    tensor = mask.blocks if isinstance(mask, BlockMask) else mask
    batch, heads, rows, keys = tensor.shape
    return (batch, heads, rows, keys), tensor.dtype


def as_tensor(mask: Mask | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A `checked_mask` written out, broadcastable to ``[B, Hq, Nq, Nk]``.

    Raises:
        UnsupportedError: it would take more than 1 GB.
    """
    if mask is None or isinstance(mask, Tensor):
        return mask
    batch, heads, rows, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if isinstance(mask, KeyPadding):
        return (_positions(keys, q) < mask.kv_lens[:, None])[:, None, None]
    if isinstance(mask, BlockMask):
        return _blocks(mask, (batch, heads, rows, keys))
    if isinstance(mask, Window):
        _check_size(rows * keys, mask)
        visible = q.new_ones(rows, keys, dtype=torch.bool)
        if mask.left is not None:
            visible = visible.triu_(keys - rows - mask.left)
        if mask.right is not None:
            visible = visible.tril_(keys - rows + mask.right)
        return visible[None, None]
    _check_size(mask.slopes.numel() * rows * keys * _DISTANCE, mask)
    distance = _positions(keys, q) - _positions(rows, q)[:, None] - (keys - rows)
    slopes = mask.slopes if mask.slopes.dim() == 2 else mask.slopes[None]
    return -slopes[:, :, None, None] * distance.abs()


def _positions(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device=like.device)


def _blocks(mask: BlockMask, shape: tuple[int, int, int, int]) -> Tensor:
    batch, heads, rows, keys = shape
    wanted = (batch, heads, -(-rows // mask.q_block), -(-keys // mask.kv_block))
    if any(size not in (1, want) for size, want in zip(mask.blocks.shape, wanted, strict=True)):
        fail(f"blocks of shape {tuple(mask.blocks.shape)} do not broadcast to {list(wanted)}")
    _check_size(mask.blocks.shape[0] * mask.blocks.shape[1] * rows * keys, mask)
    whole = mask.blocks.expand(-1, -1, *wanted[2:])
    whole = whole.repeat_interleave(mask.q_block, dim=2)[:, :, :rows]
    return whole.repeat_interleave(mask.kv_block, dim=3)[..., :keys]


def _check_size(size: int, mask: MaskType) -> None:
    if size > _MOST_BYTES:
        raise UnsupportedError(f"{type(mask).__name__}: {_too_large(size)}")


def _too_large(size: int) -> str:
    return f"written out as a tensor it takes {size / 2**30:.1f} GB (more than {_MOST_BYTES >> 30} GB is refused)"


def size_reasons(said: str, shape: tuple[int, int, int, int] | None) -> list[str]:
    """Why a mask of this text (`to_text`) and shape is not written out."""
    size = 0 if shape is None else shape[0] * shape[1] * shape[2] * shape[3]
    if said.startswith("window"):
        return [f"the window: {_too_large(size)}"] if size > _MOST_BYTES else []
    if said == "alibi":
        return [f"ALiBi: {_too_large(size * _DISTANCE)}"] if size * _DISTANCE > _MOST_BYTES else []
    return []

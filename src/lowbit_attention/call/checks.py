"""Argument checks. Each error names the argument, its value, and what would have been right."""

from __future__ import annotations

import itertools
import math
import numbers
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from ..errors import InvalidArgumentError
from ..recipes.definition import Recipe
from ..recipes.formats import FP32_MAX
from ..recipes.named import EXACT

LAYOUTS = ("HND", "NHD")
CAUSAL_ALIGNMENTS = ("bottom_right", "top_left")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRAINING = ("refuse", "exact")
ON_EMULATION = ("warn", "error", "allow")
TRACED = (
    "is recorded by torch.jit.trace, which would keep what this library reads from it as constants; "
    "use torch.export or torch.compile"
)
TRANSFORMED = (
    "is inside torch.func.vmap, grad or another transform, which this library does not support; "
    "for vmap, give the mapped dimension as a batch dimension"
)


def fail(message: str) -> NoReturn:
    """Raise `InvalidArgumentError`."""
    raise InvalidArgumentError(message)


def check_flag(name: str, value: Any) -> None:
    """A bool and nothing that merely looks like one (a mask passed by position, say)."""
    if not isinstance(value, bool):
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        fail(f"{name} must be True or False, got {what}")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """One of a few strings."""
    if not isinstance(value, str) or value not in allowed:
        fail(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def check_alignment(is_causal: bool, causal_alignment: str | None) -> None:
    """An alignment is only given together with causality."""
    if causal_alignment is None:
        return
    check_choice("causal_alignment", causal_alignment, CAUSAL_ALIGNMENTS)
    if not is_causal:
        fail(f"causal_alignment={causal_alignment!r} means nothing without is_causal=True")


def resolve_scale(name: str, value: Any, head_dim: int) -> float:
    """``value``, or ``1 / √head_dim`` for ``None``; numpy's numbers and tensors without dimensions are numbers, too."""
    if value is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):  # (of a traced shape; torch 2.5 traces no unions)
        return cast("float", value)
    number: Any = value
    if isinstance(value, Tensor) and value.dim() == 0 and not (value.is_complex() or value.dtype == torch.bool):
        if value.requires_grad:
            fail(f"{name} is a tensor that requires a gradient, which attention does not give; take its .item()")
        if value.is_meta:
            fail(f"{name} is on meta and holds no number")
        number = value.item()
    try:
        if not isinstance(number, bool) and isinstance(number, numbers.Real) and math.isfinite(number):
            return float(number)
    except OverflowError:  # an integer that no float can hold
        value = f"an integer of {number.bit_length()} bits" if isinstance(number, int) else type(number).__name__
    fail(f"{name} must be a finite number or None, got {shown(value)}")


def shown(value: Any) -> str:
    """A value in an error: what it is, and nothing that could be endless."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" + (f" holding {value.item()}" if value.numel() == 1 else "")
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def check_kind(name: str, t: Tensor) -> None:
    """A tensor whose elements lie in its own memory by strides: what a kernel, and an emulation, can read."""
    if torch.compiler.is_compiling():  # (the operator sees what is left after tracing)
        return
    if torch._C._get_tracing_state() is not None:
        fail(f"{name} {TRACED}")
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        fail(f"{name} {TRANSFORMED}")
    if t.is_nested or t.layout is not torch.strided:
        kind = "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
        fail(f"{name} is a {kind} tensor; attention_varlen takes sequences of different lengths")
    cls = type(t)
    if cls is Tensor or isinstance(t, FakeTensor):
        return
    of_cls, *plain = (getattr(c.__torch_function__, "__func__", c.__torch_function__) for c in (cls, Tensor, Parameter))
    if cls.__torch_dispatch__ is not Tensor.__torch_dispatch__ or of_cls not in plain:
        fail(f"{name} is a {cls.__name__}, a tensor subclass that dispatches by itself; give its plain tensor")


def _named(q: Any, k: Any, v: Any) -> tuple[tuple[str, Any], ...]:
    return (("q", q), ("k", k), ("v", v))


def check_tensors(q: Tensor, k: Tensor, v: Tensor, dims: int, axes: str) -> None:
    """Tensors of equal floating dtype and device with ``dims`` dimensions (named ``axes`` in the error)."""
    for name, t in _named(q, k, v):
        if not isinstance(t, Tensor):
            fail(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        check_kind(name, t)
        if t.dim() != dims:
            fail(f"{name} must have {dims} dimensions {axes}, got shape {tuple(t.shape)}")
        if t.dtype not in FLOAT_DTYPES:
            fail(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        fail(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        fail(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def check_hnd(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes of ``[B, H, N, D]`` tensors that can attend to each other."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} (as [B, H, N, D])"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        fail(f"q, k and v have different batch sizes: {shapes}")
    if k.shape[1] != v.shape[1]:
        fail(f"k and v have different numbers of heads: {shapes}")
    if k.shape[2] != v.shape[2]:
        fail(f"k and v have different lengths: {shapes}")
    check_heads(q.shape[1], k.shape[1], shapes)
    check_head_dims(q.shape[3], k.shape[3], v.shape[3], shapes)


def check_heads(q_heads: int, kv_heads: int, shapes: str) -> None:
    """Every K/V head serves the same number of query heads."""
    if (kv_heads == 0) != (q_heads == 0) or (kv_heads and q_heads % kv_heads):
        fail(f"the number of query heads, {q_heads}, is no multiple of that of k and v, {kv_heads}: {shapes}")


def check_head_dims(q_dim: int, k_dim: int, v_dim: int, shapes: str) -> None:
    """Q and K share a head dimension; none is empty."""
    if q_dim != k_dim:
        fail(f"q and k have different head dimensions: {shapes}")
    if q_dim == 0 or v_dim == 0:
        fail(f"the head dimension must be at least 1: {shapes}")


def check_mask(mask: Any, q: Tensor, shape: tuple[int, int, int, int]) -> Tensor | None:
    """The mask with four dimensions that broadcast to ``shape`` = ``[B, Hq, Nq, Nk]``; what repeats has size 1."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        fail(f"attn_mask must be a torch.Tensor or None, got {type(mask).__name__}")
    check_kind("attn_mask", mask)
    if mask.dtype != torch.bool and mask.dtype not in FLOAT_DTYPES:
        fail(f"attn_mask must be bool (True: may see) or floating (added to the logits), got {mask.dtype}")
    if mask.device != q.device:
        fail(f"attn_mask is on {mask.device}, q on {q.device}")
    try:
        expanded: Tensor = mask.expand(shape)  # only to see whether it can be
    except RuntimeError:
        raise InvalidArgumentError(
            f"attn_mask of shape {tuple(mask.shape)} does not broadcast to [B, Hq, Nq, Nk] = {list(shape)}"
        ) from None
    return expanded[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in expanded.stride())]


def check_cu_kind(name: str, cu: Any, device: torch.device) -> None:
    """Offsets of sequences, whatever they are."""
    if not isinstance(cu, Tensor) or cu.dim() != 1 or cu.numel() < 1 or cu.dtype not in (torch.int32, torch.int64):
        what = f"{cu.dtype} of shape {tuple(cu.shape)}" if isinstance(cu, Tensor) else type(cu).__name__
        fail(f"{name} must be a one-dimensional int32 or int64 tensor of offsets, got {what}")
    if cu.device != device:
        fail(f"{name} is on {cu.device}, q on {device}")
    if not torch.compiler.is_compiling():
        check_kind(name, cu)
        if cu.is_meta or isinstance(cu, FakeTensor):
            fail(f"{name} holds no numbers (a meta or fake tensor); attention takes padded sequences and a mask")


def check_cu_seqlens(name: str, cu: Tensor, total: int) -> list[int]:
    """Offsets ``0 ≤ c₀ ≤ c₁ ≤ … ≤ c_B ≤ total`` as Python integers."""
    offsets: list[int] = cu.tolist()
    if offsets[0] < 0 or offsets[-1] > total or any(a > b for a, b in itertools.pairwise(offsets)):
        fail(f"{name} must rise, from 0 to at most {total}, the number of tokens, got {offsets}")
    return offsets


def check_max_kind(name: str, given: Any) -> None:
    """A number, a tensor (which nobody reads) or nothing, as a longest sequence's length."""
    if given is None or isinstance(given, Tensor):
        return
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        fail(f"{name}={given!r} is not a number of tokens")


def check_max_seqlen(name: str, given: int | Tensor | None, offsets: list[int]) -> None:
    """A given maximum must not be below the longest sequence's length."""
    longest = max((b - a for a, b in itertools.pairwise(offsets)), default=0)
    if given is not None and not isinstance(given, Tensor) and given < longest:
        fail(f"{name}={given!r} is not an integer of at least {longest}, the longest sequence's length")


def for_scale(name: str, scale: float, recipe: Recipe | None) -> Recipe | None:
    """The recipe of a call with this scale; beyond float32's range "auto" is exact.

    Raises:
        InvalidArgumentError: such a scale with a quantising recipe.
    """
    if abs(scale) <= _LARGEST_SCALE or (recipe is not None and recipe.is_exact):
        return recipe
    if recipe is not None:
        raise InvalidArgumentError(
            f"{name}={scale!r} is beyond {_LARGEST_SCALE:.2g}, and quantised attention computes in float32; "
            "recipe='exact' takes it"
        )
    return EXACT


_LARGEST_SCALE = FP32_MAX / 2
"""Times log2(e), as kernels take it, it is a float32 number."""

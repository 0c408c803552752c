"""`Request`: what one attention call asks for, without its tensors. Implementations decide on it alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..recipes.definition import Recipe
from ..recipes.machine import Machine, resolve_machine
from .mask_types import Mask, shape_and_dtype, tensors_of, to_text
from .memo import Memo

MaskKind = Literal["none", "bool", "float"]
OnEmulation = Literal["warn", "error", "allow"]


@dataclass(frozen=True)
class Request:
    """One call; lengths are tokens.

    ``recipe`` is ``None`` for "auto". ``causal_offset``: query i sees key j if ``j ≤ i + causal_offset``; it is the
    bottom-right alignment's ``Nk − Nq`` or the top-left's 0; ``bottom_right`` tells which. ``layout`` is the order in
    which the caller wants the output to lie in memory. ``needs_grad``: a derivative is asked for, with ``forward_ad``
    by forward-mode AD. ``mask_shape``: 1 where the mask repeats. ``mask_text``: how it is given (`to_text`); its kind,
    dtype and shape are those of the tensor that it says. ``sequences``: if not 0, so many sequences of any lengths lie
    one behind the other; then ``batch`` is their number, too, and lengths are those of all together.
    ``on_emulation``: what an emulation does that ``machine`` does not ask for.
    """

    recipe: Recipe | None
    machine: Machine | None
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device
    is_causal: bool = False
    bottom_right: bool = True
    mask: MaskKind = "none"
    mask_dtype: torch.dtype | None = None
    mask_shape: tuple[int, int, int, int] | None = None
    mask_text: str = "tensor"
    return_lse: bool = False
    needs_grad: bool = False
    forward_ad: bool = False
    dropout_p: float = 0.0
    layout: Literal["HND", "NHD"] = "HND"
    sequences: int = 0
    on_emulation: OnEmulation = "warn"

    @property
    def refuses_emulation(self) -> bool:
        """Whether an emulation is an error."""
        return self.on_emulation == "error" and self.recipe is not None and self.machine is None

    @property
    def warns_of_emulation(self) -> bool:
        """Whether an emulation is warned of."""
        unasked = self.on_emulation == "warn" and self.recipe is not None and self.machine is None
        return unasked and is_gpu(self.device)

    @property
    def causal_offset(self) -> int | None:
        """How far past its own index a query sees, ``None`` without causality (of sequences: each has its own)."""
        if not self.is_causal:
            return None
        return self.kv_len - self.q_len if self.bottom_right else 0

    def __str__(self) -> str:
        heads = f"{self.q_heads}" if self.q_heads == self.kv_heads else f"{self.q_heads}/{self.kv_heads}"
        dim = f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim}/{self.v_head_dim}"
        length = f"{self.q_len}" if self.q_len == self.kv_len else f"{self.q_len}(q), {self.kv_len}(kv)"
        words = [f"{self.batch} × {heads} heads × {length} × {dim}", str(self.dtype).removeprefix("torch.")]
        words.append(device_name(self.device))
        if self.is_causal:
            words.append("causal, bottom-right" if self.bottom_right else "causal, top-left")
        words += [f"{self.sequences} sequences"] if self.sequences else []
        if self.mask != "none":
            words.append(f"{self.mask if self.mask_text == 'tensor' else self.mask_text} mask")
        words += ["with lse"] if self.return_lse else []
        words += ["needs forward-mode gradients" if self.forward_ad else "needs gradients"] if self.needs_grad else []
        words += [f"dropout {self.dropout_p}"] if self.dropout_p else []
        return ", ".join(words)


def is_gpu(device: torch.device) -> bool:
    """Whether a caller expects a kernel there. (On a CPU a named recipe means its emulation.)"""
    return device.type != "cpu"


@lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """The card's name, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a derivative of a computation on these tensors is asked for: autograd would record it, or has a tangent
    for it (forward mode)."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        return True
    return has_tangent(*tensors)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of them is a dual tensor of forward-mode AD, which ``torch.no_grad`` does not end."""
    if forward_ad._current_level < 0:  # (no block of forward-mode AD anywhere: nearly always)
        return False
    return any(isinstance(t, Tensor) and _tangent(t) is not None for t in tensors)


def _tangent(t: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(t).tangent  # type: ignore[no-untyped-call]
    return tangent


def make_request(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, recipe: Recipe | None, machine: Machine | None, **options: Any
) -> Request:
    """The request of checked ``[B, H, N, D]`` tensors and of a `checked_mask`.

    Calls that are alike get the same object.
    """
    if recipe is not None and machine is None:
        recipe.check_geometry(resolve_machine(None).geometry)
    if options["is_causal"] and (k.shape[2] - q.shape[2] if options["bottom_right"] else 0) >= k.shape[2] - 1:
        options["is_causal"] = False  # every query sees every key: a single one, as in decoding
    shape, mask_dtype = shape_and_dtype(mask, q, k)
    kind: Literal["none", "bool", "float"] = "none" if mask is None else "bool" if mask_dtype == torch.bool else "float"
    request = Request(
        recipe=recipe,
        machine=machine,
        batch=q.shape[0],
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q.shape[2],
        kv_len=k.shape[2],
        head_dim=q.shape[3],
        v_head_dim=v.shape[3],
        dtype=q.dtype,
        device=q.device,
        mask=kind,
        mask_dtype=mask_dtype,
        mask_shape=shape,
        mask_text="tensor" if mask is None else to_text(mask),
        needs_grad=wants_grad(q, k, v, *tensors_of(mask)),
        forward_ad=has_tangent(q, k, v, *tensors_of(mask)),
        **options,
    )
    if torch.compiler.is_compiling():  # (a traced memo is guarded: any new call would compile this again)
        return request
    return _known.get(request) or _known.put(request, request)


def of_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: int,
    packed: bool,
    recipe: Recipe | None,
    machine: Machine | None,
    **options: Any,
) -> Request:
    """The request of ``count`` sequences in checked ``[tokens, heads, channels]`` tensors: as they lie (``packed``), or
    as a batch of sequences of their mean length, by which to choose."""
    if recipe is not None and machine is None:
        recipe.check_geometry(resolve_machine(None).geometry)
    q_len, kv_len = (len(t) if packed else -(-len(t) // count) for t in (q, k))
    request = Request(
        recipe=recipe,
        machine=machine,
        batch=count,
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q_len,
        kv_len=kv_len,
        head_dim=q.shape[2],
        v_head_dim=v.shape[2],
        dtype=q.dtype,
        device=q.device,
        needs_grad=wants_grad(q, k, v),
        forward_ad=has_tangent(q, k, v),
        layout="NHD",
        sequences=count if packed else 0,
        **options,
    )
    return _known.get(request) or _known.put(request, request)


_known: Memo[Request] = Memo()
"""One request for calls that are alike: choices and plans are remembered by which object it is."""

"""The implementations: who can run a request, and how. (`registry` holds them all, kernels in front.)"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..call.masks import Masking
from ..call.request import Request
from ..recipes.definition import Recipe
from ..recipes.machine import DEFAULT_MACHINE
from ..reference.attention import emulate
from ..reference.exact import exact

MAX_HEAD_DIM = 256
"""The largest head dimension of quantised attention."""

torch_sdpa = torch._C._nn.scaled_dot_product_attention
"""Torch's own function, whatever ``torch.nn.functional`` has been told to call instead (`integrations.intercept`)."""

Output = tuple[Tensor, Tensor | None]


def call_torch(function: Callable[..., Tensor], query: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Torch's own function for a rerouted call.

    A jagged tensor reaches a handler with the subclass's overrides off, and they are what can run it.
    """
    if isinstance(query, Tensor) and query.is_nested:
        with torch._C._EnableTorchFunction():
            return function(query, *arguments, **options)
    return function(query, *arguments, **options)


class Implementation(ABC):
    """One way to run attention. ``is_kernel``: made for speed, so ``recipe="auto"`` may pick it."""

    name: ClassVar[str]
    is_kernel: ClassVar[bool] = False
    auto_recipes: ClassVar[tuple[Recipe, ...]] = ()
    """For a kernel: the recipes ``auto`` may run on it, the fastest first (see `auto_recipes_for`)."""
    decides_by_request: ClassVar[bool] = True
    """Whether its answers depend on the request and recipe alone, so that a choice may be remembered."""

    @abstractmethod
    def not_supported_reasons(self, request: Request, recipe: Recipe) -> tuple[str, ...]:
        """Every reason why this implementation cannot run ``request`` with ``recipe``; empty if it can."""

    @abstractmethod
    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float, request: Request, recipe: Recipe
    ) -> Output:
        """Attention of ``[B, H, N, D]`` tensors: output in q's dtype, and lse (float32) if the request asks for it.

        ``mask`` has four dimensions that broadcast to ``[B, Hq, Nq, Nk]``.
        """

    def reads(self, request: Request) -> bool:
        """Whether `run` takes the request's mask as it is given: a type of `call.mask_types`, not written out."""
        del request
        return False

    def auto_recipes_for(self, request: Request) -> tuple[Recipe, ...]:
        """The recipes ``auto`` may run for ``request``, the fastest first."""
        del request
        return self.auto_recipes

    def not_worth_reasons(self, request: Request) -> tuple[str, ...]:
        """Why ``auto`` should not use this kernel for ``request``, though it could run."""
        del request
        return ()

    def remark(self, request: Request) -> str:
        """What `explain` says when this implementation is chosen for ``request``."""
        del request
        return "supports the request"

    def expected_speedup(self, request: Request, recipe: Recipe) -> float | None:
        """Torch's time over this implementation's, by what was measured on this card; ``None`` if nothing was."""
        del request, recipe
        return None


class TorchSDPA(Implementation):
    """PyTorch's own scaled_dot_product_attention."""

    name = "torch_sdpa"

    def not_supported_reasons(self, request: Request, recipe: Recipe) -> tuple[str, ...]:
        reasons = []
        if not recipe.is_exact:
            reasons.append(f"it does not quantise, and recipe {recipe} does")
        if request.return_lse:
            reasons.append("it does not return the log-sum-exp")
        if not _only_torch_can(request):  # (else an explicit mask says what its flags cannot)
            if request.is_causal and request.causal_offset != 0:
                reasons.append(
                    f"its causality is top-left, and bottom-right differs: Nq={request.q_len}, Nk={request.kv_len}"
                )
            if request.is_causal and request.mask != "none":
                reasons.append("it takes either is_causal or attn_mask, not both")
        if request.mask == "float" and not _takes(request.mask_dtype, request.dtype):
            reasons.append(f"its float mask must have q's dtype {request.dtype}, got {request.mask_dtype}")
        return tuple(reasons)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float, request: Request, recipe: Recipe
    ) -> Output:
        if request.batch == 0 or request.q_heads == 0:  # torch 2.11 divides by the number of heads and dies
            return q.new_zeros(*q.shape[:3], v.shape[3]), None
        if q.dtype != torch.float64 and q.device.type != "mps" and not is_ordinary(sm_scale):
            return self._in_float64(q, k, v, mask, sm_scale, request, recipe)
        if q.dtype != torch.float64 and q.device.type == "cpu" and _may_leave_float32(q, k, sm_scale):
            return self._in_float64(q, k, v, mask, sm_scale, request, recipe)
        given = q, k, v, mask, sm_scale
        if sm_scale <= 0:  # torch scales after it has hidden keys, and −∞ · 0 is NaN, −∞ · −1 is ∞
            q, sm_scale = (-q, -sm_scale) if sm_scale < 0 else (q * 0.0, 1.0)
        group = request.q_heads // request.kv_heads
        if group > 1:  # (enable_gqa came with torch 2.5)
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        is_causal = request.is_causal
        if is_causal and (mask is not None or request.causal_offset != 0):
            visible = q.new_ones(request.q_len, request.kv_len, dtype=torch.bool).tril(request.causal_offset or 0)
            mask, is_causal = _and_visible(mask, visible), False
        out = torch_sdpa(q, k, v, attn_mask=mask, dropout_p=request.dropout_p, is_causal=is_causal, scale=sm_scale)
        if mask is not None and request.kv_len:  # torch below 2.5 gives NaN for a row that sees no key
            out = out.masked_fill(_hides_all(mask), 0.0)
        if q.device.type == "cpu" and q.dtype != torch.float64 and _left_float32(out):
            return self._in_float64(*given, request, recipe)
        return out, None

    def _in_float64(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float, request: Request, recipe: Recipe
    ) -> Output:
        """The same where Q·K (or P·V) leaves what float32 holds and the answer does not."""
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.double()
        out, _ = self.run(q.double(), k.double(), v.double(), mask, sm_scale, request, recipe)
        return out.to(q.dtype), None


def _may_leave_float32(q: Tensor, k: Tensor, sm_scale: float) -> bool:
    """Whether the logits can be larger than float32 resolves, for what their parts can be on the way.

    The output does not tell: torch's flash kernel takes a row of NaN or −∞ for one that sees no key, and writes zeros;
    and where a sum overflows to −∞ on its way to something large, the second best key wins.
    """
    if q.numel() == 0 or k.numel() == 0 or not (_is_plain(q) and _is_plain(k)):
        return False
    q_max, k_max = _largest(q), _largest(k)
    logits = q_max * k_max * q.shape[-1] * abs(sm_scale)
    return not (logits <= _RESOLVED and q_max <= _HARMLESS and k_max <= _HARMLESS)  # (NaN is not)


def _left_float32(out: Tensor) -> bool:
    """Whether an output is not finite (or so large that its sum is not), where it can be looked at for nothing."""
    return _is_plain(out) and not math.isfinite(out.detach().sum(dtype=torch.float32).item())


def _is_plain(tensor: Tensor) -> bool:
    """Whether this is a tensor with numbers to look at: nothing is being compiled, traced or transformed."""
    if torch.compiler.is_compiling() or type(tensor.detach()) is not Tensor:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and torch._C._get_tracing_state() is None


def _largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN if there is one."""
    low, high = tensor.detach().aminmax()
    return max(-low.item(), high.item())


def _only_torch_can(request: Request) -> bool:
    return request.needs_grad or request.dropout_p > 0


def _and_visible(mask: Tensor | None, visible: Tensor) -> Tensor:
    if mask is None:
        return visible
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)


@lru_cache(maxsize=8)
def _takes(mask_dtype: torch.dtype | None, dtype: torch.dtype) -> bool:
    """Whether this torch takes a float mask beside q's dtype (float32 beside 16 bits came after 2.4)."""
    if mask_dtype == dtype:
        return True
    if mask_dtype != torch.float32 or dtype not in (torch.float16, torch.bfloat16):
        return False
    q = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16, device="cpu")
    try:
        torch_sdpa(q, q, q, attn_mask=torch.zeros(1, 1, dtype=mask_dtype, device="cpu"))
    except RuntimeError:
        return False
    return True


class TiledExact(Implementation):
    """Exact attention tile by tile, in float64 (float32 on GPUs for 16-bit inputs): what PyTorch's own does not do."""

    name = "tiled_exact"

    def not_supported_reasons(self, request: Request, recipe: Recipe) -> tuple[str, ...]:
        reasons = []
        if not recipe.is_exact:
            reasons.append(f"it does not quantise, and recipe {recipe} does")
        return (*reasons, *inference_only(request))

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float, request: Request, recipe: Recipe
    ) -> Output:
        with torch.no_grad():
            masking = Masking(request.causal_offset, mask)
            out, lse = exact(q, k, v, sm_scale=sm_scale, masking=masking, dtype=_exact_dtype(q, sm_scale))
        return out.to(q.dtype), lse.float() if request.return_lse else None


_ORDINARY = 2.0**16
"""Scales between its inverse and it: beyond, Q·K or the scale itself may leave float32 though the logits do not."""


_RESOLVED = 2.0**24
"""Logits beyond it are further apart in float32 than 1. (Those of trained models stay far below.)"""

_HARMLESS = 2.0**64
"""Larger entries overflow when torch scales them, and turn partners that hardware flushes to zero into something."""


def is_ordinary(sm_scale: float) -> bool:
    """Whether float32 arithmetic takes this scale."""
    return sm_scale == 0 or 1 / _ORDINARY <= abs(sm_scale) <= _ORDINARY


def _exact_dtype(q: Tensor, sm_scale: float) -> torch.dtype:
    if q.device.type == "mps":  # (which has no float64)
        return torch.float32
    fast = q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and is_ordinary(sm_scale)
    return torch.float32 if fast else torch.float64


class Emulation(Implementation):
    """Any named recipe on any device, with the numbers of the machine that ``like`` names."""

    name = "emulation"

    def remark(self, request: Request) -> str:
        remark = f"no kernel runs it here: emulated as {request.machine or DEFAULT_MACHINE}"
        return f"{remark}, far slower than a kernel, with one warning" if request.warns_of_emulation else remark

    def not_supported_reasons(self, request: Request, recipe: Recipe) -> tuple[str, ...]:
        reasons = []
        if recipe.is_exact:
            reasons.append("it emulates quantisation, and recipe exact has none")
        if request.dtype == torch.float64:
            reasons.append("quantised attention computes in float32 and would lose float64's digits; cast the inputs")
        if max(request.head_dim, request.v_head_dim) > MAX_HEAD_DIM:
            reasons.append(f"head_dim {max(request.head_dim, request.v_head_dim)} is above {MAX_HEAD_DIM}")
        return (*reasons, *inference_only(request))

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float, request: Request, recipe: Recipe
    ) -> Output:
        machine = request.machine or DEFAULT_MACHINE
        with torch.no_grad():
            result = emulate(
                q, k, v, recipe, sm_scale=sm_scale, masking=Masking(request.causal_offset, mask), machine=machine
            )
        limit = torch.finfo(q.dtype).max  # rounding P up must not push the largest V over the edge
        return result.out.clamp(-limit, limit).to(q.dtype), result.lse if request.return_lse else None


def _hides_all(mask: Tensor) -> Tensor:
    """Rows of a mask that hide every key, ``[..., Nq, 1]``; no copy of the mask is made."""
    if mask.dtype == torch.bool:
        return ~mask.any(dim=-1, keepdim=True)
    return mask.amax(dim=-1, keepdim=True) == -torch.inf


def inference_only(request: Request) -> list[str]:
    """Why a call that wants gradients or dropout is refused."""
    reasons = []
    if request.forward_ad:
        reasons.append("it has no forward-mode derivative (make_dual, jvp, jacfwd, hessian): use recipe='exact'")
    elif request.needs_grad:
        reasons.append("it has no gradient: call it under torch.no_grad(), or use recipe='exact'")
    if request.dropout_p:
        reasons.append(f"it has no dropout, and dropout_p={request.dropout_p}")
    return reasons

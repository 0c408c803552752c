"""`CheckedCall`: a call of torch's function whose arguments were looked at, in the form that implementations take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..recipes.definition import Recipe
from ..recipes.machine import Machine
from . import checks
from .memo import Memo
from .request import OnEmulation, Request, make_request, wants_grad
from .torch_call import TorchCall, is_by_token


class CheckedCall(NamedTuple):
    """``[B, H, N, D]`` views, the mask's four dimensions, and the leading dimensions of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sm_scale: float
    request: Request
    lead: list[int]

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, Request]:
        """What an implementation is given (`backends.dispatch.Chosen.run`)."""
        return self.q, self.k, self.v, self.mask, self.sm_scale, self.request

    def finish(self, out: Tensor) -> Tensor:
        """The output, ``[*lead, L, Ev]``, contiguous in the layout of the request."""
        out = out.transpose(1, 2).contiguous().transpose(1, 2) if self.request.layout == "NHD" else out.contiguous()
        return out if len(self.lead) == 2 else out.reshape(*self.lead, *out.shape[2:])


def check_call(
    call: TorchCall,
    recipe: Recipe | None,
    machine: Machine | None,
    return_lse: bool = False,
    on_emulation: OnEmulation = "warn",
) -> CheckedCall:
    """Check the arguments of a call, and make the request of it.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device or value.
    """
    key = _memo_key(call, recipe, machine, return_lse, on_emulation)
    if key is not None and (known := _known.get(key)) is not None:
        request, sm_scale, lead = known
        return CheckedCall(call.query, call.key, call.value, None, sm_scale, request, lead)
    _check(call)
    call = call.in_autocast()
    lead, kv_lead = call.leading()
    q, k, v = _flatten(call.query, lead), _flatten(call.key, kv_lead), _flatten(call.value, kv_lead)
    checks.check_tensors(q, k, v, 4, "[B, H, N, D]")
    checks.check_hnd(q, k, v)
    mask = _flatten_mask(call.attn_mask, lead, q, k)
    sm_scale = checks.resolve_scale("scale", call.scale, q.shape[3])
    recipe = checks.for_scale("scale", sm_scale, recipe)
    # Memory in the order of a transposed [B, N, H, D] comes back in that order: what models do next is no copy then.
    layout = "NHD" if is_by_token(call.query) else "HND"
    request = make_request(
        q, k, v, mask, recipe, machine, is_causal=call.is_causal, bottom_right=False, dropout_p=float(call.dropout_p),
        layout=layout, return_lse=return_lse, on_emulation=on_emulation,
    )  # fmt: skip
    if key is not None and all(a.shape == b.shape for a, b in ((q, call.query), (k, call.key), (v, call.value))):
        _known.put(key, (request, sm_scale, lead))
    return CheckedCall(q, k, v, mask, sm_scale, request, lead)


_known: Memo[tuple[Request, float, list[int]]] = Memo()
"""Of calls that passed every check: request, scale and leading dimensions, by all that the checks look at."""


def _memo_key(
    call: TorchCall, recipe: Recipe | None, machine: Machine | None, return_lse: bool, on_emulation: OnEmulation
) -> tuple[object, ...] | None:
    """What identifies a plain call; ``None`` for one that is looked at each time."""
    if torch.compiler.is_compiling():
        return None
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = call
    if attn_mask is not None or type(dropout_p) is not float or dropout_p:
        return None
    if not type(query) is type(key) is type(value) is Tensor or query.is_nested or key.is_nested or value.is_nested:
        return None
    if not query.layout is key.layout is value.layout is _STRIDED:
        return None
    strides = query.stride()
    if len(strides) != 4 or key.dim() != 4 or value.dim() != 4 or query.is_meta:
        return None
    if torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if type(is_causal) is not bool or type(enable_gqa) is not bool or (scale is not None and type(scale) is not float):
        return None
    if torch._C._is_any_autocast_enabled() or wants_grad(query, key, value):
        return None
    return (
        query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype,
        query.device, key.device, value.device, strides[1] < strides[2],
        is_causal, scale, enable_gqa, recipe, machine, return_lse, on_emulation,
    )  # fmt: skip


_STRIDED = torch.strided


def _check(call: TorchCall) -> None:
    checks.check_flag("is_causal", call.is_causal)
    checks.check_flag("enable_gqa", call.enable_gqa)
    dropout_p: object = call.dropout_p
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p <= 1:
        checks.fail(f"dropout_p must be a probability, got {checks.shown(dropout_p)}")
    tensors: tuple[tuple[str, object], ...] = (("query", call.query), ("key", call.key), ("value", call.value))
    for name, t in tensors:
        if isinstance(t, Tensor):
            checks.check_kind(name, t)
        if not isinstance(t, Tensor) or t.dim() < 2:
            got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            checks.fail(f"{name} must be a torch.Tensor of at least 2 dimensions [..., L, E], got {got}")


def _flatten(t: Tensor, lead: Sequence[int]) -> Tensor:
    """``t`` broadcast to ``[*lead, N, D]`` and seen as ``[B, H, N, D]``; H is the last of ``lead``, or 1."""
    heads = lead[-1] if lead else 1
    return t.expand(*lead, *t.shape[-2:]).reshape(math.prod(lead[:-1]), heads, *t.shape[-2:])


def _flatten_mask(attn_mask: object, lead: Sequence[int], q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as a ``[B, Hq, Nq, Nk]`` view."""
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if isinstance(attn_mask, Tensor) and len(lead) != 2:
        full = (*lead, *shape[2:])
        try:
            attn_mask = _flatten(attn_mask.expand(full), lead)
        except RuntimeError:
            raise InvalidArgumentError(
                f"attn_mask of shape {tuple(attn_mask.shape)} does not broadcast to [..., Hq, L, S] = {list(full)}"
            ) from None
    return checks.check_mask(attn_mask, q, shape)

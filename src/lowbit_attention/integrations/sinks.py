"""Attention sinks (`call.sinks`) of a call that an integration has caught: a logit a head, or one a query and head.

What no recipe runs, torch's function does, with gradients for the sinks, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.base import torch_sdpa
from ..call.request import has_tangent, wants_grad
from ..call.sinks import share_of_keys
from ..call.torch_call import OPERANDS, TorchCall, as_query_lies, of_operands
from ..ops import operator
from .rerouting import GRADIENTS, OPTIONS, Rerouter, holds_no_data, named


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The output of attention with sinks, from that without them.

    Args:
        out: ``[B, Hq, Nq, Dv]``. lse: its float32 ``[B, Hq, Nq]``, natural logarithms.
        sinks: logits that broadcast to lse's shape, of any floating dtype.
    Returns:
        As out. A row that sees no key is 0, as it is without sinks.
    """
    return (out * share_of_keys(lse, sinks.float())[..., None]).to(out.dtype)


def run_with_sinks(rerouter: Rerouter, call: TorchCall, sinks: Tensor, original: Callable[..., Tensor]) -> Tensor:
    """`Rerouter.run` of a call with sinks: ``[Hq]`` as ``[Hq, 1]``, or whatever broadcasts to ``[B, Hq, Nq]``.

    What the recipe does not run, torch's function does over one key more, which is counted.

    Raises:
        UnsupportedError, InvalidArgumentError: as `Rerouter.run`.
    """
    if declines_with_sinks(rerouter, call, sinks):
        return exactly_with_sinks(call, sinks, original)
    if torch.compiler.is_dynamo_compiling() or holds_no_data(call.query):
        return _by_operator(rerouter, call, sinks)
    return _answer(rerouter, call, sinks, original)


def declines_with_sinks(rerouter: Rerouter, call: TorchCall, sinks: Tensor) -> bool:
    """`Rerouter.declines`, also while torch.compile traces, and for gradients of the sinks."""
    gradients = wants_grad(sinks) and not call.wants_grad()
    if torch.compiler.is_dynamo_compiling():
        return rerouter.declines_traced(call, "gradients" if gradients else "")
    if gradients:
        rerouter.count(GRADIENTS)
    return gradients or rerouter.declines(call)


def exactly_with_sinks(call: TorchCall, sinks: Tensor, original: Callable[..., Tensor]) -> Tensor:
    """By a function of torch's signature: sinks are the logits of one key more, whose value is 0. Has gradients."""
    query, key, value, mask, dropout_p, is_causal, scale, enable_gqa = call
    rows, keys = query.shape[-2], key.shape[-2]
    bias = torch.zeros((), dtype=query.dtype, device=query.device) if mask is None else mask
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, -torch.inf)
    if is_causal:
        visible = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril()
        bias = bias.expand(*bias.shape[:-2], rows, keys).masked_fill(~visible, -torch.inf)
    heads = (*query.shape[:-2], rows)
    bias = bias.to(query.dtype).expand(*heads, keys)
    bias = torch.cat([bias, sinks.to(query.dtype).expand(heads)[..., None]], dim=-1)
    key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    return original(query, key, value, bias, dropout_p, False, scale=scale, enable_gqa=enable_gqa)


def _answer(rerouter: Rerouter, call: TorchCall, sinks: Tensor, original: Callable[..., Tensor]) -> Tensor:
    answer = rerouter.answer(call, return_lse=True)
    if answer is None:
        return exactly_with_sinks(call, sinks, original)
    out, lse = answer
    assert lse is not None  # (asked for; dispatch chose what gives it)
    return with_sinks(out, lse, sinks)


def _by_operator(rerouter: Rerouter, call: TorchCall, sinks: Tensor) -> Tensor:
    operands = call.in_autocast().operands()
    out: Tensor = torch.ops.lowbit_attention.rerouted_with_sinks(*operands, sinks, *rerouter.operator_options())
    return out


def _run(*operands: Any) -> Tensor:
    call, (sinks, *options) = of_operands(*operands)
    return as_query_lies(_answer(named(*options), call, sinks, torch_sdpa), call.query)


def _fake(*operands: Any) -> Tensor:
    return of_operands(*operands)[0].empty_answer()


def _tangents_to_torch(*operands: Any) -> Tensor | None:
    call, (sinks, *_) = of_operands(*operands)
    return exactly_with_sinks(call, sinks, torch_sdpa) if call.has_tangent() or has_tangent(sinks) else None


operator(f"rerouted_with_sinks({OPERANDS}, Tensor sinks, {OPTIONS}) -> Tensor", _run, _fake, _tangents_to_torch)

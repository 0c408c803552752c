"""Calls made to a block that want the log-sum-exp, too, which torch's own function does not give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call.torch_call import OPERANDS, TorchCall, as_query_lies, of_operands
from ..ops import operator
from . import traced
from .intercept import whose
from .rerouting import exactly


def ask_with_lse(number: int, call: TorchCall) -> tuple[Tensor, Tensor]:
    """`intercept.ask` for output and lse, float32 ``[..., Hq, L]``.

    A handler that has no method ``with_lse(name, call)`` is not asked: exact attention runs the call.

    Raises:
        UnsupportedError: gradients or dropout, if the handler has none.
    """
    if torch.compiler.is_dynamo_compiling() or traced.compiles_around():
        where = traced.to_block(number) + traced.where()
        out, lse = torch.ops.lowbit_attention.sdpa_with_lse(*call.in_autocast().operands(), where)
        return out, lse
    return _decide(call, traced.to_block(number))


def _decide(call: TorchCall, where: str) -> tuple[Tensor, Tensor]:
    place = whose(where)
    handler = None if place is None else getattr(place[0].handler, "with_lse", None)
    if place is None or handler is None:
        out, lse = exactly(call)
    else:
        out, lse = handler(place[1], call)
    assert lse is not None  # (asked for)
    return out, lse


def _run(*operands: Any) -> tuple[Tensor, Tensor]:
    call, (where,) = of_operands(*operands)
    out, lse = _decide(call, where)
    return as_query_lies(out, call.query), lse


def _fake(*operands: Any) -> tuple[Tensor, Tensor]:
    call, _ = of_operands(*operands)
    out = call.empty_answer()
    return out, out.new_empty(out.shape[:-1], dtype=torch.float32)


operator(f"sdpa_with_lse({OPERANDS}, str where) -> (Tensor, Tensor)", _run, _fake)

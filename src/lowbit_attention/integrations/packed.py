"""What an integration does with sequences that lie one behind another (``cu_seqlens``). Decide, run, fall back, count.

`Rerouter` for calls that are no call of torch's function: what the recipe does not run, torch's runs under a mask of
blocks, each sequence one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.base import Output, torch_sdpa
from ..backends.varlen import run_sequences
from ..call.request import has_tangent, of_sequences, wants_grad
from ..call.torch_call import TorchCall
from ..errors import EmulationRefusedError, LowbitError
from ..ops import operator
from .call_report import TORCH, CallKind
from .rerouting import OPTIONS, Rerouter, holds_no_data, in_short, kind_of, named, why_not_faster
from .sinks import exactly_with_sinks, with_sinks


class PackedCall(NamedTuple):
    """One call. query: ``[total_q, Hq, D]``; key, value: ``[total_k, Hkv, D or Dv]``; cu_q, cu_k: integers ``[B + 1]``.

    Causality is bottom-right within each sequence. sinks: logits ``[Hq]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cu_q: Tensor
    cu_k: Tensor
    is_causal: bool
    scale: float | None
    sinks: Tensor | None = None

    @property
    def dropout_p(self) -> float:
        """There is none."""
        return 0.0

    def wants_grad(self) -> bool:
        """Whether a derivative is asked for."""
        return wants_grad(self.query, self.key, self.value, self.sinks)

    def in_autocast(self) -> PackedCall:
        """The call as torch's function would make it under autocast."""
        query, key, value, *_ = TorchCall(self.query, self.key, self.value, None, 0.0, False, None, False).in_autocast()
        return self._replace(query=query, key=key, value=value)


def run_packed(rerouter: Rerouter, call: PackedCall) -> Tensor:
    """The output ``[total_q, Hq, Dv]``: by the recipe, or by torch's function, counted.

    Raises:
        UnsupportedError, InvalidArgumentError: as `Rerouter.run`.
    """
    call = call.in_autocast()
    if torch.compiler.is_dynamo_compiling():
        return exactly_packed(call) if rerouter.declines_traced(call) else _by_operator(rerouter, call)
    if rerouter.declines(call):
        return exactly_packed(call)
    return _by_operator(rerouter, call) if holds_no_data(call.query) else _answer(rerouter, call)


def answer_packed(rerouter: Rerouter, call: PackedCall, *, return_lse: bool = False) -> Output | None:
    """Output and lse (float32 ``[Hq, total_q]``) without sinks; ``None``, and counted: the original is to run it.

    "auto" takes what dispatch says, which without a kernel is exact attention of each sequence.
    """
    options: Any = {"is_causal": call.is_causal, "bottom_right": True, "return_lse": return_lse}
    options["on_emulation"] = rerouter.on_emulation
    recipe, machine = rerouter.recipe, rerouter.machine
    tensors = call.query, call.key, call.value
    try:
        answer, choice = run_sequences(
            *tensors, call.cu_q, call.cu_k, None, None, recipe, machine, call.scale, **options
        )
    except EmulationRefusedError:
        raise
    except LowbitError as error:
        if rerouter.strict:
            raise
        rerouter.report.add(CallKind(TORCH, "-", in_short(error)))
        return None
    if choice is not None and (recipe is not None or choice.implementation.is_kernel):
        rerouter.report.add(kind_of(choice))
    else:
        typical = of_sequences(*tensors, max(1, len(call.cu_q) - 1), False, recipe, machine, **options)
        rerouter.report.add(CallKind(TORCH, "-", why_not_faster(typical)))
    return answer


def exactly_packed(call: PackedCall) -> Tensor:
    """By torch's own function and a mask that lets each sequence see itself. Has gradients."""
    query, key, value = (t.transpose(0, 1)[None] for t in (call.query, call.key, call.value))
    mask = sees_itself(call.cu_q, call.cu_k, query.shape[2], key.shape[2], call.is_causal)
    torchs = TorchCall(query, key, value, mask, 0.0, False, call.scale, query.shape[1] != key.shape[1])
    sinks = call.sinks
    out = torchs.run(torch_sdpa) if sinks is None else exactly_with_sinks(torchs, sinks[:, None], torch_sdpa)
    # (torch gives NaN for a row of no sequence, on some devices)
    return out.masked_fill(~mask.any(dim=-1)[:, None], 0.0)[0].transpose(0, 1)


def sees_itself(cu_q: Tensor, cu_k: Tensor, rows: int, keys: int, is_causal: bool, window: int | None = None) -> Tensor:
    """Which query sees which key of packed sequences: bool ``[rows, keys]``. Tokens of no sequence see nothing.

    Args:
        window: each query sees so many keys, the last being (with bottom-right causality) its own.
    """
    of_q, at_q = _places(cu_q, rows)
    of_k, at_k = _places(cu_k, keys)
    sees = (of_q[:, None] == of_k) & (of_q[:, None] >= 0)
    if is_causal or window is not None:
        longer = (cu_k.diff() - cu_q.diff())[of_q.clamp(min=0)]
        last = (at_q + longer)[:, None]
        sees = sees & (at_k <= last) if is_causal else sees
        sees = sees & (at_k > last - window) if window is not None else sees
    return sees


def _places(cu: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each token's sequence, −1 for none, and its place in it."""
    token = torch.arange(count, dtype=cu.dtype, device=cu.device)
    number = torch.bucketize(token, cu, right=True) - 1
    inside = (number >= 0) & (number < len(cu) - 1)
    number = torch.where(inside, number, -1)
    return number, token - cu[number.clamp(min=0)]


def _answer(rerouter: Rerouter, call: PackedCall) -> Tensor:
    answer = answer_packed(rerouter, call, return_lse=call.sinks is not None)
    if answer is None:
        return exactly_packed(call)
    out, lse = answer
    if call.sinks is None:
        return out
    assert lse is not None  # (asked for; dispatch chose what gives it)
    return with_sinks(out.transpose(0, 1), lse, call.sinks[:, None]).transpose(0, 1)


def _by_operator(rerouter: Rerouter, call: PackedCall) -> Tensor:
    out: Tensor = torch.ops.lowbit_attention.rerouted_packed(*call, *rerouter.operator_options())
    return out


def _run(*operands: Any) -> Tensor:
    count = len(PackedCall._fields)
    return _answer(named(*operands[count:]), PackedCall(*operands[:count])).contiguous()


def _fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    del key, options
    return query.new_empty(*query.shape[:2], value.shape[2])


def _tangents_to_torch(*operands: Any) -> Tensor | None:
    call = PackedCall(*operands[: len(PackedCall._fields)])
    return exactly_packed(call) if has_tangent(call.query, call.key, call.value, call.sinks) else None


_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor cu_q, Tensor cu_k, bool is_causal, float? scale"
operator(f"rerouted_packed({_OPERANDS}, Tensor? sinks, {OPTIONS}) -> Tensor", _run, _fake, _tangents_to_torch)

"""A recipe in the place of torch's flash attention, by ``torch.nn.attention.register_flash_attention_impl``.

Where that function exists, a provider may replace the *flash backend's* operators. That reaches less than
`sdpa_enabled`: only calls for which torch picks its flash backend (on CUDA float16 and bfloat16 without a mask, at
equal lengths if causal), not those that cuDNN or the memory-efficient backend takes; but nothing in Python is patched,
so it reaches functions kept anywhere, C++ callers, `torch.nn.attention.varlen` and ``context_parallel``.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..backends.base import Output
from ..call.request import OnEmulation
from ..call.torch_call import TorchCall
from ..errors import UnsupportedError
from ..recipes.definition import Recipe
from ..recipes.machine import Machine
from .call_report import CallReport
from .packed import PackedCall, answer_packed
from .rerouting import GRADIENTS, Rerouter
from .scope import frames

_FOR_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_DEBUG = "the debug mask is asked for"


def register_flash_impl(
    recipe: str | Recipe = "auto",
    *,
    like: str | Machine | None = None,
    name: str | None = None,
    on_emulation: OnEmulation = "warn",
) -> CallReport:
    """Register ``recipe`` as a flash attention implementation of torch, not yet active.

    Args:
        recipe, like, on_emulation: as in `attention`.
        name: what ``torch.nn.attention.activate_flash_attention_impl`` is given; ``"lowbit_" + recipe`` if ``None``.
    Returns:
        A `CallReport` that counts the calls which arrive while it is active.

    What the recipe cannot run (gradients, dropout, windows, paged keys, causality with unequal lengths of a batch that
    is not packed) runs torch's kernel, and is counted. On a CPU torch has no such kernel for packed sequences and for
    the operator that ``context_parallel`` calls; there it is an error.

    >>> report = register_flash_impl("sage2_8b")  # doctest: +SKIP
    >>> torch.nn.attention.activate_flash_attention_impl("lowbit_sage2_8b")  # doctest: +SKIP
    >>> torch.nn.attention.restore_flash_attention_impl()  # doctest: +SKIP

    Raises:
        InvalidRecipeError: an unknown recipe.
        UnsupportedError: this torch has no such registry.
    """
    impl = _Impl(recipe, like, on_emulation)
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is None or not hasattr(torch.library, "get_kernel"):
        raise UnsupportedError(
            f"torch {torch.__version__} has no torch.nn.attention.register_flash_attention_impl; use sdpa_enabled"
        )
    register(name or f"lowbit_{impl.rerouter.recipe or 'auto'}", register_fn=impl.activate)
    return impl.rerouter.report


def _as_query_lies(out: Tensor, query: Tensor) -> Tensor:
    """The output in memory of the query's order, as torch's kernels write it."""
    if out.shape != query.shape:
        return out
    like = torch.empty_like(query)
    return out if out.stride() == like.stride() else like.copy_(out)


class _Handle:
    """What torch keeps while the implementation is active."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def remove(self) -> None:
        self.library._destroy()


_OPS = {
    "_scaled_dot_product_flash_attention": "on_flash",
    "_scaled_dot_product_flash_attention_for_cpu": "on_cpu",
    "_flash_attention_forward": "on_forward",
    "_flash_attention_forward_no_dropout_inplace": "on_forward_inplace",
}
"""Torch's operators, as far as this torch has them, and the methods that stand in their place."""

_UNCHANGING = {"num_splits": (None, 0), "window_size_left": (None, -1), "window_size_right": (None, -1)}
"""Values of options that ask for nothing; of others only ``None`` does."""


class _Impl:
    """Torch's flash kernels while ours stand in their place. (Their arguments are those of aten's operators.)"""

    def __init__(self, recipe: str | Recipe, like: str | Machine | None, on_emulation: OnEmulation) -> None:
        self.rerouter = Rerouter(recipe, like=like, on_emulation=on_emulation)
        self.kernels: dict[tuple[str, str], Any] = {}
        self._inside = threading.local()

    def activate(self) -> _Handle:
        """Replace torch's kernels, and remember them for what falls back."""
        library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        for op, method in _OPS.items():
            for key in ("CUDA", "CPU"):
                if not hasattr(torch.ops.aten, op) or (op == _FOR_CPU and key != "CPU"):
                    continue
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", key):
                    self.kernels[op, key] = torch.library.get_kernel(f"aten::{op}", key)
                elif key == "CUDA":
                    continue
                library.impl(op, getattr(self, method), key, with_keyset=True, allow_override=True)
        return _Handle(library)

    def original(self, op: str, keys: Any, *args: Any, **options: Any) -> Any:
        """Torch's own kernel. What it asks of the operators within is its own, too.

        Raises:
            UnsupportedError: it has none for this device.
        """
        device = next(t for t in args if isinstance(t, Tensor)).device.type
        kernel = self.kernels.get((op, device.upper()))
        if kernel is None:
            raise UnsupportedError(
                f"the recipe does not run this call (its report says why), and torch has no {op} for {device}"
            )
        self._inside.torch = True
        try:
            return kernel.call_boxed(keys, *args, **options)
        finally:
            self._inside.torch = False

    def on_flash(
        self,
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        call = _call(query, key, value, None, dropout_p, is_causal, scale)
        answer = self.answer(call, _DEBUG if return_debug_mask else "")
        if answer is None:
            given = query, key, value, dropout_p, is_causal, return_debug_mask
            return self.original("_scaled_dot_product_flash_attention", keys, *given, scale=scale)
        return *answer, None, None, query.shape[2], key.shape[2], *_auxiliary(query)

    def on_forward(self, keys: Any, *given: Any, **options: Any) -> Any:
        answer = self.answer_forward(*given, **options)
        if answer is None:
            return self.original("_flash_attention_forward", keys, *given, **options)
        return *answer, *_auxiliary(given[0])

    def on_forward_inplace(self, keys: Any, out: Tensor, *given: Any, **options: Any) -> Any:
        answer = self.answer_forward(*given, **options)
        if answer is None:
            return self.original("_flash_attention_forward_no_dropout_inplace", keys, out, *given, **options)
        out.copy_(answer[0])
        return answer[1]

    def on_cpu(
        self,
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        answer = self.answer(_call(query, key, value, attn_mask, dropout_p, is_causal, scale))
        if answer is None:
            given = query, key, value, dropout_p, is_causal
            return self.original(_FOR_CPU, keys, *given, attn_mask=attn_mask, scale=scale)
        out, lse = answer
        return out, lse.transpose(1, 2).contiguous().transpose(1, 2)

    def answer_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor] | None:
        """Output as query, and lse: of ``[B, N, H, D]``, or of sequences packed in ``[tokens, H, D]``."""
        del max_q, max_k
        if options.get("window_size_right") == 0 and options.get("window_size_left") in (None, -1):
            options["window_size_right"], is_causal = -1, True  # (another way to say it)
        asked = [name for name, option in options.items() if _asks_for_something(name, option)]
        why_not = _DEBUG if return_debug_mask else f"{', '.join(asked)} of torch's flash attention" if asked else ""
        if cum_seq_q is None and cum_seq_k is None:
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            answer = self.answer(_call(q, k, v, None, dropout_p, is_causal, scale), why_not)
            return None if answer is None else (answer[0].transpose(1, 2), answer[1])
        if cum_seq_q is None or cum_seq_k is None:
            why_not = why_not or "sequences of only one of query and key"
            call = PackedCall(query, key, value, query, key, is_causal, scale)
        else:
            call = PackedCall(query, key, value, cum_seq_q, cum_seq_k, is_causal, scale)
        why_not = f"dropout_p={dropout_p}" if dropout_p else why_not
        if self.is_torchs(call, why_not):
            return None
        return _whole(answer_packed(self.rerouter, call, return_lse=True))

    def answer(self, call: TorchCall, why_not: str = "") -> tuple[Tensor, Tensor] | None:
        """Output, in memory as query lies, and lse by the recipe; ``None`` if torch's kernel is to run."""
        if call.is_causal and call.query.shape[2] != call.key.shape[2]:
            why_not = why_not or "causal with unequal lengths: torch's flash kernels do not agree on what it means"
        if self.is_torchs(call, why_not):
            return None
        answer = _whole(self.rerouter.answer(call, return_lse=True))
        return None if answer is None else (_as_query_lies(answer[0], call.query), answer[1])

    def is_torchs(self, call: TorchCall | PackedCall, why_not: str) -> bool:
        """Whether torch's kernel is to run a call; counted, if it is not a part of what it runs already."""
        if getattr(self._inside, "torch", False):
            return True
        if torch.is_grad_enabled() and _distributed_gradients(sys._getframe(1)):
            self.rerouter.count(GRADIENTS)
            return True
        return self.rerouter.declines(call, why_not)


def _asks_for_something(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) or value not in _UNCHANGING.get(name, (None,))


def _distributed_gradients(frame: FrameType | None) -> bool:
    """Whether ``context_parallel`` runs a call for tensors that want gradients: it hands over parts that do not."""
    for one in frames(frame):
        if one.f_code.co_name == "_sdpa_handler" and "op_call" in one.f_locals:
            args = one.f_locals.get("args", ())
            return any(isinstance(t, Tensor) and t.requires_grad for t in args)
    return False


def _whole(answer: Output | None) -> tuple[Tensor, Tensor] | None:
    if answer is None:
        return None
    out, lse = answer
    assert lse is not None  # (asked for; dispatch chose what gives it)
    return out, lse


def _auxiliary(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What torch's kernels return beside output and lse: states of random numbers, and a mask for debugging."""
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return state, torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> TorchCall:
    """What aten's arguments mean: where the heads are fewer, groups of query heads share one."""
    return TorchCall(query, key, value, mask, dropout_p, is_causal, scale, query.shape[1] != key.shape[1])

"""A recipe in the place of torch's flash attention, by ``torch.nn.attention.register_flash_attention_impl``.

Where that function exists, a provider may replace the *flash backend's* operators. That reaches less than
`sdpa_enabled`: only calls for which torch picks its flash backend (on CUDA float16 and bfloat16 without a mask, at
equal lengths if causal), not those that cuDNN or the memory-efficient backend takes; but nothing in Python is patched,
so it reaches functions kept anywhere, and C++ callers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call.request import OnEmulation
from ..call.torch_call import TorchCall
from ..errors import UnsupportedError
from ..recipes.definition import Recipe
from ..recipes.machine import Machine
from .call_report import CallReport
from .rerouting import Rerouter

_CUDA_OP = "aten::_scaled_dot_product_flash_attention"
_CPU_OP = "aten::_scaled_dot_product_flash_attention_for_cpu"


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

    What the recipe cannot run (gradients, dropout, causality with unequal lengths) runs torch's kernel, and is counted.

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


class _Impl:
    """Torch's flash kernels while ours stand in their place. (Their arguments are those of aten's operators.)"""

    def __init__(self, recipe: str | Recipe, like: str | Machine | None, on_emulation: OnEmulation) -> None:
        self.rerouter = Rerouter(recipe, like=like, on_emulation=on_emulation)
        self.kernels: dict[str, Any] = {}

    def activate(self) -> _Handle:
        """Replace torch's kernels, and remember them for what falls back."""
        library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        for op, key, function in ((_CUDA_OP, "CUDA", self.on_cuda), (_CPU_OP, "CPU", self.on_cpu)):
            if torch._C._dispatch_has_kernel_for_dispatch_key(op, key):
                self.kernels[key] = torch.library.get_kernel(op, key)
                library.impl(op.removeprefix("aten::"), function, key, with_keyset=True, allow_override=True)
        return _Handle(library)

    def on_cuda(
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
        answer = self.answer(call, "the debug mask is asked for" if return_debug_mask else "")
        if answer is None:
            return self.kernels["CUDA"].call_boxed(
                keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale
            )
        out, lse = answer
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        unused = torch.zeros((), dtype=torch.uint64, device=query.device)
        return out, lse, None, None, query.shape[2], key.shape[2], state, unused, query.new_empty(0)

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
            return self.kernels["CPU"].call_boxed(
                keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        out, lse = answer
        return out, lse.transpose(1, 2).contiguous().transpose(1, 2)

    def answer(self, call: TorchCall, why_not: str = "") -> tuple[Tensor, Tensor] | None:
        """Output, in memory as query lies, and lse by the recipe; ``None`` if torch's kernel is to run."""
        if call.is_causal and call.query.shape[2] != call.key.shape[2]:
            why_not = "causal with unequal lengths: torch's flash kernels do not agree on what it means"
        if self.rerouter.declines(call, why_not):
            return None
        answer = self.rerouter.answer(call, return_lse=True)
        if answer is None:
            return None
        out, lse = answer
        assert lse is not None  # (asked for; dispatch chose what gives it)
        return _as_query_lies(out, call.query), lse


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

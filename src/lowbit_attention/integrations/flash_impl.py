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

from ..api import resolve_like
from ..backends.dispatch import attempt, choose
from ..call.request import wants_grad
from ..errors import LowbitError, UnsupportedError
from ..functional import find_recipe_or_auto, make_call
from ..recipes.definition import Recipe
from ..recipes.machine import Machine
from .call_report import TORCH, CallKind, CallReport
from .torch_sdpa import DROPOUT, GRADIENTS, in_short, why_not_faster

_CUDA_OP = "aten::_scaled_dot_product_flash_attention"
_CPU_OP = "aten::_scaled_dot_product_flash_attention_for_cpu"


def register_flash_impl(
    recipe: str | Recipe = "auto", *, like: str | Machine | None = None, name: str | None = None
) -> CallReport:
    """Register ``recipe`` as a flash attention implementation of torch, not yet active.

    Args:
        recipe, like: as in `attention`.
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
    asked = find_recipe_or_auto(recipe)
    impl = _Impl(asked, resolve_like(asked, like))
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is None or not hasattr(torch.library, "get_kernel"):
        raise UnsupportedError(
            f"torch {torch.__version__} has no torch.nn.attention.register_flash_attention_impl; use sdpa_enabled"
        )
    register(name or f"lowbit_{asked or 'auto'}", register_fn=impl.activate)
    return impl.report


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
    def __init__(self, recipe: Recipe | None, machine: Machine | None) -> None:
        self.recipe, self.machine, self.report = recipe, machine, CallReport()
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
        answer = None
        if return_debug_mask:
            self.report.add(CallKind(TORCH, "-", "the debug mask is asked for"))
        else:
            answer = self.answer(query, key, value, None, dropout_p, is_causal, scale)
        if answer is None:
            return self.kernels["CUDA"].call_boxed(
                keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale
            )
        out, lse = _as_query_lies(answer[0], query), answer[1]
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
        answer = self.answer(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if answer is None:
            return self.kernels["CPU"].call_boxed(
                keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        return _as_query_lies(answer[0], query), answer[1].transpose(1, 2).contiguous().transpose(1, 2)

    def answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Output and lse by the recipe; ``None``, and counted, if torch's kernel is to run."""
        kind: CallKind
        if wants_grad(query, key, value, attn_mask):
            kind = GRADIENTS
        elif dropout_p:
            kind = DROPOUT
        elif is_causal and query.shape[2] != key.shape[2]:
            kind = CallKind(
                TORCH, "-", "causal with unequal lengths: torch's flash kernels do not agree on what it means"
            )
        else:
            gqa = query.shape[1] != key.shape[1]
            try:
                call = make_call(
                    query, key, value, attn_mask, 0.0, is_causal, scale, gqa, self.recipe, self.machine, return_lse=True
                )
                choice = choose(call.request)
            except LowbitError as error:
                kind = CallKind(TORCH, "-", in_short(error))
            else:
                if self.recipe is not None or choice.implementation.is_kernel:
                    ran = attempt(choice, call.request, lambda: call.run_with_lse(choice))
                    if not isinstance(ran, str):
                        self.report.add(CallKind(choice.implementation.name, choice.recipe.name))
                        out, lse = ran
                        assert lse is not None  # (asked for; dispatch chose what gives it)
                        return out, lse
                    kind = CallKind(TORCH, "-", ran)
                else:
                    kind = CallKind(TORCH, "-", why_not_faster(call.request))
        self.report.add(kind)
        return None

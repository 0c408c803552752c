"""A model's ``scaled_dot_product_attention`` by a recipe, for as long as you like: `sdpa_enabled`, `enable_sdpa`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .. import checks
from ..api import Training, resolve_like
from ..dispatch import attempt, check_possible, choose, explain_request
from ..errors import InvalidArgumentError, LowbitError, UnsupportedError
from ..implementations import call_torch, torch_sdpa
from ..machine import Machine
from ..ops import operator, parse_recipe
from ..recipe import Recipe
from ..request import wants_grad
from ..sdpa import as_autocast, find_recipe_or_auto, make_call, recipe_text
from .call_report import REPLACEMENT, TORCH, CallKind, CallReport
from .intercept import intercepted
from .scope import recomputes
from .traced import as_query_lies, empty_answer, tangents_to_torch

GRADIENTS = CallKind(TORCH, "-", "gradients are asked for")
RECOMPUTED = CallKind(TORCH, "-", "a checkpoint will ask for gradients")
DROPOUT = CallKind(TORCH, "-", "dropout")
_WITHOUT_DATA = (FakeTensor, FunctionalTensor)
"""What `torch.export` runs a model on; torch 2.5 wraps the first in the second."""


class _Rerouted:
    """The handler of one block: every call by the recipe, or by torch's own function for a reason that is counted."""

    def __init__(
        self, recipe: str | Recipe, like: str | Machine | None, training: Training, strict: bool, report: CallReport
    ) -> None:
        self.recipe = find_recipe_or_auto(recipe)
        self.like = like
        self.machine = resolve_like(self.recipe, like)
        checks.check_choice("training", training, checks.TRAINING)
        checks.check_flag("strict", strict)
        self.exact_training = training == "exact"
        self.strict = strict
        self.report = report
        self.text = recipe_text(self.recipe)

    def __call__(
        self,
        original: Callable[..., Tensor],
        name: str | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if wants_grad(query, key, value, attn_mask):
            self.count_or_refuse(GRADIENTS)
        elif type(dropout_p) not in (float, int, bool):  # (torch's error)
            pass
        elif dropout_p:
            self.count_or_refuse(DROPOUT, f"dropout_p={dropout_p}")
        elif not torch.is_grad_enabled() and recomputes(sys._getframe(1)):
            self.count_or_refuse(RECOMPUTED)
        elif isinstance(query, _WITHOUT_DATA) or query.is_meta:
            return self.without_block(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        else:
            return self.run(original, query, key, value, attn_mask, is_causal, scale, enable_gqa)
        return call_torch(
            original, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def count_or_refuse(self, kind: CallKind, given: str = "the compiled call has some") -> None:
        """Count a call that torch's own function is to run, if it may."""
        if kind is DROPOUT:
            if self.strict:
                raise UnsupportedError(f"quantised attention has no dropout, and {given}")
        elif not self.exact_training:
            raise UnsupportedError(
                "a gradient is asked of quantised attention, which has none: run under torch.no_grad() and without "
                "forward-mode AD, or enable with training='exact'"
            )
        self.report.add(kind)

    def skipped(self, reason: str) -> None:
        """Compiled code gave a call to torch's own function."""
        self.count_or_refuse(DROPOUT if reason == "dropout" else GRADIENTS)

    def passed_by(self, function: Callable[..., Tensor]) -> None:
        """What somebody else put in the place of torch's function ran a call by itself."""
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
        named = f"{module}.{name}" if module and name else repr(function)
        reason = f"F.scaled_dot_product_attention had been replaced before by {named}, which ran the call itself"
        if self.strict:
            raise UnsupportedError(f"{reason}; undo that, or enable with strict=False")
        self.report.add(CallKind(REPLACEMENT, "-", reason))

    def export_options(self) -> tuple[str, str | None, bool]:
        """What an operator that runs without a block is told: recipe, machine, strictness."""
        if isinstance(self.like, Machine):
            raise InvalidArgumentError(
                f"like={self.like.name!r}: for a program that is exported give the machine's name, not the object"
            )
        return self.text, self.like, self.strict

    def without_block(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        """The call as an operator, for tensors without data: a program that is being exported, say."""
        try:  # (the same checks)
            call = make_call(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, self.recipe, self.machine)
            check_possible(call.request)
        except LowbitError:
            if self.strict:
                raise
            return call_torch(
                torch_sdpa, query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        query, key, value, attn_mask = as_autocast(query, key, value, attn_mask)
        out: Tensor = torch.ops.lowbit_attention.rerouted_sdpa(
            query, key, value, attn_mask, is_causal, scale, enable_gqa, *self.export_options()
        )
        return out

    def run(
        self,
        original: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        """One call without gradients or dropout, on real tensors."""
        try:
            call = make_call(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, self.recipe, self.machine)
            choice = choose(call.request)
        except LowbitError as error:
            if self.strict:
                raise
            reason = in_short(error)
        else:
            if self.recipe is not None or choice.implementation.is_kernel:
                out = call.run(choice) if self.strict else attempt(choice, call.request, lambda: call.run(choice))
                if not isinstance(out, str):
                    self.report.add(CallKind(choice.implementation.name, choice.recipe.name))
                    return out
                reason = out
            else:
                reason = why_not_faster(call.request)
        self.report.add(CallKind(TORCH, "-", reason))
        return call_torch(original, query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


def in_short(error: LowbitError) -> str:
    """Why a call was refused: of what nothing can run, why the implementation that runs most cannot."""
    if isinstance(error, UnsupportedError) and error.reasons:
        return "; ".join(list(error.reasons.values())[-1])
    return str(error)


def why_not_faster(request: Any) -> str:
    found = _auto_reasons.get(id(request))
    if found is None or found[0] is not request:
        kernels = [v for v in explain_request(request).verdicts if v.implementation not in ("torch_sdpa", "emulation")]
        reasons = kernels[0].reasons if kernels else ("there is no kernel",)
        if len(_auto_reasons) > 4096:
            _auto_reasons.clear()
        found = _auto_reasons[id(request)] = request, "recipe auto: " + "; ".join(reasons)
    return found[1]


_auto_reasons: dict[int, tuple[Any, str]] = {}


class sdpa_enabled(intercepted):
    """Within the block, ``torch.nn.functional.scaled_dot_product_attention`` runs ``recipe``.

    Args:
        model: only the calls made while a forward of this module runs; ``None``: every call of the process. May be
            compiled by `torch.compile`, before the block or inside.
        recipe: ``"auto"`` (a kernel where it is faster than torch, torch elsewhere), a recipe's name, or a `Recipe`,
            which runs always, emulated where no kernel can.
        like: as in `attention`.
        training: calls whose gradients autograd records run torch's own function (``"exact"``) or are an error
            (``"refuse"``).
        strict: a call that the recipe cannot run is an error, and does not go to torch's own function.
    Returns:
        A `CallReport` that counts every call by implementation and reason, in the block and after it.

    Calls mean what they mean in torch (``is_causal`` is top-left). To torch's own function go, counted by reason:
    gradients, dropout, float64, head dimensions above 256, tensor subclasses, what runs inside `torch.func.vmap`, wrong
    arguments (torch's error is raised), and with ``"auto"`` whatever is not worth it. See `integrations.intercept` for
    which calls are reached, and which not (`torch.nn.MultiheadAttention` with ``need_weights=True``).

    >>> import torch.nn.functional as F
    >>> q = k = v = torch.randn(1, 2, 64, 32)
    >>> with sdpa_enabled(recipe="sage2_8b") as report:
    ...     out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> report.by_implementation()
    {'emulation': 1}

    Raises:
        InvalidArgumentError, InvalidRecipeError: a wrong argument, an unknown recipe.
    """

    def __init__(
        self,
        model: Any = None,
        recipe: str | Recipe = "auto",
        *,
        like: str | Machine | None = None,
        training: Training = "exact",
        strict: bool = False,
    ) -> None:
        self.report = CallReport()
        self._again = partial(type(self), model, recipe, like=like, training=training, strict=strict)
        super().__init__(_Rerouted(recipe, like, training, strict, self.report), model)
        self.report.of = _described(model, self.block.subjects)

    def _recreate_cm(self) -> sdpa_enabled:  # (as a decorator: a block of its own for every call)
        return self._again()

    def __enter__(self) -> CallReport:
        super().__enter__()
        return self.report


def _described(model: Any, subjects: dict[str, nn.Module]) -> str:
    """Which part of a pipeline a report is of; empty for a module and for the process."""
    return "" if isinstance(model, nn.Module | None) else f"{', '.join(subjects)} of {type(model).__name__}"


_enabled: dict[int, tuple[Any, sdpa_enabled]] = {}


def enable_sdpa(
    model: Any = None,
    recipe: str | Recipe = "auto",
    *,
    like: str | Machine | None = None,
    training: Training = "exact",
    strict: bool = False,
) -> CallReport:
    """`sdpa_enabled` until `disable_sdpa`. Another call for the same model (or ``None``) replaces the first.

    >>> report = enable_sdpa(recipe="sage2_8b")
    >>> q = torch.randn(1, 2, 64, 32)
    >>> out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> disable_sdpa()
    >>> report.ran
    1
    """
    block = sdpa_enabled(model, recipe, like=like, training=training, strict=strict)
    report = block.__enter__()
    _, previous = _enabled.get(id(model), (None, None))
    _enabled[id(model)] = model, block
    if previous is not None:
        previous.__exit__()
    return report


def disable_sdpa(model: Any = None) -> None:
    """End what `enable_sdpa` began: for ``model``, or all of it. Where nothing was begun, nothing happens."""
    for key in list(_enabled) if model is None else [id(model)]:
        if key in _enabled:
            _enabled[key][1].__exit__()  # (before it is forgotten: an interrupt in between can be made up for)
            _enabled.pop(key, None)


# ---- the operator of exported programs


@lru_cache(maxsize=64)
def _handler(recipe: str, like: str | None, strict: bool) -> _Rerouted:
    return _Rerouted(parse_recipe(recipe), like, "exact", strict, CallReport())


def _run_rerouted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    recipe: str,
    like: str | None,
    strict: bool,
) -> Tensor:
    handler = _handler(recipe, like, strict)
    return as_query_lies(handler.run(torch_sdpa, query, key, value, attn_mask, is_causal, scale, enable_gqa), query)


def _fake_rerouted(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    return empty_answer(query, key, value, options[3])


operator(
    "rerouted_sdpa(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float? scale, "
    "bool enable_gqa, str recipe, str? like, bool strict) -> Tensor",
    _run_rerouted,
    _fake_rerouted,
    tangents_to_torch,
)

"""A model's ``scaled_dot_product_attention`` by a recipe, for as long as you like: `sdpa_enabled`, `enable_sdpa`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import checks
from ..api import Training, resolve_like
from ..checks import TRANSFORMED
from ..dispatch import check_possible, choose, explain_request
from ..errors import InvalidArgumentError, LowbitError, UnsupportedError
from ..implementations import call_torch, torch_sdpa
from ..machine import Machine
from ..ops import LIBRARY, before_autograd, parse_recipe
from ..recipe import Recipe
from ..request import has_tangent, wants_grad
from ..sdpa import as_autocast, find_recipe_or_auto, is_by_token, leading, make_call, recipe_text
from .call_report import TORCH, CallKind, CallReport
from .intercept import intercepted

GRADIENTS = CallKind(TORCH, "-", "gradients are asked for")
DROPOUT = CallKind(TORCH, "-", "dropout")


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
        self.slot = ""
        self.gradients = report.traced(GRADIENTS)
        self.dropout = report.traced(DROPOUT)

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
        if type(dropout_p) not in (float, int, bool):  # (torch's error)
            return _original(original, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        compiling = torch.compiler.is_compiling()
        grad = wants_grad(query, key, value, attn_mask)
        if grad or dropout_p:
            self._refuse_if_told(grad, dropout_p)
            if not compiling:
                self.report.add(GRADIENTS if grad else DROPOUT)
            elif not (torch.compiler.is_exporting() or has_tangent(query, key, value, attn_mask)):
                (self.gradients if grad else self.dropout).add_(1)
            return _original(original, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if compiling or isinstance(query, FakeTensor) or query.is_meta:
            if isinstance(self.like, Machine):
                raise InvalidArgumentError(
                    f"like={self.like.name!r}: inside torch.compile give the machine's name, not the object"
                )
            if not compiling:  # no data: the same checks, and then shapes
                try:
                    check_possible(make_call(
                        query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, self.recipe, self.machine
                    ).request)  # fmt: skip
                except LowbitError:
                    if self.strict:
                        raise
                    return _original(original, query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)
            query, key, value, attn_mask = as_autocast(query, key, value, attn_mask)
            out: Tensor = torch.ops.lowbit_attention.rerouted_sdpa(
                query, key, value, attn_mask, is_causal, scale, enable_gqa, self.text, self.like, self.strict, self.slot
            )
            return out
        return self.run(original, query, key, value, attn_mask, is_causal, scale, enable_gqa)

    def _refuse_if_told(self, grad: bool, dropout_p: float) -> None:
        if grad and not self.exact_training:
            raise UnsupportedError(
                "a gradient is asked of quantised attention, which has none: run under torch.no_grad() and without "
                "forward-mode AD, or enable with training='exact'"
            )
        if dropout_p and not grad and self.strict:
            raise UnsupportedError(f"quantised attention has no dropout, and dropout_p={dropout_p}")

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
                out = call.run(choice)
                self.report.add(CallKind(choice.implementation.name, choice.recipe.name))
                return out
            reason = why_not_faster(call.request)
        self.report.add(CallKind(TORCH, "-", reason))
        return _original(original, query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)


def _original(
    original: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    if enable_gqa is not False:  # (torch below 2.5 does not know the word)
        return call_torch(
            original, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return call_torch(original, query, key, value, attn_mask, dropout_p, is_causal, scale=scale)


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


@contextmanager
def sdpa_enabled(
    model: nn.Module | None = None,
    recipe: str | Recipe = "auto",
    *,
    like: str | Machine | None = None,
    training: Training = "exact",
    strict: bool = False,
) -> Iterator[CallReport]:
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
    report = CallReport()
    handler = _Rerouted(recipe, like, training, strict, report)
    handler.slot = _take_slot(handler)
    try:
        with intercepted(handler, model, named=False):
            yield report
    finally:
        del _slots[handler.slot]


_enabled: dict[int, tuple[nn.Module | None, ExitStack]] = {}


def enable_sdpa(
    model: nn.Module | None = None,
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
    stack = ExitStack()
    report = stack.enter_context(sdpa_enabled(model, recipe, like=like, training=training, strict=strict))
    _, previous = _enabled.pop(id(model), (None, None))
    _enabled[id(model)] = model, stack
    if previous is not None:
        previous.close()
    return report


def disable_sdpa(model: nn.Module | None = None) -> None:
    """End what `enable_sdpa` began: for ``model``, or all of it. Where nothing was begun, nothing happens."""
    ids = list(_enabled) if model is None else [id(model)]
    for key in ids:
        _, stack = _enabled.pop(key, (None, None))
        if stack is not None:
            stack.close()


# ---- the operator that compiled code calls: it decides, runs and counts when it runs, as a call in eager mode does

_slots: weakref.WeakValueDictionary[str, _Rerouted] = weakref.WeakValueDictionary()
"""Open blocks by number. Compiled code holds the number, so a later block with the same one uses the same code."""


def _take_slot(handler: _Rerouted) -> str:
    with _slots_lock:
        slot = next(str(n) for n in range(len(_slots) + 1) if str(n) not in _slots)
        _slots[slot] = handler
    return slot


_slots_lock = threading.Lock()


LIBRARY.define(
    "rerouted_sdpa(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float? scale, "
    "bool enable_gqa, str recipe, str? like, bool strict, str slot) -> Tensor"
)


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
    slot: str,
) -> Tensor:
    handler = _slots.get(slot)
    if handler is None or (handler.text, handler.like, handler.strict) != (recipe, like, strict):
        handler = _Rerouted(parse_recipe(recipe), like, "exact", strict, CallReport())  # (an exported program, say)
    out = handler.run(torch_sdpa, query, key, value, attn_mask, is_causal, scale, enable_gqa)
    return out.transpose(1, 2).contiguous().transpose(1, 2) if is_by_token(query) else out.contiguous()


def _fake_rerouted(
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
    slot: str,
) -> Tensor:
    lead, _ = leading(query, key, value, enable_gqa)
    if is_by_token(query):
        return query.new_empty(lead[0], query.shape[2], lead[1], value.shape[-1]).transpose(1, 2)
    return query.new_empty(*lead, query.shape[-2], value.shape[-1])


def _vmap(info: object, in_dims: object, *arguments: object) -> NoReturn:
    raise InvalidArgumentError(f"the call {TRANSFORMED}")


LIBRARY.impl("rerouted_sdpa", _run_rerouted, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit_attention::rerouted_sdpa", _fake_rerouted, lib=LIBRARY)
torch.library.register_vmap("lowbit_attention::rerouted_sdpa", _vmap, lib=LIBRARY)


def _tangents_to_torch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any) -> Any:
    if not has_tangent(query, key, value, attn_mask):
        return None
    is_causal, scale, enable_gqa, *_ = rest
    return _original(torch_sdpa, query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)


before_autograd("rerouted_sdpa", _tangents_to_torch)

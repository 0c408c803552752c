"""`Rerouter`: what every integration does with a call that it has caught. Decide, run, fall back, count.

An integration says how a call is caught, how it is named, and which `TorchCall` its arguments mean:

    rerouter = Rerouter("sage2_8b")
    def their_attention(q, k, v, bias, temperature):  # (in the place of theirs)
        return rerouter.run(TorchCall.of(q, k, v, bias, scale=1 / temperature), scaled_dot_product_attention)
    rerouter.report
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..api import Training, resolve_like
from ..backends.base import Output, call_torch, torch_sdpa
from ..backends.dispatch import Chosen, attempt, check_possible, choose, explain_request
from ..call import checks
from ..call.checked import CheckedCall, check_call
from ..call.memo import IdentityMemo
from ..call.request import OnEmulation, Request
from ..call.torch_call import TorchCall
from ..errors import EmulationRefusedError, InvalidArgumentError, LowbitError, UnsupportedError
from ..functional import find_recipe_or_auto, recipe_text
from ..ops import operator, parse_recipe, sdpa_operator
from ..recipes.definition import Recipe
from ..recipes.machine import Machine
from ..recipes.named import EXACT
from .call_report import TORCH, CallKind, CallReport
from .scope import recomputes
from .traced import exports, tally

GRADIENTS = CallKind(TORCH, "-", "gradients are asked for")
RECOMPUTED = CallKind(TORCH, "-", "a checkpoint will ask for gradients")
DROPOUT = CallKind(TORCH, "-", "dropout")

_WITHOUT_DATA = (FakeTensor, FunctionalTensor)
"""What `torch.export` runs a model on; torch 2.5 wraps the first in the second."""


class Declinable(Protocol):
    """What `Rerouter.declines` looks at of a call of any kind."""

    @property
    def dropout_p(self) -> float: ...
    def wants_grad(self) -> bool: ...


class Rerouter:
    """Runs calls by a recipe, or leaves them to the original for a reason that is counted.

    Args:
        recipe, like: as in `attention`; ``"auto"`` runs only kernels, and leaves to the original what is not worth it.
        training: calls whose gradients autograd records are the original's (``"exact"``) or an error (``"refuse"``).
        strict: a call that the recipe cannot run is an error.
        on_emulation: as in `attention`; ``"error"`` raises whatever ``strict`` is.
        report: where calls are counted, if not in a report of its own.

    Attributes:
        report: counts every call by implementation and reason.

    Raises:
        InvalidArgumentError, InvalidRecipeError: a wrong argument, an unknown recipe.
    """

    def __init__(
        self,
        recipe: str | Recipe = "auto",
        *,
        like: str | Machine | None = None,
        training: Training = "exact",
        strict: bool = False,
        on_emulation: OnEmulation = "warn",
        report: CallReport | None = None,
    ) -> None:
        self.recipe = find_recipe_or_auto(recipe)
        self.like = like
        self.machine = resolve_like(self.recipe, like)
        checks.check_choice("training", training, checks.TRAINING)
        checks.check_flag("strict", strict)
        checks.check_choice("on_emulation", on_emulation, checks.ON_EMULATION)
        self.exact_training = training == "exact"
        self.strict = strict
        self.on_emulation: OnEmulation = on_emulation
        self.report = CallReport() if report is None else report
        self._text = recipe_text(self.recipe)
        self.number = next(_next)
        """By which compiled code finds this object."""
        _rerouters[self.number] = self

    def run(self, call: TorchCall, original: Callable[..., Tensor], *, why_not: str = "") -> Tensor:
        """The output of a call: by the recipe, or by ``original``, which takes torch's arguments.

        Args:
            why_not: a reason of the integration's own why the recipe must not run it.

        Raises:
            UnsupportedError, InvalidArgumentError: what ``strict``, ``training`` and ``on_emulation`` make an error.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._traced(call, original, why_not)
        if not self.declines(call, why_not):
            if holds_no_data(call.query):
                return self.by_operator(call)
            answer = self.answer(call)
            if answer is not None:
                return answer[0]
        return call.run(call_torch, original)

    def declines(self, call: Declinable, why_not: str = "") -> bool:
        """Whether the original is to run a call whatever the recipe can, and if so, counts it.

        Raises:
            UnsupportedError: it is refused.
        """
        if call.wants_grad():
            self.count(GRADIENTS)
        elif type(call.dropout_p) not in (float, int, bool):  # (the original's error)
            pass
        elif call.dropout_p:
            self.count(DROPOUT, f"dropout_p={call.dropout_p}")
        elif why_not:
            self.count_other(why_not)
        elif not torch.is_grad_enabled() and recomputes(sys._getframe(1)):
            self.count(RECOMPUTED)
        else:
            return False
        return True

    def count(self, kind: CallKind, given: str = "the compiled call has some") -> None:
        """Count a call with gradients or dropout, which the original is to run, if it may.

        Raises:
            UnsupportedError: it may not.
        """
        if kind is DROPOUT:
            if self.strict:
                raise UnsupportedError(f"quantised attention has no dropout, and {given}")
        elif not self.exact_training:
            raise UnsupportedError(
                "a gradient is asked of quantised attention, which has none: run under torch.no_grad() and without "
                "forward-mode AD, or enable with training='exact'"
            )
        self.report.add(kind)

    def count_other(self, why_not: str) -> None:
        """Count a call that the original is to run for a reason of the integration's own.

        Raises:
            UnsupportedError: it may not.
        """
        if self.strict:
            raise UnsupportedError(why_not)
        self.report.add(CallKind(TORCH, "-", why_not))

    def answer(self, call: TorchCall, *, return_lse: bool = False) -> Output | None:
        """Output and lse of a call that `declines` let through; ``None``, and counted: the original is to run it."""
        if type(call.dropout_p) is not float:  # (0 or False)
            call = call._replace(dropout_p=0.0)
        try:
            checked = check_call(call, self.recipe, self.machine, return_lse, self.on_emulation)
            choice = choose(checked.request)
        except EmulationRefusedError:
            raise
        except LowbitError as error:
            if self.strict:
                raise
            reason = in_short(error)
        else:
            if self.recipe is None and not choice.implementation.is_kernel:
                reason = why_not_faster(checked.request)
            else:
                ran = _ran(checked, choice) if self.strict else attempt(choice, checked.request, _ran, checked, choice)
                if not isinstance(ran, str):
                    self.report.add(kind_of(choice))
                    return ran
                reason = ran
        self.report.add(CallKind(TORCH, "-", reason))
        return None

    def answer_with_lse(self, call: TorchCall) -> tuple[Tensor, Tensor]:
        """Output and lse, float32 ``[..., Hq, L]``: by the recipe, or, counted, by exact attention.

        Raises:
            UnsupportedError: a gradient or dropout, which no lse comes with.
        """
        if call.wants_grad() or recomputes(sys._getframe(1)):
            raise UnsupportedError("return_lse=True has no gradients: run under torch.no_grad()")
        if call.dropout_p:
            raise UnsupportedError(f"return_lse=True has no dropout, and dropout_p={call.dropout_p}")
        out, lse = self.answer(call, return_lse=True) or exactly(call)
        assert lse is not None  # (asked for; dispatch chose what gives it)
        return out, lse

    def by_operator(self, call: TorchCall) -> Tensor:
        """The call as an operator, for tensors without data: a program that is being exported, say."""
        try:  # (the same checks)
            check_possible(check_call(call, self.recipe, self.machine).request)
        except LowbitError:
            if self.strict:
                raise
            return call.run(call_torch, torch_sdpa)
        out: Tensor = torch.ops.lowbit_attention.rerouted_sdpa(*call.in_autocast().operands(), *self.export_options())
        return out

    def _traced(self, call: TorchCall, original: Callable[..., Tensor], why_not: str) -> Tensor:
        """`run` while torch.compile traces: what can be known now is decided now, and an operator does the rest."""
        if self.declines_traced(call, why_not):
            return call.run(original)
        operands = call.in_autocast().operands()
        out: Tensor = torch.ops.lowbit_attention.rerouted_sdpa(*operands, *self.operator_options())
        return out

    def declines_traced(self, call: Declinable, why_not: str = "") -> bool:
        """`declines` while torch.compile traces: it is counted when the code runs."""
        reason = "gradients" if call.wants_grad() else "dropout" if call.dropout_p else why_not
        if reason and not exports():
            torch.ops.lowbit_attention.declined(tally, self.number, reason)
        return bool(reason)

    def operator_options(self) -> tuple[str, str | None, bool, int, OnEmulation]:
        """What an operator is told (`OPTIONS`) that runs here, or where an exported program does."""
        if exports() or not torch.compiler.is_dynamo_compiling():
            return self.export_options()
        # (here the number finds this object, its machine included)
        return self._text, None, self.strict, self.number, self.on_emulation

    def declined(self, reason: str) -> None:
        """Compiled code gave a call to the original."""
        if reason in ("gradients", "dropout"):
            self.count(GRADIENTS if reason == "gradients" else DROPOUT)
        else:
            self.count_other(reason)

    def export_options(self) -> tuple[str, str | None, bool, int, OnEmulation]:
        """What an operator that runs without this object is told: recipe, machine, strictness, nobody's number, and
        what an emulation does.

        Raises:
            InvalidArgumentError: a machine of the caller's own.
        """
        if isinstance(self.like, Machine):
            raise InvalidArgumentError(
                f"like={self.like.name!r}: for a program that is exported give the machine's name, not the object"
            )
        return self._text, self.like, self.strict, _NOBODY, self.on_emulation


def exactly(call: TorchCall) -> Output:
    """Output and lse of exact attention, which torch's own function does not give."""
    checked = check_call(call, EXACT, None, return_lse=True)
    return _ran(checked, choose(checked.request))


def _ran(call: CheckedCall, choice: Chosen) -> Output:
    out, lse = choice.run(*call.arguments())
    return call.finish(out), lse


def kind_of(choice: Chosen) -> CallKind:
    """How a call that this choice ran is counted."""
    known = _kinds.get(choice)
    return known or _kinds.put(CallKind(choice.implementation.name, choice.recipe.name), choice)


_kinds: IdentityMemo[CallKind] = IdentityMemo()


def holds_no_data(t: Tensor) -> bool:
    """Whether a program is being exported, say, and this stands for its tensors."""
    return t.is_meta or (type(t) is not Tensor and isinstance(t, _WITHOUT_DATA))


def in_short(error: LowbitError) -> str:
    """Why a call was refused: of what nothing can run, why the implementation that runs most cannot."""
    if isinstance(error, UnsupportedError) and error.reasons:
        return "; ".join(list(error.reasons.values())[-1])
    return str(error)


def why_not_faster(request: Request) -> str:
    """Why "auto" leaves a call to the original."""
    if (known := _auto_reasons.get(request)) is not None:
        return known
    kernels = [v for v in explain_request(request).verdicts if v.implementation not in ("torch_sdpa", "emulation")]
    reasons = kernels[0].reasons if kernels else ("there is no kernel",)
    return _auto_reasons.put("recipe auto: " + "; ".join(reasons), request)


_auto_reasons: IdentityMemo[str] = IdentityMemo()


# ---- the operators of compiled code and of exported programs

_NOBODY = -1
"""The number in an exported program, which runs where nobody counts."""

# (importlib.reload runs this again, and code compiled before keeps its numbers)
_next: count[int] = globals().get("_next") or count()
_rerouters: weakref.WeakValueDictionary[int, Rerouter] = globals().get("_rerouters") or weakref.WeakValueDictionary()


@lru_cache(maxsize=64)
def _elsewhere(recipe: str, like: str | None, strict: bool, on_emulation: OnEmulation) -> Rerouter:
    return Rerouter(parse_recipe(recipe), like=like, strict=strict, on_emulation=on_emulation)


def named(
    recipe: str, like: str | None, strict: bool, number: int = _NOBODY, on_emulation: OnEmulation = "warn"
) -> Rerouter:
    """The rerouter that an operator is told of (`OPTIONS`), or one like it."""
    return _rerouters.get(number) or _elsewhere(recipe, like, strict, on_emulation)


def _run_rerouted(call: TorchCall, *options: Any) -> Tensor:
    answer = named(*options).answer(call)
    return call.run(call_torch, torch_sdpa) if answer is None else answer[0]


def _declined(tally: Tensor, number: int, reason: str) -> None:
    if (rerouter := _rerouters.get(number)) is not None:
        rerouter.declined(reason)


OPTIONS = f"str recipe, str? like, bool strict, int number={_NOBODY}, str on_emulation='warn'"
"""What an operator is told of its rerouter, as a schema has it (`Rerouter.operator_options`)."""
sdpa_operator("rerouted_sdpa", OPTIONS, _run_rerouted)
operator("declined(Tensor(a!) tally, int number, str reason) -> ()", _declined, lambda *_: None, mutates=True)

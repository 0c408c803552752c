"""What one name of `registration` runs: a recipe for every call, or a policy's for each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypedDict

from torch import Tensor, nn

from ...adaptive.clock import driven
from ...adaptive.policy import Policy
from ...adaptive.routing import Routing
from ...api import Training
from ...backends.base import Output, call_torch, torch_sdpa
from ...call.request import OnEmulation
from ...call.torch_call import TorchCall
from ...errors import InvalidArgumentError, UnsupportedError
from ...recipes.definition import Recipe
from ...recipes.machine import Machine
from ..call_report import TORCH, CallKind, CallReport
from ..intercept import ask
from ..packed import PackedCall, run_packed
from ..rerouting import Rerouter, exactly
from ..scope import Block
from ..sinks import declines_with_sinks, exactly_with_sinks, run_with_sinks, with_sinks
from ..traced import number_of_block
from ..with_lse import ask_with_lse

BY_POLICY = CallKind(TORCH, "exact", "the policy's recipe is exact")
_ELSEWHERE = "the policy is another model's, and knows this one's layers by no name"


class RunOptions(TypedDict):
    """What a `Rerouter` takes besides recipe and report."""

    like: str | Machine | None
    training: Training
    strict: bool
    on_emulation: OnEmulation


class OneRecipe:
    """The same for every call.

    Attributes:
        report: counts them.
        packs: whether `run` takes a `PackedCall`.
    """

    packs = True

    def __init__(self, recipe: str | Recipe, options: RunOptions) -> None:
        self._rerouter = Rerouter(recipe, **options)
        self.report = self._rerouter.report

    def run(self, call: TorchCall | PackedCall, sinks: Tensor | None) -> Tensor:
        """The output of a call, with sinks that broadcast to ``[B, Hq, Nq]`` (a `PackedCall` has its own)."""
        if isinstance(call, PackedCall):
            return run_packed(self._rerouter, call)
        if sinks is not None:
            return run_with_sinks(self._rerouter, call, sinks, torch_sdpa)
        return self._rerouter.run(call, torch_sdpa)

    def close(self) -> None:
        """Nothing is open."""


class OfPolicy:
    """A recipe for each call of one model, by the dotted path of the module that makes it."""

    packs = False

    def __init__(self, policy: Policy, model: nn.Module | None, timesteps: Any, options: RunOptions) -> None:
        if model is None and policy.model is not None:
            raise InvalidArgumentError(
                f"the policy was made for {policy.model.model}: register(policy, model=model) says whose layers its "
                "names are"
            )
        policy.check(model)
        self.report = CallReport()
        runs = {
            name: None if recipe.is_exact else Rerouter(recipe, **options, report=self.report)
            for name, recipe in policy.recipes.items()
        }
        self._any = Rerouter("exact", **options, report=self.report)  # (gradients are counted alike by all)
        routing = Routing(policy, runs, numbered=model is None)
        self._stack = ExitStack()
        if routing.needs_clock or timesteps is not None:
            self._stack.enter_context(driven(routing.clock, timesteps, model))
        self._block = Block(_EachByItsOwn(routing, self._any, model is None), model)
        self._number = number_of_block(self._block)

    def run(self, call: TorchCall | PackedCall, sinks: Tensor | None) -> Tensor:
        """As `OneRecipe.run`, without packed calls."""
        assert isinstance(call, TorchCall)
        if sinks is None:
            return call.run(ask, self._number)
        if declines_with_sinks(self._any, call, sinks):
            return exactly_with_sinks(call, sinks, torch_sdpa)
        return with_sinks(*ask_with_lse(self._number, call), sinks)

    def close(self) -> None:
        """Move no clock any more."""
        self._stack.close()


class _EachByItsOwn:
    """The handler of a policy's block (`integrations.scope.Handler`)."""

    def __init__(self, routing: Routing[Rerouter | None], counts: Rerouter, numbered: bool) -> None:
        self._routing, self._counts, self._numbered = routing, counts, numbered
        self.skipped = counts.declined

    def __call__(self, original: Callable[..., Tensor], name: str | None, *args: Any, **kwargs: Any) -> Tensor:
        call = TorchCall.of(*args, **kwargs)
        rerouter = self._now(name)
        return call.run(call_torch, original) if rerouter is None else rerouter.run(call, original)

    def with_lse(self, name: str | None, call: TorchCall) -> Output:
        """Output and lse."""
        rerouter = self._now(name)
        return exactly(call) if rerouter is None else rerouter.answer_with_lse(call)

    def export_options(self) -> None:
        """An exported program would keep one call's recipe.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("a policy is not written into an exported program: export with one recipe")

    def _now(self, name: str | None) -> Rerouter | None:
        """Who runs the call that happens now; ``None``, and counted: torch does."""
        if name is None and not self._numbered:
            self._counts.count_other(_ELSEWHERE)
            return None
        rerouter = self._routing.now(name)
        if rerouter is None:
            self._counts.report.add(BY_POLICY)
        return rerouter

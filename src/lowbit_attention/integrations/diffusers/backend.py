"""`Backend`: what one name runs, for calls that diffusers dispatches and for those that models make by themselves."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypedDict

from torch import Tensor, nn

from ...adaptive.clock import FORWARDS, Together, driven
from ...adaptive.fingerprint import Fingerprint
from ...adaptive.policy import Policy, PolicyWarning
from ...adaptive.routing import Routing
from ...api import Training
from ...backends.base import Output, call_torch
from ...call.request import OnEmulation
from ...call.torch_call import TorchCall
from ...errors import InvalidArgumentError
from ...recipes.definition import Recipe
from ...recipes.machine import Machine
from .. import traced
from ..call_report import TORCH, CallKind, CallReport
from ..rerouting import exactly
from ..scope import Block, Names, Place
from ..torch_sdpa import Caught
from . import state

EXACT_BY_POLICY = CallKind(TORCH, "exact", "the policy's recipe is exact")


class BackendOptions(TypedDict):
    """What `register` takes besides recipe, name and timesteps."""

    like: str | Machine | None
    training: Training
    strict: bool
    on_emulation: OnEmulation


class Backend:
    """One name in diffusers' list of backends.

    Attributes:
        name: as ``set_attention_backend`` is given it.
        member: the same in diffusers' enum.
        block: what claims the calls that models make to ``F.scaled_dot_product_attention`` by themselves.
        number: that block's, for calls that diffusers dispatches to this name.
    """

    def __init__(
        self, name: str, recipe: str | Recipe | Policy, timesteps: Any, options: BackendOptions, report: CallReport
    ) -> None:
        self.name = name
        self.member: Any = None
        self.report = report
        self._handlers: _OneRecipe | _OfPolicy
        if isinstance(recipe, Policy):
            self._handlers = _OfPolicy(recipe, timesteps, options, report)
        elif timesteps is not None:
            raise InvalidArgumentError(f"timesteps={timesteps!r} means something with a policy only, not with a recipe")
        else:
            self._handlers = _OneRecipe(Caught(recipe, **options, report=report))
        self.block = _Block(self)
        self.number = traced.number_of_block(self.block)
        self._models: weakref.WeakKeyDictionary[nn.Module, tuple[Block, Names]] = weakref.WeakKeyDictionary()

    def check(self, model: nn.Module) -> None:
        """Whether the backend may be given to a model.

        Raises:
            PolicyMismatchError: its policy was made for another one.
        """
        self._handlers.check(model)

    def begin(self, model: nn.Module) -> None:
        """The model was given this backend: names are those it has now, and a clock begins."""
        self._models.pop(model, None)
        self._of(model)

    def place(self, modules: Sequence[nn.Module]) -> Place:
        """Who runs a call of this backend while these modules run, and the name of the innermost."""
        model = state.model_of(modules)
        if model is None:
            return self._handlers.without_model, None
        block, names = self._of(model)
        return block, names.innermost(modules) or ""

    def open(self) -> None:
        """Follow the scheduler, if a policy's steps are to be its."""
        self._handlers.open()

    def close(self) -> None:
        """Move no clock any more."""
        self._handlers.close()

    def _of(self, model: nn.Module) -> tuple[Block, Names]:
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = self._handlers.block_of(model), Names({"": model})
        return known


class _Block(Block):
    """Claims what belongs to a backend by diffusers' own state, read when the call happens."""

    __slots__ = ("backend",)

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend._handlers.without_model.handler)
        self.whole_process = False
        self.backend = weakref.proxy(backend)

    def place(self, modules: Sequence[nn.Module]) -> Place | None:
        return self.backend.place(modules) if state.in_force(modules) == self.backend.name else None

    def asked(self, modules: Sequence[nn.Module]) -> Place:
        place: Place = self.backend.place(modules)
        return place


class _OneRecipe:
    """The same for every model."""

    def __init__(self, caught: Caught) -> None:
        self.without_model = Block(caught)

    def check(self, model: nn.Module) -> None:
        pass

    def block_of(self, model: nn.Module) -> Block:
        return self.without_model

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass


class _OfPolicy:
    """A clock for each model: two that a pipeline runs in turn do not move each other's."""

    def __init__(self, policy: Policy, timesteps: Any, options: BackendOptions, report: CallReport) -> None:
        if policy.model is None:
            raise InvalidArgumentError(
                "the policy was made without a model, so its calls have numbers instead of names: calibrate with "
                "observe(pipe.transformer), or put this one to work with policy.apply()"
            )
        self._policy, self._report = policy, report
        self._runs: dict[str, Caught | None] = {
            name: None if recipe.is_exact else Caught(recipe, **options, report=report)
            for name, recipe in policy.recipes.items()
        }
        of_exact: BackendOptions = {**options, "like": None}
        self._any = Caught("exact", **of_exact, report=report)  # (gradients and dropout are counted alike by all)
        self._open: weakref.WeakKeyDictionary[nn.Module, ExitStack] = weakref.WeakKeyDictionary()
        self._scheduled = Together()
        self._following = ExitStack()
        self._timesteps = timesteps
        self._by_scheduler = timesteps is not None and timesteps != FORWARDS
        if self._by_scheduler:
            with driven(Together(), timesteps, None):  # (what cannot be followed is said now)
                pass
        self.without_model = Block(_Declined(self._any, "the policy's layers are those of a model, and none runs"))

    def check(self, model: nn.Module) -> None:
        self._policy.check(model)

    def block_of(self, model: nn.Module) -> Block:
        assert self._policy.model is not None  # (checked above)
        if differences := self._policy.model.differences(Fingerprint.of(model)):
            why = f"the policy was made for another model than {type(model).__name__}: {'; '.join(differences)}"
            warnings.warn(f"{why}; torch runs its attention", PolicyWarning, stacklevel=2)
            return Block(_Declined(self._any, why))
        routing = Routing(self._policy, self._runs, numbered=False)
        if before := self._open.pop(model, None):
            before.close()
        if self._by_scheduler:
            self._scheduled.join(routing.clock)
        elif routing.needs_clock:
            stack = self._open[model] = ExitStack()
            stack.enter_context(driven(routing.clock, self._timesteps, model))
        return Block(_ByPolicy(routing, self._any, self._report))

    def open(self) -> None:
        if self._by_scheduler:
            self._following.enter_context(driven(self._scheduled, self._timesteps, None))

    def close(self) -> None:
        self._following.close()
        for stack in list(self._open.values()):
            stack.close()


class _Declined:
    """Torch runs every call, for one reason."""

    def __init__(self, caught: Caught, why_not: str) -> None:
        self._caught, self._why_not = caught, why_not
        self.skipped = caught.skipped

    def __call__(self, original: Callable[..., Tensor], name: str | None, *args: Any, **kwargs: Any) -> Tensor:
        return self._caught.run(TorchCall.of(*args, **kwargs), original, why_not=self._why_not)

    def with_lse(self, name: str | None, call: TorchCall) -> Output:
        self._caught.count_other(self._why_not)
        return exactly(call)


class _ByPolicy:
    """The calls of one model, each by its own recipe."""

    def __init__(self, routing: Routing[Caught | None], caught: Caught, report: CallReport) -> None:
        self._routing, self._report = routing, report
        self.skipped, self.passed_by = caught.skipped, caught.passed_by

    def __call__(self, original: Callable[..., Tensor], name: str | None, *args: Any, **kwargs: Any) -> Tensor:
        caught = self._routing.now(name)
        call = TorchCall.of(*args, **kwargs)
        if caught is not None:
            return caught.run(call, original)
        self._report.add(EXACT_BY_POLICY)
        return call.run(call_torch, original)

    def with_lse(self, name: str | None, call: TorchCall) -> Output:
        caught = self._routing.now(name)
        if caught is not None:
            return caught.with_lse(name, call)
        self._report.add(EXACT_BY_POLICY)
        return exactly(call)

"""What stands in ``transformer_options["optimized_attention_override"]``: recipes, a policy, or a calibration.

ComfyUI calls it as ``override(function, *args, **kwargs)`` with what the model asked of ``function``; where q, k and v
come in containers that give their tensor away once, as ``override.container_function(*args, **kwargs)``.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...adaptive.observing import Observer
from ...adaptive.routing import Routes, Routing
from ...backends.base import Emulation
from ...backends.dispatch import explain_request
from ...call.checked import check_call
from ...call.request import OnEmulation
from ...errors import EmulationRefusedError, InvalidArgumentError
from ...recipes.definition import Recipe
from ..call_report import TORCH, CallKind, CallReport
from ..rerouting import Rerouter
from ..scope import Names, frames, running
from .calls import Asked, read
from .runs import SCORED, SigmaWindow, log, sigma_of

EXACT = "the policy keeps it exact"
NOT_OF_THE_MODEL = "it is made outside of the diffusion model"

Previous = Callable[..., Any]
"""The override that was there before: ``previous(function, *args, **kwargs)``."""


class Override(ABC):
    """One node's override. What it does not run goes to the previous override, or to the function that was asked.

    Attributes:
        report: every call that arrived, by implementation and reason.
        previous: the override that was there before, if any.
    """

    def __init__(self, previous: Previous | None, window: SigmaWindow) -> None:
        self.previous, self.window = previous, window
        self.report = CallReport()

    @abstractmethod
    def answer(self, asked: Asked, onward: Callable[[], Tensor]) -> Tensor | None:
        """The output of a call, as it is wanted; ``None``, and counted: another is to run it. ``onward()`` lets it."""

    def begin_forward(self, sigma: Any) -> None:
        """A forward of the model begins."""
        del sigma
        self.window.forget()

    # (Compiled models break their graph here: what is decided and counted is of this call, not of the traced one.)
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call of ``function``, which is one of ComfyUI's attention functions."""

        def onward() -> Any:
            return function(*args, **kwargs) if self.previous is None else self.previous(function, *args, **kwargs)

        asked = self._asked(args, kwargs)
        out = None if asked is None else self.answer(asked, onward)
        return onward() if out is None else out

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def container_function(self, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        """A call whose q, k and v are containers (``peek()``, and ``take()`` once)."""
        containers = q, k, v
        passed_on = False

        def onward() -> Any:
            nonlocal passed_on
            passed_on = True
            return self._onward_with_containers(containers, args, kwargs)

        asked = self._asked((q.peek(), k.peek(), v.peek(), *args), kwargs)
        out = None if asked is None else self.answer(asked, onward)
        if out is None:
            return onward()
        if not passed_on:  # (they are used up by whoever answers)
            for container in containers:
                container.take()
        return out

    def __deepcopy__(self, memo: object) -> Override:
        return self  # (ComfyUI copies the options of a model that is cloned: the counts are the node's)

    def _onward_with_containers(self, containers: tuple[Any, ...], args: Any, kwargs: Any) -> Any:
        whole = getattr(self.previous, "container_function", None)
        if whole is not None:
            return whole(*containers, *args, **kwargs)
        function = importlib.import_module("comfy.ldm.modules.attention").optimized_attention
        if self.previous is None:  # (what marks the call as one that no override is to see again is among kwargs)
            return function(*containers, *args, **kwargs)
        return self.previous(function, *(container.take() for container in containers), *args, **kwargs)

    def _asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Asked | None:
        """The call, if it is one to answer; else it is counted with the reason."""
        try:
            asked = read(*args, **kwargs)
        except TypeError as error:
            asked = f"arguments that are not known: {error}"
        why_not = asked if isinstance(asked, str) else self.window.why_not(asked.options)
        if why_not or isinstance(asked, str):
            self.decline(why_not)
            return None
        return asked

    def decline(self, reason: str) -> None:
        """Count a call that another is to run."""
        self.report.add(CallKind(TORCH, "-", reason))


class ByRecipe(Override):
    """Every call by one recipe.

    Args:
        recipe: as in `attention`. on_emulation: ``"error"`` leaves to others what no kernel runs, with the reason.
    """

    def __init__(
        self, recipe: str | Recipe, previous: Previous | None, window: SigmaWindow, on_emulation: OnEmulation
    ) -> None:
        super().__init__(previous, window)
        self._rerouter = Rerouter(recipe, on_emulation=on_emulation, report=self.report)

    def answer(self, asked: Asked, onward: Callable[[], Tensor]) -> Tensor | None:
        """By the recipe."""
        del onward
        return _by(self._rerouter, asked, self)


class ByPolicy(Override):
    """Each call by its recipe in a policy. A step is one forward of the model, and its timestep the sigma."""

    def __init__(
        self,
        policy: Routes,
        model: nn.Module,
        previous: Previous | None,
        window: SigmaWindow,
        on_emulation: OnEmulation,
    ) -> None:
        super().__init__(previous, window)
        rerouters = {
            name: None if recipe.is_exact else Rerouter(recipe, on_emulation=on_emulation, report=self.report)
            for name, recipe in policy.recipes.items()
        }
        self._routing = Routing(policy, rerouters, numbered=False)
        self._names = Names({"": model})

    def begin_forward(self, sigma: Any) -> None:
        """The next step of the policy's clock."""
        super().begin_forward(sigma)
        if self._routing.needs_clock:
            self._routing.clock.step(_step_of(sigma))

    def answer(self, asked: Asked, onward: Callable[[], Tensor]) -> Tensor | None:
        """By the policy."""
        del onward
        name = _name_here(self._names)
        if name is None:
            self.decline(NOT_OF_THE_MODEL)
            return None
        rerouter = self._routing.now(name)
        if rerouter is None:
            self.decline(EXACT)
            return None
        return _by(rerouter, asked, self)


class Scoring(Override):
    """Every call goes on to whoever ran it before, and is scored on the way."""

    def __init__(self, observer: Observer, model: nn.Module, previous: Previous | None) -> None:
        super().__init__(previous, SigmaWindow())
        self.observer = observer
        self._names = Names({"": model})
        self._said_emulated = False

    def begin_forward(self, sigma: Any) -> None:
        """The next step of the observer's clock."""
        super().begin_forward(sigma)
        self.observer.step(_step_of(sigma))

    def answer(self, asked: Asked, onward: Callable[[], Tensor]) -> Tensor | None:
        """What the others answer."""
        name = _name_here(self._names)
        if name is None:
            self.decline(NOT_OF_THE_MODEL)
            return None

        def original(*_: Any, **__: Any) -> Tensor:
            return onward()

        self._say_emulated(asked)
        self.report.add(SCORED)
        return asked.call.run(self.observer, original, name)

    def _say_emulated(self, asked: Asked) -> None:
        """Say once which candidates no kernel runs here: a policy had better not have them."""
        if self._said_emulated:
            return
        candidates = self.observer.observations.candidates.values()
        try:
            explained = [(r.name, explain_request(check_call(asked.call, r, None).request)) for r in candidates]
        except InvalidArgumentError:  # (the error is for those who run the call)
            return
        self._said_emulated = True
        if emulated := [name for name, explanation in explained if explanation.implementation == Emulation.name]:
            log.warning(
                "lowbit-attention (calibrating): no kernel runs %s for the model's first call here. They are scored by "
                "an emulation, which takes long, and where a policy has them, ComfyUI's own attention will run",
                ", ".join(emulated),
            )


def _by(rerouter: Rerouter, asked: Asked, override: Override) -> Tensor | None:
    """By a recipe; ``None``, and counted: another is to run it."""
    if rerouter.declines(asked.call):
        return None
    try:
        ran = rerouter.answer(asked.call)
    except EmulationRefusedError as error:
        override.decline(_no_kernel(error))
        return None
    return None if ran is None else asked.shaped(ran[0])


def _no_kernel(error: EmulationRefusedError) -> str:
    """Why no kernel runs a call, in short: the first one's first reason."""
    first = next(iter(error.reasons.values()), ("",))[0]
    return f"no kernel runs this recipe here: {first}"


def _name_here(names: Names) -> str | None:
    """The path of the innermost of these modules whose forward is running."""
    return names.innermost([m for frame in frames(sys._getframe(2)) if (m := running(frame)) is not None])


def _step_of(sigma: Any) -> float | None:
    """A step's timestep; ``None`` where no sigma is known (then they are numbered)."""
    return None if sigma is None else sigma_of(sigma)

"""A policy at work: every attention call goes to its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..backends.base import call_torch
from ..call.request import OnEmulation
from ..functional import SDPA, make_sdpa
from ..integrations.intercept import intercepted
from ..recipes.definition import Recipe
from ..recipes.machine import Machine
from .clock import ROOT, CallKey, Clock, driven


class Routes(Protocol):
    """What is put to work of a `Policy`: recipe names by call, what they mean, and what unknown calls run."""

    @property
    def routes(self) -> Mapping[CallKey, str]: ...
    @property
    def recipes(self) -> Mapping[str, Recipe]: ...
    @property
    def default(self) -> str: ...


Runs = TypeVar("Runs")


class Routing(Generic[Runs]):
    """Which recipe the call that happens now runs, by a policy and a clock.

    A name whose recipe is the same wherever it was observed runs it at any index and timestep, and nothing is counted
    for it. Otherwise an unknown index runs the default, an unknown timestep the nearest known one's recipe.

    Args:
        policy: what runs where.
        runs: what runs a recipe, by the recipe's name.
        numbered: whether calls have numbers (``call 0``, …) and no names.
    """

    def __init__(self, policy: Routes, runs: Mapping[str, Runs], numbered: bool) -> None:
        self.clock = Clock()
        self._default = runs[policy.default]
        by_name: dict[str, dict[int, dict[float, str]]] = {}
        for key, recipe in policy.routes.items():
            by_name.setdefault(key.name, {}).setdefault(key.index, {})[key.timestep] = recipe
        self._same: dict[str, Runs] = {}
        self._varied: dict[str, dict[int, dict[float, Runs]]] = {}
        for name, by_index in by_name.items():
            used = {recipe for by_timestep in by_index.values() for recipe in by_timestep.values()}
            if len(used) == 1:
                self._same[name] = runs[used.pop()]
            else:
                self._varied[name] = {
                    i: {t: runs[recipe] for t, recipe in by_timestep.items()} for i, by_timestep in by_index.items()
                }
        self._counted = {"": True} if numbered else dict.fromkeys(self._varied, True)

    @property
    def needs_clock(self) -> bool:
        """Whether what runs depends on the number of a call, or on the step."""
        return bool(self._counted)

    def now(self, name: str | None) -> Runs:
        """What runs the call that happens now in the module of this name. Counts it, if the count matters."""
        path = "" if name is None else name or ROOT
        if path not in self._counted:
            return self._same.get(path, self._default)
        key = self.clock.key(path or None)
        if key.name in self._same:
            return self._same[key.name]
        by_timestep = self._varied.get(key.name, {}).get(key.index)
        if by_timestep is None:
            return self._default
        if key.timestep not in by_timestep:
            nearest = min(by_timestep, key=lambda t: (abs(t - key.timestep), t))
            by_timestep[key.timestep] = by_timestep[nearest]
        return by_timestep[key.timestep]


_at_work: set[Applied] = set()
"""Policies that were applied and not removed: they hold although nobody else refers to them."""


class Applied:
    """A policy at work (`Routing`). `remove` ends it; `step` and `restart` move its clock as `Observer`'s do."""

    def __init__(
        self,
        policy: Routes,
        model: torch.nn.Module | None,
        timesteps: Any,
        like: str | Machine | None,
        on_emulation: OnEmulation,
    ) -> None:
        self.policy = policy
        functions: dict[str, SDPA | None] = {
            name: None if recipe.is_exact else make_sdpa(recipe, like=like, on_emulation=on_emulation)
            for name, recipe in policy.recipes.items()
        }
        """``None`` is torch's own function."""
        self.routing = Routing(policy, functions, numbered=model is None)
        self.clock = self.routing.clock
        self._stack = ExitStack()
        if self.routing.needs_clock or timesteps is not None:
            self._stack.enter_context(driven(self.clock, timesteps, model))
        self._stack.enter_context(intercepted(self._handle, model))
        _at_work.add(self)

    def step(self, timestep: float | None = None) -> None:
        """Begin a step (before its calls): the timestep's value, or none to number them."""
        self.clock.step(timestep)

    def restart(self) -> None:
        """Begin a new run (prompt): the next step is the first again."""
        self.clock.restart()

    def remove(self) -> None:
        """Route nothing any more. A second time does nothing."""
        self._stack.close()
        _at_work.discard(self)

    def _handle(self, original: Any, name: str | None, *args: Any, **kwargs: Any) -> Tensor:
        function = self.routing.now(name)
        return call_torch(original, *args, **kwargs) if function is None else function(*args, **kwargs)

"""Which call this is: its name, its number within the step, and the step.

`observe` and an applied policy count in the same way, or a policy would not find the calls that it was made for.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InvalidArgumentError, shown

FORWARDS = "forwards"
"""``timesteps="forwards"``: every forward of the model is the next step."""


ROOT = "(model)"
"""The name of calls that the model itself makes, outside its submodules."""


@dataclass(frozen=True)
class CallKey:
    """A call's stable name: module path, number of the call within the step, timestep."""

    name: str
    index: int
    timestep: float

    def as_dict(self) -> dict[str, Any]:
        """Its fields by name."""
        return {"name": self.name, "index": self.index, "timestep": self.timestep}

    def __str__(self) -> str:
        return f"{self.name}[{self.index}] at {self.timestep:g}"


class Clock:
    """The current step of the current run, and how often each name was called in it."""

    def __init__(self) -> None:
        self.timestep = 0.0
        self.number = -1
        """Of the step, from 0; −1 before a run's first step."""
        self.runs = 0
        """In which there was a call."""
        self.by_hand = False
        """Whether `step` was ever called: then forwards of the model begin nothing."""
        self._counts: dict[str, int] = {}
        self._fresh = True

    def step(self, timestep: float | None = None) -> None:
        """Begin a step: the timestep's value if you have one, else the steps are numbered 0, 1, …

        Raises:
            InvalidArgumentError: a timestep that is no number.
        """
        self.by_hand = True
        self.advance(timestep)

    def advance(self, timestep: float | None = None) -> None:
        """`step`, by a hook."""
        value = float(self.number + 1) if timestep is None else _number(timestep)
        self.number, self.timestep = self.number + 1, value
        self._counts.clear()

    def restart(self) -> None:
        """Begin a new run (prompt): the next step is the first."""
        self.number, self.timestep = -1, 0.0
        self._counts.clear()
        self._fresh = True

    def key(self, name: str | None) -> CallKey:
        """The key of the call that happens now: in module ``name``, or (``None``) ``call 0``, ``call 1``, …"""
        if self.number < 0:
            self.advance()
        self.runs += self._fresh
        self._fresh = False
        path = "" if name is None else name or ROOT
        index = self._counts.get(path, 0)
        self._counts[path] = index + 1
        return CallKey(path, index, self.timestep) if path else CallKey(f"call {index}", 0, self.timestep)


class Together(Clock):
    """A clock that moves others with it: those of several models that one scheduler drives."""

    def __init__(self) -> None:
        super().__init__()
        self._others: weakref.WeakSet[Clock] = weakref.WeakSet()

    def join(self, other: Clock) -> None:
        """Let another go with this one, from where this one is."""
        other.number, other.timestep = self.number, self.timestep
        self._others.add(other)

    def advance(self, timestep: float | None = None) -> None:
        super().advance(timestep)
        for other in tuple(self._others):
            other.advance(self.timestep)

    def restart(self) -> None:
        super().restart()
        for other in tuple(self._others):
            other.restart()


def _number(value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:  # (an integer may be beyond any float)
        raise InvalidArgumentError(f"a timestep is a number that is finite, got {shown(value)}")
    return float(value)


@contextmanager
def driven(clock: Clock, timesteps: Any, model: torch.nn.Module | None) -> Iterator[None]:
    """Within the block ``timesteps`` moves the clock.

    Args:
        timesteps: ``None``: only `Clock.step` does, and until it is called every forward of the model begins the one
            step anew; `FORWARDS`; or an object with a ``step`` method (a diffusion scheduler), whose ``timesteps``, if
            it has any, are the values.

    Raises:
        InvalidArgumentError: anything else, or the forwards of no model.
    """
    if timesteps is not None and timesteps != FORWARDS:
        if not callable(getattr(timesteps, "step", None)):
            raise InvalidArgumentError(
                f"timesteps={timesteps!r} is neither None, {FORWARDS!r} nor an object with a step method"
            )
        with _following(clock, timesteps):
            yield
        return
    if timesteps == FORWARDS and model is None:
        raise InvalidArgumentError(f"timesteps={FORWARDS!r} counts the forwards of a model, and none was given")

    def begin() -> None:
        if timesteps == FORWARDS:
            clock.advance()
        elif not clock.by_hand:
            clock.restart()

    restore = _Restore(model.register_forward_pre_hook(_BeforeForward(begin)).remove if model is not None else _nothing)
    del model  # (who holds the block keeps no model alive)
    try:
        yield
    finally:
        restore()


def _nothing(*_: Any) -> None:
    pass


class _Restore:
    """Undoes a change once; also when an interrupt kept the block that owns this from doing so, and it is let go."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def __call__(self) -> None:
        self._undo()
        self._undo = _nothing

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self()


class _BeforeForward:
    """A forward pre-hook that moves a clock. A copy of the model has its own forwards, and moves no clock."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin

    def __call__(self, module: torch.nn.Module, args: object) -> None:
        self.begin()

    def __deepcopy__(self, memo: object) -> _RemovesItself:
        return _RemovesItself()

    def __reduce__(self) -> tuple[Any, ...]:
        # A file must open where this library is not: a function of Python's own that takes anything and does nothing.
        return functools.partial, (sys.audit, "lowbit_attention.forward of a saved copy")


class _RemovesItself:
    """What stands for `_BeforeForward` in a copy of the model, until the copy's first forward."""

    def __call__(self, module: torch.nn.Module, args: object) -> None:
        for number, hook in list(module._forward_pre_hooks.items()):
            if hook is self:
                del module._forward_pre_hooks[number]


class _Followed:
    """Stands for a scheduler's own method, signature included: pipelines give what they find there, and no more.

    A copy of the scheduler has its own method back.
    """

    def __init__(self, scheduler: Any, name: str, own: Any, run: Callable[..., Any]) -> None:
        self.scheduler, self.name, self.run = scheduler, name, run
        with contextlib.suppress(TypeError, ValueError):  # (some callables have none)
            self.__signature__ = inspect.signature(own)
        self.__doc__ = getattr(own, "__doc__", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.scheduler, self.name)


@contextmanager
def _following(clock: Clock, scheduler: Any) -> Iterator[None]:
    """Within the block the scheduler's own ``step`` (called after a step) moves the clock to the next timestep."""
    original, reset = scheduler.step, getattr(scheduler, "set_timesteps", None)

    def value(number: int) -> float | None:
        values = getattr(scheduler, "timesteps", None)
        return None if values is None or number >= len(values) else _number(values[number])

    def begin() -> None:
        clock.restart()
        clock.advance(value(0))

    def step(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        values = getattr(scheduler, "timesteps", None)
        if values is not None and clock.number + 1 >= len(values):
            begin()  # that was the last one
        else:
            clock.advance(value(clock.number + 1))
        return out

    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        out = reset(*args, **kwargs) if reset is not None else None
        begin()
        return out

    replaced = {"step": step} | ({} if reset is None else {"set_timesteps": set_timesteps})
    before = {name: scheduler.__dict__[name] for name in replaced if name in getattr(scheduler, "__dict__", {})}

    def undo() -> None:
        for name in replaced:
            if name in before:
                setattr(scheduler, name, before[name])
            elif name in scheduler.__dict__:
                delattr(scheduler, name)

    restore = _Restore(undo)
    for name, function in replaced.items():
        setattr(scheduler, name, _Followed(scheduler, name, getattr(scheduler, name), function))
    begin()
    try:
        yield
    finally:
        restore()

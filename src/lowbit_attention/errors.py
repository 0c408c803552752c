"""Every error this library raises on purpose.

Each message carries the offending values and, where there is one, the way out.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


def shown(value: Any) -> str:
    """A value in an error's text, in one line, however large it is.

    >>> shown(10**5000), shown("a" * 1000)[:6]
    ('an integer of 16610 bits', "'aaaaa")
    """
    if isinstance(value, int) and value.bit_length() > 200:  # (Python refuses to print those of many thousand digits)
        return f"an integer of {value.bit_length()} bits"
    return " ".join(_short.repr(value).split())


class LowbitError(Exception):
    """Base class of all errors raised on purpose by this library.

    Each survives `pickle` and `copy` with its text and its fields, so that a worker process may raise it.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Python's own way calls the class with the text alone, which is not what a class with fields takes
        return _made_again, (type(self), self.args, dict(self.__dict__))


def _made_again(cls: type[LowbitError], args: tuple[Any, ...], fields: dict[str, Any]) -> LowbitError:
    """An error as it was, without its class's own ``__init__``."""
    error = cls.__new__(cls, *args)
    base: Any = next(c for c in cls.__mro__ if c.__module__ == "builtins")
    base.__init__(error, *args)  # (an ImportError keeps its text in a field of its own)
    error.__dict__.update(fields)
    return error


class InvalidArgumentError(LowbitError, ValueError):
    """An argument has a wrong value, shape, dtype or device."""


class SaveError(LowbitError, OSError):
    """A file could not be written."""


class InvalidRecipeError(InvalidArgumentError):
    """A recipe, or a recipe together with a geometry, contradicts itself.

    ``reasons`` holds every contradiction, not only the first.
    """

    def __init__(self, subject: str, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"{subject}: " + "; ".join(self.reasons))


class UnsupportedError(LowbitError, NotImplementedError):
    """No implementation can run this request.

    ``reasons`` maps each implementation's name to every reason why it cannot.
    """

    def __init__(self, message: str, reasons: dict[str, tuple[str, ...]] | None = None) -> None:
        self.reasons = dict(reasons or {})
        lines = [message]
        for name, why in self.reasons.items():
            lines.extend(f"  {name}: {reason}" for reason in why)
        super().__init__("\n".join(lines))


class EmulationRefusedError(UnsupportedError):
    """A call asked for ``on_emulation="error"``, and the emulation alone could run it."""


class MissingExtraError(LowbitError, ImportError):
    """A feature needs packages that come with one of this package's extras."""

    def __init__(self, feature: str, extra: str, missing: str) -> None:
        self.extra = extra
        super().__init__(
            f'{feature} needs the package {missing!r}, which is not installed: pip install "lowbit-attention[{extra}]"'
        )


class KernelUnavailableError(LowbitError):
    """A kernel cannot be had here: not compiled, not read, not loaded. Other ways to compute the same may be open.

    ``reason`` says why and ``way_out`` what to do about it, each in one line; ``details`` may be a compiler's log.
    """

    def __init__(self, reason: str, way_out: str = "", details: str = "") -> None:
        self.reason, self.way_out, self.details = reason, way_out, details
        Exception.__init__(self, reason, way_out, details)  # (not what else a subclass is, an ImportError say)

    def __str__(self) -> str:
        first = f"{self.reason}: {self.way_out}" if self.way_out else self.reason
        return f"{first}\n{self.details}" if self.details else first


class FallbackWarning(UserWarning):
    """A kernel failed, and something slower runs its calls; said once for each kernel and recipe."""


class EmulationWarning(UserWarning):
    """A named recipe is emulated on a GPU, far slower than a kernel; said once for each recipe and reasons."""

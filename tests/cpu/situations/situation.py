"""A situation: something a user did that once went wrong, what it does, and what must come of it.

Each ``kind_*.py`` beside this file is a list ``SITUATIONS``; `test_situations` runs them all. To add one, append it to
the list of its kind: nothing else. What needs a process of its own, signals or many repeats is a test of its own and
stands in ``ELSEWHERE`` of `test_situations` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Expectation = Callable[[Callable[[], Any]], None]
"""Runs what it is given, and asserts."""


@dataclass(frozen=True)
class Situation:
    """``case`` is the number of the report it stands for (``"T7"``), or that with a ``+``: the same kind, found by us.

    ``act`` gets an empty folder and does it; ``expect`` says what must come of it.
    """

    case: str
    what: str
    act: Callable[[Path], Any]
    expect: Expectation

    @property
    def label(self) -> str:
        """The name of its test."""
        return f"{self.case}: {self.what}"


def gives(expected: Any) -> Expectation:
    """It returns this."""

    def check(run: Callable[[], Any]) -> None:
        found = run()
        assert found == expected, f"gave {found!r}, not {expected!r}"

    return check


def holds(true_of: Callable[[Any], bool]) -> Expectation:
    """It returns something of which this is true."""

    def check(run: Callable[[], Any]) -> None:
        found = run()
        assert true_of(found), f"gave {found!r}"

    return check


def refused(error: type[BaseException], *words: str, lines: int | None = 1) -> Expectation:
    """It raises exactly this kind of error, whose text holds all the words, in ``lines`` lines (``None``: any)."""

    def check(run: Callable[[], Any]) -> None:
        with pytest.raises(error) as caught:
            print("gave", run())
        text = str(caught.value)
        missing = [word for word in words if word not in text]
        assert not missing, f"{text!r} does not say {missing}"
        assert lines is None or len(text.strip().splitlines()) <= lines, f"more than {lines} line(s): {text!r}"

    return check


def exits(code: int, *words: str) -> Expectation:
    """A command (``act`` returns typer's test result) ends with this code, and its output holds all the words."""

    def check(run: Callable[[], Any]) -> None:
        result = run()
        output = " ".join(result.output.split())
        escaped = result.exception is not None and not isinstance(result.exception, SystemExit)
        assert not escaped, f"a traceback: {result.exception!r}"
        assert result.exit_code == code, f"exit code {result.exit_code}, not {code}: {output}"
        missing = [word for word in words if word not in output]
        assert not missing, f"{output!r} does not say {missing}"

    return check

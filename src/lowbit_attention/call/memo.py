"""What is remembered between calls: most calls of a model are alike, and a look at their arguments costs microseconds.

Every memory of the package that lives as long as the process and grows with its calls is one of these two, so that all
are bounded, and forgotten together where a test or a reload wants that (`forget_all`).
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

MOST = 4096
"""Answers that a memory holds: the calls of the largest models differ in some hundred ways."""

_all: weakref.WeakSet[Any] = weakref.WeakSet()


class Memo(Generic[Value]):
    """Answers by a key that is hashed. Full, it forgets everything: what is still asked for comes back.

    >>> memo = Memo[int](most=2)
    >>> memo.put("a", 1), memo.get("a"), memo.get("b")
    (1, 1, None)
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._answers: dict[Hashable, Value] = {}
        self.get = self._answers.get
        """The answer to a key, or ``None``. (The dictionary's own method: a call of ours costs the host 50 ns more.)"""
        _all.add(self)

    def put(self, key: Hashable, value: Value) -> Value:
        """Remember ``value``, and give it back."""
        if len(self._answers) >= self._most:
            self._answers.clear()
        self._answers[key] = value
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._answers.clear()

    def __len__(self) -> int:
        return len(self._answers)


class IdentityMemo(Generic[Value]):
    """Answers by which objects are asked about, not by their values: cheaper where a hash would read many fields.

    One to three objects. They are held, so that none of another life can have their place in memory.

    >>> memo = IdentityMemo[str]()
    >>> request, recipe = object(), object()
    >>> memo.put("plan", request, recipe), memo.get(request, recipe), memo.get(recipe, request), memo.get(request)
    ('plan', 'plan', None, None)
    """

    __slots__ = ("__weakref__", "_answers", "_most")

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._answers: dict[object, tuple[tuple[object, ...], Value]] = {}
        _all.add(self)

    # (``*objects`` would be shorter, and takes the host 0.3 to 0.7 µs longer a call)

    def get(self, first: object, second: object = None, third: object = None) -> Value | None:
        """The answer about these very objects, or ``None``."""
        found = self._answers.get(id(first) if second is None else (id(first), id(second), id(third)))
        return None if found is None else found[1]

    def put(self, value: Value, first: object, second: object = None, third: object = None) -> Value:
        """Remember ``value`` about these objects, and give it back."""
        if len(self._answers) >= self._most:
            self._answers.clear()
        key = id(first) if second is None else (id(first), id(second), id(third))
        self._answers[key] = (first, second, third), value
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._answers.clear()

    def __len__(self) -> int:
        return len(self._answers)


def forget_all() -> None:
    """Forget what every memory holds."""
    for memo in tuple(_all):
        memo.clear()

"""`CallReport`: which calls ran where, and why not elsewhere."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..output.console import plain, rendered

if TYPE_CHECKING:
    from rich.table import Table

_MOST_KINDS = 200
"""Reasons may hold sizes; beyond so many kinds the rest is counted together."""


@dataclass(frozen=True)
class CallKind:
    """Calls that are counted together: an empty ``reason`` means that nothing spoke against the recipe."""

    implementation: str
    recipe: str
    reason: str = ""


TORCH = "torch"
"""The implementation of calls that torch's own function ran, for the reason given."""

REPLACEMENT = "replacement"
"""The implementation of calls that somebody else's replacement of torch's function ran by itself."""

_NOT_OURS = (TORCH, REPLACEMENT)

OTHER_REASONS = CallKind(TORCH, "-", "other reasons")


class CallReport:
    """Calls of ``scaled_dot_product_attention`` by implementation, recipe and reason; ``print`` shows a table.

    Replays of a CUDA graph are not counted: nothing of Python runs in them.
    """

    def __init__(self) -> None:
        # (Each thread has its own counts, so there is no lock that an interrupt or a fork could leave closed.)
        self._by_thread: dict[int, dict[CallKind, int]] = {}
        self.of = ""
        """Which part of a pipeline these are calls of; empty for a module and for the whole process."""

    @property
    def counts(self) -> dict[CallKind, int]:
        """Number of calls of each kind, most frequent first."""
        found: Counter[CallKind] = Counter()
        for counts in list(self._by_thread.values()):
            found.update(dict(counts))
        return dict(found.most_common())

    @property
    def calls(self) -> int:
        """All calls that arrived."""
        return sum(self.counts.values())

    @property
    def ran(self) -> int:
        """Calls that this library ran."""
        return sum(n for kind, n in self.counts.items() if kind.implementation not in _NOT_OURS)

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that this library did not run, by reason."""
        return {kind.reason: n for kind, n in self.counts.items() if kind.implementation in _NOT_OURS}

    def by_implementation(self) -> dict[str, int]:
        """Calls by implementation: ``{"attention_wgmma": 60, "torch": 2}``."""
        found: Counter[str] = Counter()
        for kind, n in self.counts.items():
            found[kind.implementation] += n
        return dict(found.most_common())

    def clear(self) -> None:
        """Count from zero."""
        self._by_thread.clear()

    def add(self, kind: CallKind) -> None:
        """Count one call."""
        mine = self._by_thread.setdefault(threading.get_ident(), {})
        if kind not in mine and len(mine) >= _MOST_KINDS:
            kind = OTHER_REASONS
        mine[kind] = mine.get(kind, 0) + 1

    def __rich__(self) -> Table:
        from rich.table import Table

        of = f" ({plain(self.of)})" if self.of else ""
        table = Table(title=f"{self.calls} calls of scaled_dot_product_attention{of}, {self.ran} by this library")
        table.add_column("calls", justify="right")
        table.add_column("ran on")
        table.add_column("recipe")
        table.add_column("why not the recipe asked for", overflow="fold")
        for kind, n in self.counts.items():
            # (names and reasons hold [cuda13], and what other packages call themselves)
            table.add_row(str(n), plain(kind.implementation), plain(kind.recipe), plain(kind.reason))
        return table

    def __str__(self) -> str:
        return rendered(self)

"""Reports on any console: what stands in brackets is shown, and what the console cannot show is spelt otherwise."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from situation import Situation, holds

import lowbit_attention
from lowbit_attention.integrations.call_report import TORCH, CallKind, CallReport

ADVICE = 'pip install "lowbit-attention[cuda13]"'


def printed(encoding: str, make: Callable[[], Any]) -> Callable[[Path], str]:
    """What a console of that encoding shows of ``print(make())``; it refuses what it cannot show, as Python's do."""

    def act(folder: Path) -> str:
        del folder
        written = io.BytesIO()
        stream = io.TextIOWrapper(written, encoding, errors="strict", write_through=True)
        with mock.patch.object(sys, "stdout", stream):
            print(make())
        return written.getvalue().decode(encoding)

    return act


def report(*reasons: str) -> Callable[[], CallReport]:
    """A report of calls that torch ran for these reasons."""

    def make() -> CallReport:
        made = CallReport()
        for reason in reasons:
            made.add(CallKind(TORCH, "sage2_8b:q=[x]", reason))
        return made

    return make


def explanation() -> Any:
    """Of a call whose sizes are told with ×."""
    q = torch.zeros(1, 2, 8, 64, dtype=torch.float32)
    return lowbit_attention.explain(q, q, q)


def says(*words: str) -> Callable[[str], bool]:
    """All the words."""
    return lambda text: all(word in text for word in words)


SITUATIONS = [
    Situation("S16", "print(report) on cp1252", printed("cp1252", report("64 × 64 ≤ 7")), holds(says("64 × 64 <= 7"))),
    Situation("S16", "explain() on cp1251", printed("cp1251", explanation), holds(says("1 x 2 heads x 8 x 64"))),
    Situation("S16+", "print(report) on ASCII", printed("ascii", report("é → ж")), holds(says("\\xe9 -> \\u0436"))),
    Situation("S16+", "print(report) on cp437", printed("cp437", report("64 × 64")), holds(says("64 x 64"))),
    Situation("S16+", "print(report) on UTF-8", printed("utf-8", report("é → ж")), holds(says("é → ж", "┏"))),
    Situation("T31", "print(report) with advice", printed("utf-8", report(ADVICE)), holds(says(ADVICE, "q=[x]"))),
    Situation("T31+", "print(report) with a closing tag", printed("utf-8", report("a[/red].q")),
              holds(says("a[/red].q"))),
    Situation("T31+", "print(report) with an escape sequence", printed("utf-8", report("\x1b]0;title\x07")),
              holds(says("\\x1b]0;title\\x07"))),
]  # fmt: skip

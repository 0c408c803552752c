"""Every situation of every kind; and that every report we know of has one, or a test elsewhere."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from situation import Situation

HERE = Path(__file__).parent
KINDS = sorted(path.stem for path in HERE.glob("kind_*.py"))
BY_KIND: dict[str, list[Situation]] = {kind: importlib.import_module(kind).SITUATIONS for kind in KINDS}

ELSEWHERE: dict[str, str] = {}
"""Reports whose tests need more than a situation has: the file, below tests/, that names the case."""


@pytest.mark.parametrize(
    "situation", [pytest.param(s, id=f"{kind[5:]}-{s.label}") for kind, all_ in BY_KIND.items() for s in all_]
)
def test_situation(situation: Situation, tmp_path: Path) -> None:
    situation.expect(lambda: situation.act(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_case_that_no_report_named(kind: str) -> None:
    assert any(s.case.endswith("+") for s in BY_KIND[kind])


@pytest.mark.parametrize("case", sorted(ELSEWHERE))
def test_a_case_tested_elsewhere_is_there(case: str) -> None:
    assert case in (HERE.parent.parent / ELSEWHERE[case]).read_text(encoding="utf-8").replace(",", " ").split()

"""Every situation of every kind; and that every report we know of has one, or a test elsewhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from situation import Situation

HERE = Path(__file__).parent
KINDS = sorted(path.stem for path in HERE.glob("kind_*.py"))
BY_KIND: dict[str, list[Situation]] = {kind: importlib.import_module(kind).SITUATIONS for kind in KINDS}

ELSEWHERE = {
    "S1": "cpu/test_hostile_defaults.py",
    "S2": "cpu/test_hostile_defaults.py",
    "S4": "cpu/test_known_faults.py",
    "S5": "cpu/test_known_faults.py",
    "S6": "cpu/test_known_faults.py",
    "S7": "cpu/integrations/test_scope.py",
    "S8": "cpu/integrations/test_scope.py",
    "S9": "cpu/test_known_faults.py",
    "S11": "cpu/test_known_faults.py",
    "S12": "cpu/integrations/test_scope.py",
    "S13": "cpu/test_causal_reach.py",
    "S14": "cpu/test_known_faults.py",
    "S15": "cpu/test_hostile_defaults.py",
    "S17": "cpu/integrations/test_scope.py",
    "S18": "cpu/test_known_faults.py",
    "S19": "cpu/integrations/test_scope.py",
    "S20": "gpu/test_known_faults.py",
    "T1": "cpu/integrations/test_scope.py",
    "T2": "cpu/integrations/test_scope.py",
    "T3": "cpu/integrations/test_scope.py",
    "T4": "cpu/integrations/test_scope.py",
    "T5": "cpu/integrations/test_scope.py",
    "T6": "cpu/test_hostile_defaults.py",
    "T11": "cpu/test_lse_bound.py",
    "T24": "cpu/adaptive/test_report.py",
    "T32": "cpu/test_failures.py",
    "K1": "gpu/test_recipe_fuzz.py",
}
"""Reports whose tests need more than a situation has: the file, below tests/, that names the case."""

REPORTS = [f"S{n}" for n in range(1, 22)] + [f"T{n}" for n in range(1, 38)] + ["K1"]


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
    assert re.search(rf"\b{case}\b", (HERE.parent.parent / ELSEWHERE[case]).read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", REPORTS)
def test_every_report_is_tested(case: str) -> None:
    here = {s.case.removesuffix("+") for all_ in BY_KIND.values() for s in all_}
    assert case in here or case in ELSEWHERE

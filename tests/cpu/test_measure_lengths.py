"""The tool that measures errors by length: what it writes, and what it replaces."""

import csv
import sys

import measure_lengths
import pytest
import torch

from lowbit_attention import RECIPES
from lowbit_attention.evaluation.errors import Grid
from lowbit_attention.recipes.machine import resolve_machine


def run(monkeypatch, path, *options):
    """The rows of the file after a run with ``options``."""
    small = ("--heads", "2", "--head-dim", "32", "--families", "normal", "sink_zero", "--csv", str(path))
    monkeypatch.setattr(sys, "argv", ["measure_lengths.py", *small, *options])
    measure_lengths.main()
    return list(csv.DictReader(path.open()))


def test_it_writes_and_replaces_cells(monkeypatch, tmp_path):
    path = tmp_path / "new" / "e.csv"
    first = run(monkeypatch, path, "--lengths", "200", "--seeds", "2", "--recipes", "sage2_8b", "fast_8b")
    cells = [(row["family"], row["recipe"]) for row in first]
    assert cells == [(f, r) for f in ("normal", "sink_zero") for r in ("sage2_8b", "fast_8b")]
    grid = Grid(heads=2, seeds=2, head_dim=32, query_rows=64)
    found = grid.measure(["normal"], 200, {"r": RECIPES["fast_8b"]}, resolve_machine("sm_90a", "instruction"))
    (normal,) = (row for row in first if (row["family"], row["recipe"]) == ("normal", "fast_8b"))
    assert float(normal["l1"]) == pytest.approx(found["normal", "r"].l1, rel=1e-3)
    assert float(normal["standard_error"]) == pytest.approx(found["normal", "r"].standard_error, rel=0.02)
    assert 0 < float(normal["times_error"]) < 0.3
    yardstick = next(row for row in first if (row["family"], row["recipe"]) == ("normal", "sage2_8b"))
    ratio = float(normal["l1"]) / float(yardstick["l1"])
    assert float(normal["times_yardstick"]) == pytest.approx(ratio, rel=1e-3)

    second = run(monkeypatch, path, "--lengths", "200", "300", "--seeds", "1", "--recipes", "sage2_8b")
    by_cell = {(row["family"], row["recipe"], row["length"]): row["seeds"] for row in second}
    assert len(by_cell) == len(second) == 6
    assert by_cell["normal", "sage2_8b", "200"] == "1"  # replaced
    assert by_cell["normal", "fast_8b", "200"] == "2"  # kept


def test_other_settings_are_other_cells(monkeypatch, tmp_path):
    path = tmp_path / "e.csv"
    common = ("--lengths", "128", "--seeds", "1", "--recipes", "fast_8b")
    run(monkeypatch, path, *common)
    rows = run(monkeypatch, path, *common, "--same-mean", "--fidelity", "step", "--causal")
    assert len(rows) == 4
    assert {(row["same_mean"], row["fidelity"], row["causal"]) for row in rows} == {
        ("False", "instruction", "False"), ("True", "step", "True"),
    }  # fmt: skip


def test_kernels_that_do_not_exist_leave_no_rows(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path / "e.csv", "--lengths", "64", "--seeds", "1", "--kernel") == []
    assert "no kernel runs recipe fast_8b" in capsys.readouterr().out


def test_what_does_not_fit_is_halved(monkeypatch):
    """A group of families whose memory is not there is measured in parts."""
    asked = []

    def case(self, families, length, machine, device):
        asked.append(len(families))
        if len(families) > 2:
            raise torch.cuda.OutOfMemoryError
        return list(families)

    monkeypatch.setattr(Grid, "case", case)
    monkeypatch.setattr(measure_lengths, "run", lambda case, *_: {(family, "x"): None for family in case})
    monkeypatch.setattr(measure_lengths, "rows_of", lambda errors, *_: list(errors))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    options = type("Options", (), {"device": "cuda", "kernel": False})()
    rows = measure_lengths.measure("abcde", Grid(), 64, {}, resolve_machine(None), options)
    assert rows == [(family, "x") for family in "abcde"]
    assert asked == [5, 2, 3, 1, 2]

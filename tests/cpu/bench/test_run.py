"""A run: rows, ratios and notes."""

import pytest
import torch
from bench_cases import TINY, Fake, inputs, measured

from lowbit_attention.bench import run, sensors
from lowbit_attention.bench.base import Unsupported
from lowbit_attention.bench.shapes import parse_shape


def test_a_run_gives_rows_ratios_and_notes():
    q = torch.zeros(1, 2, 64, 32)
    works = {"whole": lambda: q, "kernel": lambda: None}
    cudnn = Fake("torch_cudnn", {"whole": lambda: q})
    infinite = Fake("infinite", {"whole": lambda: q / 0})
    late = Fake("late", {"whole": lambda: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("…"))})
    refusing = Fake("refusing", Unsupported("not for me"))
    raising = Fake("raising", ValueError("what\nelse"))
    others = [cudnn, infinite, late, refusing, raising]
    (result,) = measured([Fake("works", works), *others])
    assert [(r.provider, r.part) for r in result.rows] == [
        ("works", "whole"), ("works", "kernel"), ("torch_cudnn", "whole")
    ]  # fmt: skip
    reference = result.rows[2].median_us
    for row in result.rows:
        assert row.ratio_to_cudnn == pytest.approx(reference / row.median_us, abs=1e-4)
        assert row.p20_us <= row.median_us <= row.p80_us
        assert row.rounds == 5
        assert row.host_us is None
        assert (row.shape, row.dtype, row.gpu) == ("1x2x64x32", "bf16", "CPU")
    assert {(n.provider, n.reason) for n in result.notes} == {
        ("infinite whole", "ArithmeticError: its output is not finite"),
        ("late whole", "out of memory"),
        ("refusing", "not for me"),
        ("raising", "ValueError: what"),
    }


def test_without_cudnn_there_is_no_ratio():
    (result,) = measured([Fake("works", {"whole": lambda: None})])
    assert result.rows[0].ratio_to_cudnn is None


def test_time_that_is_over_begins_no_shape():
    two = measured([Fake("works", {"whole": lambda: None})], (TINY, TINY), max_seconds=0.0)
    assert [len(r.rows) for r in two] == [0, 0]
    assert two[0].notes[0].reason == "not begun: 0 seconds were over"


def test_inputs_that_do_not_fit_are_a_note(monkeypatch):
    def full(*arguments, **options):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(run.torch, "randn", full)
    (result,) = measured([Fake("works", {"whole": lambda: None})])
    assert result.rows == []
    assert [(n.provider, n.reason) for n in result.notes] == [("all", "out of memory")]


def test_each_row_has_its_own_clock_where_it_was_read(monkeypatch):
    class Steps(sensors.Sensors):
        value = 1000.0

        def read(self):
            self.value += 100
            return sensors.Reading(sm_mhz=self.value)

    monkeypatch.setattr(run, "open_sensors", lambda device: Steps())
    (result,) = measured([Fake("a", {"whole": lambda: None}), Fake("b", {"whole": lambda: None})])
    assert [r.sm_mhz for r in result.rows] == [1300, 1300]  # a in rounds 0, 2, 4: 1100, 1300, 1500; b in 1 and 3
    assert result.reading.sm_mhz == 1300


def test_inputs_are_the_same_every_time():
    shape = parse_shape("2x4/2x5,7x8")
    q, k, v = inputs(shape)
    assert (q.shape, k.shape, v.shape) == ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    assert torch.equal(q, inputs(shape)[0])
    assert not torch.equal(k, v)

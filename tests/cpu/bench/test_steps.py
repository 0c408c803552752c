"""Whole steps: the turns of the variants, what is written down, and what a model that fails does to the others."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from bench_cases import CPU
from step_cases import ROUNDS, Stub, Told, measured, raises, stub

from lowbit_attention.bench import results, steps
from lowbit_attention.bench.base import Unsupported
from lowbit_attention.bench.kernel_time import KernelTimes
from lowbit_attention.bench.sensors import Sensors
from lowbit_attention.bench.steps import StepRow, fitting
from lowbit_attention.bench.timing import MIB
from lowbit_attention.recipes.named import recipe


def test_the_variants_take_turns_beginning_with_another_each_round(monkeypatch):
    seen = []

    def look(x):
        seen.append((x.shape[2], torch.nn.functional.scaled_dot_product_attention is not plain))

    plain = torch.nn.functional.scaled_dot_product_attention
    timer = Told(*(float(n) for n in range(1000, 10_000, 1000)))
    (result,) = measured(monkeypatch, stub("turns", look, used=24), timer=timer)
    torch_, cut, ours = (32, False), (24, False), (32, True)
    assert seen == [torch_] * 2 + [cut] * 2 + [ours] * 2 + [torch_, cut, ours, cut, ours, torch_, ours, torch_, cut]
    assert [r.variant for r in result.rows] == ["torch", "torch_cut", "ours:auto"]
    assert [(r.min_ms, r.median_ms, r.max_ms, r.rounds) for r in result.rows] == [
        (1, 6, 8, 3),
        (2, 4, 9, 3),
        (3, 5, 7, 3),
    ]
    assert [r.speedup for r in result.rows] == [1.0, 1.5, 1.2]
    assert result.rows[0].spread == pytest.approx(7 / 6)
    assert result.rows[1].l1 == pytest.approx(0, abs=1e-6)


def test_who_ran_the_calls_and_how_far_the_outputs_are_apart(monkeypatch):
    recipes = ("auto", recipe("sage2_8b"), recipe("exact"))
    (result,) = measured(monkeypatch, stub(), recipes=recipes)
    rows = {r.variant: r for r in result.rows}
    assert list(rows) == ["torch", "ours:auto", "ours:sage2_8b", "ours:exact"]
    calls = {name: (r.calls_kernels, r.calls_emulated, r.calls_torch) for name, r in rows.items()}
    assert calls == {
        "torch": (None, None, None),
        "ours:auto": (0, 0, 1),
        "ours:sage2_8b": (0, 1, 0),
        "ours:exact": (0, 0, 1),
    }
    assert (rows["torch"].cos_sim, rows["torch"].l1) == (1, 0)
    assert 0.0001 < rows["ours:sage2_8b"].l1 < 0.1
    assert 0.99 < rows["ours:sage2_8b"].cos_sim < 1
    assert [rows["torch"].recipe, rows["ours:sage2_8b"].recipe] == ["", "sage2_8b"]
    assert rows["torch"].peak_mib is rows["torch"].attention_ms is None  # a CPU tells of neither
    ((kind, n),) = result.calls["ours:auto"].items()
    assert n == 1
    assert "Hopper" in kind.reason
    assert "torch" not in result.calls


def test_padding_does_not_count_in_the_comparison(monkeypatch):
    seen = []
    compare = steps.compare
    monkeypatch.setattr(steps, "compare", lambda a, b, rows: seen.append(rows) or compare(a, b, rows))
    measured(monkeypatch, stub(real=5))
    assert [int(rows.sum()) for rows in seen] == [5, 5]


def test_compiled_is_compared_with_compiled(monkeypatch):
    compiled, resets = [], []

    def compile_(module, dynamic):
        assert dynamic is False
        compiled.append(type(module))
        return module

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(True))
    (result,) = measured(monkeypatch, stub(), timer=Told(8000.0, 4000.0, 6000.0, 2000.0), compiled=True)
    assert [(r.variant, r.compiled) for r in result.rows] == [
        ("torch", False), ("ours:auto", False), ("torch", True), ("ours:auto", True),
    ]  # fmt: skip
    assert list(result.calls) == ["ours:auto", "ours:auto compiled"]
    for is_compiled in (False, True):
        base, ours = (r for r in result.rows if r.compiled is is_compiled)
        assert ours.speedup == round(base.median_ms / ours.median_ms, 4)
    assert len(compiled) == len(resets) == 1


def test_a_failure_is_a_note_and_the_run_goes_on(monkeypatch):
    full, broken = raises(torch.cuda.OutOfMemoryError), raises(ValueError, "no such head\nand more")
    monkeypatch.setattr(Stub, "not_available_reason", lambda self: self.sizes.get("why"))
    missing = stub("missing", why="not installed: pip install it")
    found = measured(monkeypatch, missing, stub("full", full), stub("broken", broken), stub("works"))
    told = {r.model.name: {(n.provider, n.reason) for n in r.notes} for r in found}
    assert told["missing"] == {("all", "not installed: pip install it")}
    assert told["full"] == {("torch", "out of memory"), ("ours:auto", "out of memory")}
    assert told["broken"] == {(who, "ValueError: no such head") for who in ("torch", "ours:auto")}
    assert told["works"] == set()
    assert [len(r.rows) for r in found] == [0, 0, 0, 2]
    assert not Stub.alive


def test_ours_is_timed_where_torch_alone_fails(monkeypatch):
    calls = []

    def first_fails(x):
        calls.append(1)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError

    (result,) = measured(monkeypatch, stub("m", first_fails))
    assert [(r.variant, r.speedup, r.l1) for r in result.rows] == [("ours:auto", None, None)]
    assert [(n.provider, n.reason) for n in result.notes] == [("torch", "out of memory")]


def test_an_output_that_is_not_finite_is_not_timed(monkeypatch):
    (result,) = measured(monkeypatch, stub("nan", lambda x: x.fill_(float("nan"))))
    assert result.rows == []
    assert {n.reason for n in result.notes} == {"ArithmeticError: its output is not finite"}


def test_no_model_is_begun_when_the_time_is_over(monkeypatch):
    now = iter([0.0, 5.0, 11.0])
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    first, second = measured(monkeypatch, stub("a"), stub("b"), max_seconds=10)
    assert len(first.rows) == 2
    assert [(n.shape, n.reason) for n in second.notes] == [("b", "not begun: 10 s were over")]


def test_what_fits_the_gpu(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(total_memory=24 * 2**30))
    small, large = stub("small", gib=20), stub("large", gib=46)
    fit, notes = fitting([large, small], gpu)
    assert fit == [small]
    assert [(n.shape, n.reason) for n in notes] == [
        ("large", "it needs about 46 GiB, and the GPU has 24; name it with --model to try")
    ]
    assert fitting([large], gpu, tiny=True) == fitting([large], CPU) == ([large], [])


def test_rows_survive_a_file(monkeypatch, tmp_path):
    (result,) = measured(monkeypatch, stub())
    path = tmp_path / "a.csv"
    results.append_csv(path, result.rows, StepRow)
    results.append_csv(path, result.rows, StepRow)
    assert results.read_rows(path, StepRow) == result.rows * 2
    assert path.read_text().splitlines()[0].split(",") == [
        "time", "gpu", "driver", "cuda", "torch", "lowbit", "commit", "package", "model", "variant", "recipe",
        "compiled", "median_ms", "min_ms", "max_ms", "rounds", "speedup", "attention_ms", "products_ms", "rest_ms",
        "calls_kernels", "calls_emulated", "calls_torch", "cos_sim", "l1", "peak_mib", "sm_mhz",
    ]  # fmt: skip
    assert result.rows[0].commit == "abc"


def test_memory_and_kernels_on_a_gpu_are_those_of_one_step(monkeypatch):
    """Followed with stand-ins: the inputs stay on the CPU."""
    gpu, now = torch.device("cuda", 0), {"allocated": 5 * MIB, "peak": 0}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: now["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: now.update(peak=now["allocated"]))
    monkeypatch.setattr(steps, "free_memory", lambda device: None)
    monkeypatch.setattr(steps, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(steps, "open_sensors", lambda device: Sensors())
    monkeypatch.setattr(steps, "make_timer", lambda device: Told(1000.0))
    monkeypatch.setattr(steps, "collect_facts", lambda *_: results.Facts("H200", "d", "13", "2.11", "0", "abc"))
    fails = [False, True]

    def profiled(call):
        if fails.pop(0):
            raise Unsupported("no kernel seen")
        call()
        return KernelTimes(3.0, 2.0, 1.0)

    monkeypatch.setattr(steps, "profiled", profiled)
    grows = stub("grows", lambda x: now.update(peak=12 * MIB))
    (result,) = steps.run_steps([grows], steps.StepSettings(gpu, (recipe("sage2_8b"),), limits=ROUNDS))
    torch_, ours = result.rows
    assert (torch_.attention_ms, torch_.products_ms, torch_.rest_ms, torch_.peak_mib) == (3, 2, 1, 7)
    assert (ours.attention_ms, ours.calls_emulated, ours.peak_mib) == (None, 1, 7)
    assert [(n.provider, n.reason) for n in result.notes] == [("the time of kernels", "no kernel seen")]

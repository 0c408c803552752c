"""Whole steps of real models: torch's attention, torch's without padding, and ours by each recipe, in turns.

A step is one forward of a model with random weights and its real sizes (`step_models`), without gradients. What is
faster here is faster in a pipeline; how large the errors become over many steps of trained weights it does not tell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.base import Emulation
from ..backends.registry import IMPLEMENTATIONS
from ..evaluation.metrics import Metrics, compare
from ..integrations.call_report import CallKind
from ..integrations.torch_sdpa import sdpa_enabled
from ..recipes.definition import Recipe
from .base import Call, Unsupported, first_line
from .kernel_time import KernelTimes, profiled
from .results import Facts, collect_facts
from .run import Note, free_memory, on_device
from .sensors import Reading, Sensors, median_reading, open_sensors
from .step_models import StepInputs, StepModel
from .timing import MIB, Limits, Timer, interleave, make_timer, percentile

TORCH, CUT = "torch", "torch_cut"
"""The model as it is called today, and called without its padded tokens."""
STEP_LIMITS = Limits(seconds=20.0, max_rounds=20)
_KERNELS = frozenset(one.name for one in IMPLEMENTATIONS if one.is_kernel)


@dataclass(frozen=True)
class StepSettings:
    """How a run is made.

    Attributes:
        recipes: what ours runs: ``"auto"`` or recipes.
        compiled: whether every variant is timed as `torch.compile` makes it, too.
        tiny: a few layers and tokens, only to see that it works.
        max_seconds: no model is begun after so long; commit: recorded instead of what git tells.
    """

    device: torch.device
    recipes: tuple[str | Recipe, ...] = ("auto",)
    compiled: bool = False
    tiny: bool = False
    limits: Limits = STEP_LIMITS
    max_seconds: float | None = None
    commit: str | None = None


@dataclass(frozen=True)
class StepRow:
    """One variant of one model's step.

    Attributes:
        speedup: over the row ``torch`` with the same ``compiled``.
        attention_ms, products_ms, rest_ms: the GPU's time by kernels, in one more step.
        calls_kernels, calls_emulated, calls_torch: attention calls of one step, by who ran them; ours only.
        cos_sim, l1: the output compared with that of torch, not compiled.
        peak_mib: the most memory that the model's tensors took during a step, weights included.
    """

    time: str
    gpu: str
    driver: str
    cuda: str
    torch: str
    lowbit: str
    commit: str
    package: str
    model: str
    variant: str
    recipe: str
    compiled: bool
    median_ms: float
    min_ms: float
    max_ms: float
    rounds: int
    speedup: float | None = None
    attention_ms: float | None = None
    products_ms: float | None = None
    rest_ms: float | None = None
    calls_kernels: int | None = None
    calls_emulated: int | None = None
    calls_torch: int | None = None
    cos_sim: float | None = None
    l1: float | None = None
    peak_mib: float | None = None
    sm_mhz: float | None = None

    @property
    def spread(self) -> float:
        """How far the slowest and the fastest round are apart, relative to the median."""
        return (self.max_ms - self.min_ms) / self.median_ms if self.median_ms else 0.0


@dataclass
class StepResult:
    """What came of one model; ``calls`` has each variant's attention calls of one step, by kind."""

    model: StepModel
    rows: list[StepRow] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    calls: dict[str, dict[CallKind, int]] = field(default_factory=dict)
    reading: Reading = Reading()


@dataclass
class _Variant:
    """One way to run a step, and what is known of it beside its times."""

    name: str
    compiled: bool
    call: Callable[[], Tensor]
    recipe: str = ""
    block: sdpa_enabled | None = None
    kernels: KernelTimes | None = None
    metrics: Metrics | None = None
    calls: dict[CallKind, int] = field(default_factory=dict)
    peak_mib: float | None = None
    readings: list[Reading] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.name} compiled" if self.compiled else self.name

    def begin(self, device: torch.device) -> None:
        """Count calls and memory from now."""
        if self.block is not None:
            self.block.report.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def inside(self) -> AbstractContextManager[object]:
        """Where it runs: entered before the clock starts, since that looks through every module of the process."""
        return nullcontext() if self.block is None else self.block


@dataclass(frozen=True)
class _StepBench:
    """What all models of a run share."""

    settings: StepSettings
    timer: Timer
    sensors: Sensors
    facts: Facts
    say: Callable[[StepModel, str], None]


def fitting(
    models: Sequence[StepModel], device: torch.device, tiny: bool = False
) -> tuple[list[StepModel], list[Note]]:
    """The models that fit a GPU's memory, and what the others need. Tiny ones always fit."""
    if tiny or device.type != "cuda":
        return list(models), []
    has = torch.cuda.get_device_properties(device).total_memory / 2**30
    fit = [model for model in models if model.gib <= has]
    reason = "it needs about {:.0f} GiB, and the GPU has {:.0f}; name it with --model to try"
    return fit, [Note("all", m.name, reason.format(m.gib, has)) for m in models if m not in fit]


def run_steps(
    models: Sequence[StepModel],
    settings: StepSettings,
    say: Callable[[StepModel, str], None] = lambda model, what: None,
) -> Iterator[StepResult]:
    """Measure model after model, each freed before the next is built; ``say`` hears what is being done.

    A model whose package is missing, that runs out of memory or raises is a note, and so is such a variant of one.
    """
    device, begun = settings.device, time.perf_counter()
    with on_device(device):
        sensors = open_sensors(device)
        facts = collect_facts(device, sensors.driver, settings.commit)
        bench = _StepBench(settings, make_timer(device), sensors, facts, say)
    for model in models:
        if settings.max_seconds is not None and time.perf_counter() - begun > settings.max_seconds:
            yield StepResult(model, notes=[Note("all", model.name, f"not begun: {settings.max_seconds:g} s were over")])
            continue
        say(model, "importing")
        if reason := model.not_available_reason():
            yield StepResult(model, notes=[Note("all", model.name, reason)])
            continue
        with on_device(device), torch.no_grad():
            session = _Session(model, bench, result := StepResult(model))
            try:
                session.attempt("all", session.measure)
            finally:
                del session  # with the model
                if settings.compiled:
                    torch._dynamo.reset()
                free_memory(device)
        yield result


@dataclass
class _Session:
    """One model's measurement: what its variants share, and where everything goes."""

    model: StepModel
    bench: _StepBench
    result: StepResult
    inputs: StepInputs | None = None
    reference: Tensor | None = None
    """The output of torch, not compiled."""
    before: int = 0
    """Bytes on the GPU that are not the model's."""

    def attempt(self, who: str, work: Callable[[], None]) -> bool:
        """Whether ``work`` could be done; if not, a note says why."""
        try:
            work()
        except torch.cuda.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:  # models and compilers raise what they like; the others are measured all the same
            reason = first_line(error)
        else:
            return True
        self.note(who, reason)
        free_memory(self.bench.settings.device)
        self.bench.timer.settle()  # an error that broke the CUDA context breaks everything after it: here the run ends
        return False

    def note(self, who: str, reason: str) -> None:
        self.result.notes.append(Note(who, self.model.name, reason))

    def measure(self) -> None:
        """Build, prepare every variant, let them take turns, and write the rows down."""
        model, bench, settings = self.model, self.bench, self.bench.settings
        bench.say(model, "building")
        if settings.device.type == "cuda":
            self.before = torch.cuda.memory_allocated(settings.device)
        module, self.inputs = model.build(settings.device, settings.tiny)
        variants: dict[str, _Variant] = {}
        for one in _variants(module, self.inputs, settings):
            bench.say(model, f"warming up {one.title}")
            if self.attempt(one.title, partial(self.warm_up, one)):
                variants[one.title] = one

        bench.say(model, "measuring")

        def measure(title: str, is_first: bool) -> float:
            del is_first
            one = variants[title]

            def look() -> None:
                if (reading := bench.sensors.read()) is not None:
                    one.readings.append(reading)

            with one.inside():
                return bench.timer.run(one.call, meanwhile=look)

        bench.sensors.start()
        times, failed = interleave(list(variants), measure, settings.limits)
        last = bench.sensors.finish()
        for title, why in failed.items():
            self.note(title, why)
        readings = [reading for one in variants.values() for reading in one.readings]
        reading = median_reading(readings + ([last] if last else []))
        rows = [_row(model, bench, variants[title], some, reading) for title, some in times.items() if some]
        self.result.rows.extend(_with_speedups(rows))
        self.result.calls.update({title: variants[title].calls for title in times if variants[title].block})
        self.result.reading = reading

    def warm_up(self, one: _Variant) -> None:
        """The first step, which may compile and whose output is looked at, and another for what is measured once."""
        device = self.bench.settings.device
        with one.inside():
            out = one.call().cpu()
            if not bool(out.isfinite().all()):
                raise ArithmeticError("its output is not finite")
            one.begin(device)
            try:
                one.kernels = _kernels_of(one.call, device)
            except Unsupported as error:
                self.note("the time of kernels", str(error))
                one.begin(device)
                one.call()
        if device.type == "cuda":
            one.peak_mib = (torch.cuda.max_memory_allocated(device) - self.before) / MIB
        if one.block is not None:
            one.calls = dict(one.block.report.counts)
        if one.name == TORCH and not one.compiled:
            self.reference = out
        if self.reference is not None:
            rows = None if self.inputs is None or self.inputs.rows is None else self.inputs.rows.cpu()
            one.metrics = compare(self.reference, out, rows)


def _variants(module: nn.Module, inputs: StepInputs, settings: StepSettings) -> Iterator[_Variant]:
    """In the order that they are prepared: torch first, whose output the others' are compared with."""
    for compiled in (False, True) if settings.compiled else (False,):
        # (of fixed sizes: code for any size, which torch.compile makes for the second size it sees, is slower)
        run: Any = torch.compile(module, dynamic=False) if compiled else module
        yield _Variant(TORCH, compiled, _step(run, inputs.given))
        if inputs.cut is not None:
            yield _Variant(CUT, compiled, _step(run, inputs.cut))
        for recipe in settings.recipes:
            name = recipe if isinstance(recipe, str) else recipe.name
            block = sdpa_enabled(module, recipe)
            yield _Variant(f"ours:{name}", compiled, _step(run, inputs.given), name, block)


def _step(run: Callable[..., Any], given: dict[str, Any]) -> Callable[[], Tensor]:
    """One forward: its first output."""

    def step() -> Tensor:
        out: Tensor = run(**given, return_dict=False)[0]
        return out

    return step


def _kernels_of(call: Call, device: torch.device) -> KernelTimes | None:
    if device.type == "cuda":
        return profiled(call)
    call()
    return None


def _row(model: StepModel, bench: _StepBench, one: _Variant, microseconds: list[float], reading: Reading) -> StepRow:
    kinds: dict[str, Any] = {}
    if one.block is not None:
        by = {"calls_kernels": 0, "calls_emulated": 0, "calls_torch": 0}
        for kind, n in one.calls.items():
            is_emulated = kind.implementation == Emulation.name
            who = "kernels" if kind.implementation in _KERNELS else "emulated" if is_emulated else "torch"
            by[f"calls_{who}"] += n
        kinds.update(by)
    own = median_reading(one.readings).sm_mhz
    return StepRow(
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **asdict(bench.facts),
        package=model.version(),
        model=f"{model.name} (tiny)" if bench.settings.tiny else model.name,
        variant=one.name,
        recipe=one.recipe,
        compiled=one.compiled,
        median_ms=round(percentile(microseconds, 50) / 1000, 4),
        min_ms=round(min(microseconds) / 1000, 4),
        max_ms=round(max(microseconds) / 1000, 4),
        rounds=len(microseconds),
        **(asdict(one.kernels) if one.kernels else {}),
        **kinds,
        cos_sim=None if one.metrics is None else round(one.metrics.cos_sim, 8),
        l1=None if one.metrics is None else round(one.metrics.l1, 7),
        peak_mib=None if one.peak_mib is None else round(one.peak_mib, 1),
        sm_mhz=reading.sm_mhz if own is None else own,
    )


def _with_speedups(rows: Sequence[StepRow]) -> list[StepRow]:
    """The rows of one model, each compared with torch's, compiled with compiled."""
    base = {row.compiled: row.median_ms for row in rows if row.variant == TORCH}
    return [
        replace(row, speedup=round(base[row.compiled] / row.median_ms, 4))
        if row.compiled in base and row.median_ms
        else row
        for row in rows
    ]

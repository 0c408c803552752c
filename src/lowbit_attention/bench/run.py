"""A run: for each shape, prepare every provider, warm up, measure in turns, and tell what could not be measured."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone

import torch
from torch import Tensor

from .base import Call, Part, Provider, Unsupported, first_line
from .masks import make_mask
from .results import Facts, Measurement, collect_facts, tops, with_ratios
from .sensors import Reading, Sensors, median_reading, open_sensors
from .shapes import Shape
from .timing import Limits, Timer, interleave, make_timer, percentile, tensors

Key = tuple[str, Part]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_HOST_SECONDS, _HOST_CALLS = 0.25, 50


@dataclass(frozen=True)
class Settings:
    """How a run is made. No shape is begun after ``max_seconds``; ``commit`` is recorded instead of what git tells."""

    device: torch.device
    dtype: str = "bf16"
    limits: Limits = Limits()
    max_seconds: float | None = None
    seed: int = 0
    commit: str | None = None


@dataclass(frozen=True)
class Note:
    """Something that was not measured, and why; ``shape`` is empty if that holds for all of them."""

    provider: str
    shape: str
    reason: str


@dataclass(frozen=True)
class ShapeResult:
    """What came of one shape."""

    shape: Shape
    rows: list[Measurement] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    reading: Reading = Reading()


@dataclass(frozen=True)
class _Bench:
    """What all shapes of a run share."""

    settings: Settings
    timer: Timer
    sensors: Sensors
    facts: Facts
    versions: dict[str, str]
    say: Callable[[Shape, str], None]


@dataclass
class _Candidate:
    """One call that is measured, and what is known of it beside its times."""

    call: Call
    host_us: float | None = None
    extra_mib: float | None = None
    readings: list[Reading] = field(default_factory=list)


def split_available(providers: Sequence[Provider]) -> tuple[list[Provider], list[Note]]:
    """Those that can run here, and why the others cannot."""
    reasons = [(p, p.not_available_reason()) for p in providers]
    return [p for p, why in reasons if why is None], [Note(p.name, "", why) for p, why in reasons if why is not None]


def run(
    shapes: Sequence[Shape],
    providers: Sequence[Provider],
    settings: Settings,
    say: Callable[[Shape, str], None] = lambda shape, what: None,
) -> Iterator[ShapeResult]:
    """Measure shape after shape; ``say`` hears what is being done.

    A provider that cannot do a shape, runs out of memory or raises is left out of that shape, with a note.
    """
    device, begun = settings.device, time.perf_counter()
    with on_device(device):
        sensors = open_sensors(device)
        bench = _Bench(
            settings=settings,
            timer=make_timer(device),
            sensors=sensors,
            facts=collect_facts(device, sensors.driver, settings.commit),
            versions={p.name: _version(p) for p in providers},
            say=say,
        )
    for shape in shapes:
        if settings.max_seconds is not None and time.perf_counter() - begun > settings.max_seconds:
            reason = f"not begun: {settings.max_seconds:g} seconds were over"
            yield ShapeResult(shape, notes=[Note("all", shape.name, reason)])
            continue
        with on_device(device), torch.no_grad():
            result = _measure_shape(shape, providers, bench)
        free_memory(device)
        yield result


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Within the block it is the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _version(provider: Provider) -> str:
    try:
        return provider.version()
    except Exception:  # a package that cannot say its version may still run
        return "unknown"


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normal Q, K and V, the same for every run on a kind of device."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, tokens: int, channels: int) -> Tensor:
        size = (shape.batch, heads, tokens, channels)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    q = normal(shape.q_heads, shape.q_len, shape.head_dim)
    k = normal(shape.kv_heads, shape.kv_len, shape.head_dim)
    return q, k, normal(shape.kv_heads, shape.kv_len, shape.v_head_dim)


def _measure_shape(shape: Shape, providers: Sequence[Provider], bench: _Bench) -> ShapeResult:
    settings, timer = bench.settings, bench.timer
    notes: list[Note] = []
    found: dict[Key, _Candidate] = {}

    def attempt(name: str, what: str, work: Callable[[], None]) -> bool:
        bench.say(shape, what)
        try:
            work()
        except torch.cuda.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:  # peers raise what they like; the others are measured all the same
            reason = first_line(error)
        else:
            return True
        notes.append(Note(name, shape.name, reason))
        free_memory(settings.device)
        timer.settle()  # an error that broke the CUDA context breaks everything after it: here the run ends
        return False

    inputs: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def make() -> None:
        options = (settings.device, DTYPES[settings.dtype], settings.seed)
        inputs.append((*make_inputs(shape, *options), make_mask(shape, *options)))

    if not attempt("all", "inputs", make):
        return ShapeResult(shape, notes=notes)
    ((q, k, v, mask),) = inputs
    for provider in providers:

        def prepare(provider: Provider = provider) -> None:
            if shape.is_varlen and not provider.takes_sequences:
                raise Unsupported("it takes no sequences of different lengths here")
            for part, call in provider.prepare(shape, q, k, v, mask).items():
                found[provider.name, part] = _Candidate(call)

        attempt(provider.name, f"preparing {provider.name}", prepare)
    for name, part in list(found):

        def warm(key: Key = (name, part)) -> None:
            _warm_up(found[key], key[1], timer)

        if not attempt(f"{name} {part}", f"warming up {name} {part}", warm):
            del found[name, part]

    bench.say(shape, "measuring")

    def measure(key: Key, is_first: bool) -> float:
        one = found[key]

        def look() -> None:
            if (reading := bench.sensors.read()) is not None:
                one.readings.append(reading)

        return timer.run(one.call, lead_us=2 * (one.host_us or 0.0), meanwhile=look if is_first else None)

    bench.sensors.start()
    times, failed = interleave(list(found), measure, settings.limits)
    last = bench.sensors.finish()
    notes += [Note(f"{name} {part}", shape.name, why) for (name, part), why in failed.items()]
    everything = [r for one in found.values() for r in one.readings] + ([last] if last else [])
    overall = median_reading(everything)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows = [_row(shape, bench, key, found[key], some, overall.sm_mhz, now) for key, some in times.items() if some]
    return ShapeResult(shape, with_ratios(rows), notes, overall)


def _warm_up(one: _Candidate, part: Part, timer: Timer) -> None:
    """The first calls, which may compile and tune, a look at the output, and what is measured only once."""
    for out in tensors(one.call())[:1]:
        if not _is_finite(out):
            raise ArithmeticError("its output is not finite")
    timer.settle()
    if part == "whole":
        one.extra_mib = timer.extra_mib(one.call)
    roughly = timer.run(one.call)
    calls = int(min(_HOST_CALLS, max(3, _HOST_SECONDS * 1e6 / max(roughly, 1.0))))
    one.host_us = timer.host_us(one.call, calls)


def _is_finite(out: Tensor) -> bool:
    if out.dtype.itemsize == 1:  # torch cannot ask an FP8 tensor
        out = out.to(torch.float16)
    return bool(out.isfinite().all())


def _row(
    shape: Shape, bench: _Bench, key: Key, one: _Candidate, times: list[float], sm_mhz: float | None, now: str
) -> Measurement:
    middle = percentile(times, 50)
    own = median_reading(one.readings).sm_mhz
    return Measurement(
        time=now,
        **asdict(bench.facts),
        provider=key[0],
        provider_version=bench.versions[key[0]],
        part=key[1],
        shape=shape.name,
        batch=shape.batch,
        q_heads=shape.q_heads,
        kv_heads=shape.kv_heads,
        q_len=shape.q_len,
        kv_len=shape.kv_len,
        head_dim=shape.head_dim,
        is_causal=shape.is_causal,
        dtype=bench.settings.dtype,
        median_us=round(middle, 3),
        p20_us=round(percentile(times, 20), 3),
        p80_us=round(percentile(times, 80), 3),
        rounds=len(times),
        tops=round(tops(shape, middle), 4),
        host_us=None if key[1] != "whole" or one.host_us is None else round(one.host_us, 2),
        extra_mib=None if one.extra_mib is None else round(one.extra_mib, 3),
        sm_mhz=sm_mhz if own is None else own,
    )


def free_memory(device: torch.device) -> None:
    """Give the memory of dropped tensors back, so that the next one has all of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""How long calls take: on the device with a cold L2, interleaved, and on the host.

Cards differ, and one card differs with its temperature, by more than the differences that matter. So the calls of all
providers take turns, round by round, and only times of one run are compared.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from .base import Call

Key = TypeVar("Key", bound=Hashable)
MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """When the rounds of a shape end.

    After ``seconds`` if there were ``min_rounds`` by then; a shape so long that these would take twice the time ends
    after ``fewest_rounds``. Never more than ``max_rounds``.
    """

    seconds: float = 4.0
    max_rounds: int = 50
    min_rounds: int = 5
    fewest_rounds: int = 3

    def over(self, rounds: int, elapsed: float) -> bool:
        if rounds >= self.max_rounds:
            return True
        if elapsed < self.seconds:
            return False
        too_long = elapsed / max(1, rounds) * self.min_rounds > 2 * self.seconds
        return rounds >= (self.fewest_rounds if too_long else self.min_rounds)


def rotated(keys: Sequence[Key], turn: int) -> list[Key]:
    """The keys, beginning with another one each turn."""
    first = turn % len(keys) if keys else 0
    return [*keys[first:], *keys[:first]]


def interleave(
    keys: Sequence[Key],
    measure: Callable[[Key, bool], float],
    limits: Limits,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Measure every key once a round, in an order that rotates from round to round.

    Args:
        measure: gives microseconds for a key; its flag tells whether that is the round's first.
        clock: seconds, for ``limits``.
    Returns:
        The microseconds of each key, and those keys that ran out of memory on the way (which have none).
    """
    times: dict[Key, list[float]] = {key: [] for key in keys}
    failed: dict[Key, str] = {}
    start, rounds = clock(), 0
    while times and not limits.over(rounds, clock() - start):
        for number, key in enumerate(rotated(list(times), rounds)):
            try:
                times[key].append(measure(key, number == 0))
            except torch.cuda.OutOfMemoryError:
                failed[key] = "out of memory"
                del times[key]
        rounds += 1
    return times, failed


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile, linear between neighbours.

    >>> percentile([4.0, 1.0, 2.0, 3.0], 50)
    2.5
    """
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


class Timer(ABC):
    """Times calls on one kind of device."""

    @abstractmethod
    def run(self, call: Call, lead_us: float = 0.0, meanwhile: Callable[[], None] | None = None) -> float:
        """Microseconds of one call on the device; ``meanwhile`` runs on the host while the device is busy."""

    @abstractmethod
    def settle(self) -> None:
        """Wait for the device; an error of an earlier call appears here at the latest."""

    def host_us(self, call: Call, times: int) -> float | None:
        """Microseconds until the host has queued a call (median), where that is another thing than running it."""
        del call, times
        return None

    def extra_mib(self, call: Call) -> float | None:
        """What a call allocates at its peak beyond its output, where the allocator tells."""
        del call
        return None


class CpuTimer(Timer):
    """Wall time: for a look whether the benchmark itself works."""

    def run(self, call: Call, lead_us: float = 0.0, meanwhile: Callable[[], None] | None = None) -> float:
        start = time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
        if meanwhile:
            meanwhile()
        return elapsed * 1e6

    def settle(self) -> None:
        """A call on the CPU has ended when it returns."""


class CudaTimer(Timer):
    """Device time between two events, the L2 cache flushed before, the host far enough ahead not to count.

    Use it with its device as the current one.
    """

    LEAD_US = 150.0
    """How long the device sleeps before every call, so that the whole call is queued when it begins."""
    MAX_LEAD_US = 3000.0
    CYCLES_PER_US = 2000
    """Above any SM clock, so that a sleep is never too short."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2 = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
        self._flush = torch.empty(max(2 * l2, 128 * MIB), dtype=torch.uint8, device=device)
        self._sleep: Callable[[int], None] = torch.cuda._sleep
        event: Any = torch.cuda.Event
        self._start, self._end = event(enable_timing=True), event(enable_timing=True)

    def run(self, call: Call, lead_us: float = 0.0, meanwhile: Callable[[], None] | None = None) -> float:
        self._flush.zero_()
        self._sleep(int(min(self.MAX_LEAD_US, self.LEAD_US + lead_us) * self.CYCLES_PER_US))
        self._start.record()
        out = call()  # kept until it is measured: nothing is freed or collected in between
        self._end.record()
        if meanwhile:
            meanwhile()
        self._end.synchronize()
        del out
        return float(self._start.elapsed_time(self._end)) * 1e3

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def host_us(self, call: Call, times: int) -> float:
        found = []
        for _ in range(times):
            self.settle()  # an empty queue: a full one would make the host wait for the device
            start = time.perf_counter()
            out = call()
            found.append(time.perf_counter() - start)
            del out
        self.settle()
        return median(found) * 1e6

    def extra_mib(self, call: Call) -> float:
        self.settle()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        out = call()
        self.settle()
        extra = torch.cuda.max_memory_allocated(self.device) - before - sum(_bytes(t) for t in tensors(out))
        return max(0, extra) / MIB


def tensors(out: object) -> list[Tensor]:
    """The tensors that a call returned."""
    if isinstance(out, Tensor):
        return [out]
    return [t for t in out if isinstance(t, Tensor)] if isinstance(out, tuple | list) else []


def _bytes(t: Tensor) -> int:
    return t.untyped_storage().nbytes()


def make_timer(device: torch.device) -> Timer:
    """The timer of a device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()

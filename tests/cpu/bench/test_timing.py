"""Turns, percentiles, and the clock on a GPU, followed with stand-ins."""

import sys
from types import SimpleNamespace

import pytest
import torch
from bench_cases import CPU

from lowbit_attention.bench import sensors, timing
from lowbit_attention.bench.timing import CudaTimer, Limits, interleave, percentile, rotated


def test_percentiles():
    values = [50.0, 10.0, 40.0, 20.0, 30.0]
    assert [percentile(values, p) for p in (0, 20, 50, 80, 100)] == [10, 18, 30, 42, 50]
    assert percentile([7.0], 20) == 7
    assert percentile([1.0, 2.0], 50) == 1.5


def test_the_order_rotates_and_the_first_of_a_round_is_told():
    seen = []

    def measure(key, is_first):
        seen.append((key, is_first))
        return float(len(seen))

    times, failed = interleave("abc", measure, Limits(seconds=100, max_rounds=4), clock=lambda: 0.0)
    assert "".join(key for key, _ in seen) == "abc" + "bca" + "cab" + "abc"
    assert [is_first for _, is_first in seen] == [True, False, False] * 4
    assert times == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}
    assert failed == {}
    assert rotated([], 3) == []


@pytest.mark.parametrize(
    ("seconds_a_round", "budget", "rounds"),
    [
        (0.001, 4.0, 50),  # the most rounds
        (0.5, 4.0, 8),  # the budget
        (1.5, 4.0, 5),  # the fewest, where they cost no more than twice the budget
        (2.0, 4.0, 3),  # fewer still
        (60.0, 4.0, 3),
        (1.0, 0.0, 3),
    ],
)
def test_the_budget_ends_the_rounds(seconds_a_round, budget, rounds):
    now = [0.0]

    def measure(key, is_first):
        now[0] += seconds_a_round / 2
        return 1.0

    times, _ = interleave("ab", measure, Limits(seconds=budget), clock=lambda: now[0])
    assert {key: len(some) for key, some in times.items()} == {"a": rounds, "b": rounds}


def test_one_that_runs_out_of_memory_leaves_the_turns():
    def measure(key, is_first):
        if key == "b":
            raise torch.cuda.OutOfMemoryError
        return 1.0

    times, failed = interleave("abc", measure, Limits(seconds=9, max_rounds=2), clock=lambda: 0.0)
    assert times == {"a": [1, 1], "c": [1, 1]}
    assert failed == {"b": "out of memory"}
    assert interleave("b", measure, Limits())[0] == {}


class FakeCuda:
    """What `CudaTimer` asks of torch.cuda, written down in order."""

    def __init__(self, monkeypatch):
        self.log, self.allocated, self.peak = [], 1000, 0
        log = self.log

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("record")

            def synchronize(self):
                log.append("wait")

            def elapsed_time(self, end):
                return 0.25

        def allocate(size, dtype, device):
            assert size >= 2 * 96 * 2**20
            return SimpleNamespace(zero_=lambda: log.append("flush"))

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(cycles))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(L2_cache_size=96 * 2**20))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("settle"))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(timing.torch, "empty", allocate)


def test_device_time_is_between_two_events_behind_a_flush_and_a_sleep(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    timer = CudaTimer(torch.device("cuda", 0))
    assert timer.run(lambda: cuda.log.append("call"), 50.0, lambda: cuda.log.append("look")) == 250.0
    assert cuda.log == ["flush", 200 * 2000, "record", "call", "record", "look", "wait"]
    cuda.log.clear()
    timer.run(lambda: None, lead_us=1e9)  # a call that waits for the device itself must not make it sleep for long
    assert cuda.log[1] == 3000 * 2000


def test_host_time_begins_with_an_empty_queue(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    timer = CudaTimer(torch.device("cuda", 0))
    assert timer.host_us(lambda: cuda.log.append("call"), 2) >= 0
    assert cuda.log == ["settle", "call", "settle", "call", "settle"]


def test_extra_memory_does_not_count_the_output(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    timer = CudaTimer(torch.device("cuda", 0))
    out = torch.zeros(2**18)  # 1 MiB
    cuda.peak = 1000 + 3 * 2**20
    assert timer.extra_mib(lambda: (out, None)) == 2.0
    cuda.peak = 1000
    assert timer.extra_mib(lambda: out) == 0.0


def test_sensors():
    read = sensors.parse_smi("1755, 3201, 61, 688.41\n")
    assert read == sensors.Reading(1755, 3201, 61, 688.41)
    assert str(read) == "1755 MHz, 3201 MHz memory, 61 °C, 688 W"
    assert sensors.parse_smi("1755, [N/A], 61, [Not Supported]") == sensors.Reading(1755, None, 61, None)
    assert sensors.parse_smi("No devices were found") is None
    some = [sensors.Reading(sm_mhz=mhz) for mhz in (1000, 1700, 1800)] + [sensors.Reading(watts=5)]
    assert sensors.median_reading(some) == sensors.Reading(sm_mhz=1700, watts=5)
    assert sensors.open_sensors(CPU).read() is None


def test_nvml_is_asked_for_the_gpu_by_uuid(monkeypatch):
    class NVMLError(Exception):
        pass

    def refuse(gpu):
        raise NVMLError

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"580.1",
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda gpu, which: which * 1000,
        nvmlDeviceGetTemperature=lambda gpu, which: 60,
        nvmlDeviceGetPowerUsage=refuse,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"abc-{index}"))
    found = sensors.open_sensors(torch.device("cuda", 3))
    assert found._gpu == "GPU-abc-3"
    assert found.driver == "580.1"
    assert found.read() == sensors.Reading(1000, 2000, 60, None)

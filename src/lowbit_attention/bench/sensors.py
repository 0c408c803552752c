"""What the GPU says of itself while it is timed: clocks, temperature, power. A hot card at its power cap is slower."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import torch

from .base import load

_VERSION = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6}){1,3}")
_QUERY = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


@dataclass(frozen=True)
class Reading:
    """MHz, °C and W; ``None`` for what the card does not tell."""

    sm_mhz: float | None = None
    mem_mhz: float | None = None
    celsius: float | None = None
    watts: float | None = None

    def __str__(self) -> str:
        units = ((self.sm_mhz, "MHz"), (self.mem_mhz, "MHz memory"), (self.celsius, "°C"), (self.watts, "W"))
        return ", ".join(f"{value:.0f} {unit}" for value, unit in units if value is not None)


def median_reading(readings: Sequence[Reading]) -> Reading:
    """Each quantity's median over the readings that have it."""
    values = {f.name: [v for r in readings if (v := getattr(r, f.name)) is not None] for f in fields(Reading)}
    return Reading(**{name: median(some) if some else None for name, some in values.items()})


class Sensors:
    """No sensors: what a machine without a GPU has, or one that hides them."""

    driver = ""

    def start(self) -> None:
        """Called before the rounds of a shape."""

    def read(self) -> Reading | None:
        """Called once a round while the GPU is busy, so it must be quick."""
        return None

    def finish(self) -> Reading | None:
        """Called after the rounds of a shape."""
        return None


class Nvml(Sensors):
    """By the package ``nvidia-ml-py``: a fraction of a millisecond a reading."""

    def __init__(self, index: int) -> None:
        self._nvml: Any = load("pynvml")
        self._nvml.nvmlInit()
        version = self._nvml.nvmlSystemGetDriverVersion()
        self.driver = version.decode() if isinstance(version, bytes) else str(version)
        try:  # CUDA_VISIBLE_DEVICES renumbers the devices, and NVML does not know
            self._gpu = self._nvml.nvmlDeviceGetHandleByUUID(_uuid(index))
        except Exception:  # older torch has no uuid, older NVML wants bytes
            self._gpu = self._nvml.nvmlDeviceGetHandleByIndex(index)
        self.read()

    def read(self) -> Reading | None:
        n = self._nvml
        return Reading(
            self._ask(lambda: n.nvmlDeviceGetClockInfo(self._gpu, n.NVML_CLOCK_SM)),
            self._ask(lambda: n.nvmlDeviceGetClockInfo(self._gpu, n.NVML_CLOCK_MEM)),
            self._ask(lambda: n.nvmlDeviceGetTemperature(self._gpu, n.NVML_TEMPERATURE_GPU)),
            self._ask(lambda: n.nvmlDeviceGetPowerUsage(self._gpu) / 1000),
        )

    def _ask(self, question: Any) -> float | None:
        try:
            return float(question())
        except self._nvml.NVMLError:
            return None


class NvidiaSmi(Sensors):
    """By the program, which takes long: one reading a shape, taken while the rounds run."""

    def __init__(self, program: str, index: int) -> None:
        try:
            which = _uuid(index)
        except AttributeError:
            which = str(index)
        self._command = [program, f"--id={which}", "--format=csv,noheader,nounits"]
        version = self._run("driver_version")
        first = version.stdout.strip().partition("\n")[0]
        self.driver = first if version.returncode == 0 and _VERSION.fullmatch(first) else ""
        self._running: subprocess.Popen[str] | None = None

    def _run(self, what: str) -> subprocess.CompletedProcess[str]:
        command = [*self._command, f"--query-gpu={what}"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=False)

    def start(self) -> None:
        command = [*self._command, f"--query-gpu={','.join(_QUERY)}"]
        with contextlib.suppress(OSError):
            self._running = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace"
            )

    def finish(self) -> Reading | None:
        running, self._running = self._running, None
        if running is None:
            return None
        try:
            text, _ = running.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            running.kill()
            running.communicate()
            return None
        return parse_smi(text)


def parse_smi(text: str) -> Reading | None:
    """A line of nvidia-smi's CSV; what it cannot tell it writes as ``[N/A]``, and what is no number is left out."""
    words = [word.strip() for word in text.strip().partition("\n")[0].split(",")]
    if len(words) != len(_QUERY):
        return None
    values: list[float | None] = []
    for word in words:
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        values.append(value if math.isfinite(value) else None)
    return Reading(*values)


def _uuid(index: int) -> str:
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def open_sensors(device: torch.device) -> Sensors:
    """The best sensors there are for this device; none is no error."""
    if device.type != "cuda":
        return Sensors()
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        return Nvml(index)
    except Exception:  # not installed, or no NVML in this container: both have errors of their own
        program = shutil.which("nvidia-smi")
    try:
        return NvidiaSmi(program, index) if program else Sensors()
    except (OSError, subprocess.SubprocessError):
        return Sensors()

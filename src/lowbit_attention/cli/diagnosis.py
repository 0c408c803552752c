"""What is installed here, what can run, and every reason why the rest cannot."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from .._version import __version__
from ..backends.cuda.jit.bindings import installed_nvrtc, one_line
from ..backends.cuda.jit.compiler import MIN_NVRTC
from ..backends.cuda.jit.probe import Trial, try_compiler
from ..backends.cuda.jit.store import GENERATION, OwnStore
from ..backends.registry import IMPLEMENTATIONS
from ..call.request import Request, device_name
from ..env import readonly_cache_dirs
from ..errors import InvalidArgumentError
from ..recipes.named import RECIPES


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    index: int
    name: str
    capability: str
    memory_gib: float


@dataclass(frozen=True)
class Ability:
    """Whether an implementation can run a recipe on a device (1 × 8 heads × 1024 × 64, bfloat16), and why not."""

    device: str
    implementation: str
    recipe: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The findings; ``problems`` are sentences that say what to do.

    ``compiles``: whether four lines were compiled, and ``compiler`` what came of that; ``shared`` says of each folder
    of ``LOWBIT_CACHE_READONLY`` what it holds.
    """

    versions: dict[str, str]
    gpus: tuple[Gpu, ...]
    driver: str | None
    driver_cuda: str | None
    nvrtc: dict[str, str]
    compiles: bool
    compiler: str
    cache: str
    cache_writable: bool
    shared: dict[str, str]
    problems: tuple[str, ...]
    abilities: tuple[Ability, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def examine() -> Report:
    """Look at this machine; four lines are compiled, and the cache folder is made and written to. No GPU is used."""
    gpus, gpu_problems = _gpus()
    driver, driver_cuda = _driver()
    nvrtc = installed_nvrtc()
    trial = try_compiler()
    store = OwnStore()
    unwritable = store.try_to_write()
    shared, shared_problems = _shared()
    problems = gpu_problems + nvrtc_problems(nvrtc, driver_cuda)
    if is_problem(trial, nvrtc):
        problems.append(trial.text)
    if unwritable is not None:
        problems.append(f"compiled kernels cannot be kept: {unwritable}")
    problems += shared_problems
    if driver is not None and torch.version.cuda is None:
        problems.append("there is an NVIDIA driver, but this PyTorch is built without CUDA: install one with it")
    return Report(
        versions=_versions(),
        gpus=gpus,
        driver=driver,
        driver_cuda=driver_cuda,
        nvrtc=nvrtc,
        compiles=trial.works,
        compiler=trial.text,
        cache=str(store.folder or "none"),
        cache_writable=unwritable is None,
        shared=shared,
        problems=tuple(problems),
        abilities=tuple(_abilities(gpus)),
    )


def is_problem(trial: Trial, nvrtc: dict[str, str]) -> bool:
    """Whether a compiler that does not work is one: not where nobody has installed any of it."""
    return not trial.works and not (trial.missing and not nvrtc)


def _shared() -> tuple[dict[str, str], list[str]]:
    """What the read-only folders hold, and what is wrong with them."""
    found, problems = {}, []
    try:
        folders = readonly_cache_dirs()
    except InvalidArgumentError as error:
        return {}, [str(error)]
    for folder in folders:
        try:
            names = os.listdir(folder / GENERATION)
        except OSError as error:
            found[str(folder)] = "nothing that can be read"
            problems.append(
                f"LOWBIT_CACHE_READONLY names {folder}, which holds no kernels for this version "
                f"({folder / GENERATION}: {error.strerror}): lowbit warmup --to {shlex.quote(str(folder))}"
            )
        else:
            found[str(folder)] = f"{sum(name.endswith('.bin') for name in names)} kernels"
    return found, problems


def nvrtc_problems(nvrtc: dict[str, str], driver_cuda: str | None) -> list[str]:
    """What is wrong with the installed NVRTC wheels (name → version) for a driver of that CUDA version."""
    if driver_cuda is None:
        return []
    major = int(driver_cuda.split(".")[0])
    extra = "cuda13" if major >= 13 else "cuda12"
    if major < 12:
        return [f"the driver supports CUDA {driver_cuda}; the kernels need CUDA 12 or newer: update the driver"]
    if not nvrtc:
        return [
            f'no NVRTC is installed: pip install "lowbit-attention[{extra}]" (the driver supports CUDA {driver_cuda})'
        ]
    problems = []
    for name, version in nvrtc.items():
        numbers = tuple(int(n) for n in re.findall(r"\d{1,6}", version)[:2]) or (0,)
        if numbers >= MIN_NVRTC and numbers[0] <= major:
            return []  # one that fits is enough
        if numbers[0] > major:
            problems.append(
                f"{name} {version} is newer than the driver's CUDA {driver_cuda}: its code may not load; "
                f'update the driver or pip install "lowbit-attention[cuda12]"'
            )
        elif numbers < MIN_NVRTC:
            needed = ".".join(map(str, MIN_NVRTC))
            problems.append(
                f"{name} {version} is older than {needed}, which the FP8 kernels need: pip install -U {name}"
            )
    return problems


def _versions() -> dict[str, str]:
    packages = ("numpy", "triton", "cuda-core", "cuda-bindings", "transformers", "diffusers", "matplotlib")
    return {
        "lowbit-attention": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "torch's CUDA": torch.version.cuda or "none (CPU build)",
        **{name: _version(name) or "not installed" for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, KeyError):  # (KeyError: metadata without a version)
        return None


def _gpus() -> tuple[tuple[Gpu, ...], list[str]]:
    """The GPUs, and what is wrong if torch cannot tell."""
    found: list[Gpu] = []
    try:
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            p = torch.cuda.get_device_properties(index)
            found.append(Gpu(index, p.name, f"{p.major}.{p.minor}", round(p.total_memory / 2**30, 1)))
    except Exception as error:  # a driver that is updated underneath, say; torch raises several kinds
        return tuple(found), [f"PyTorch cannot use GPU {len(found)} ({one_line(error)}): does nvidia-smi show it?"]
    return tuple(found), []


def _driver() -> tuple[str | None, str | None]:
    """The NVIDIA driver's version and the newest CUDA it supports, from nvidia-smi; ``None`` without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, None
    try:
        output = subprocess.run([program], capture_output=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, None
    text, version = output.decode("utf-8", "replace"), r" Version:\s*(\d{1,6}(?:\.\d{1,6}){1,3})"  # (or "N/A")
    driver, cuda = re.search("Driver" + version, text), re.search("CUDA" + version, text)
    return driver and driver[1], cuda and cuda[1]


def _abilities(gpus: tuple[Gpu, ...]) -> list[Ability]:
    devices = [torch.device("cpu"), *(torch.device("cuda", g.index) for g in gpus)]
    found = []
    for device in devices:
        label = "cpu" if device.type == "cpu" else f"{device} ({device_name(device)})"
        for implementation in IMPLEMENTATIONS:
            for recipe in RECIPES.values():
                request = Request(
                    recipe=recipe,
                    machine=None,
                    batch=1,
                    q_heads=8,
                    kv_heads=8,
                    q_len=1024,
                    kv_len=1024,
                    head_dim=64,
                    v_head_dim=64,
                    dtype=torch.bfloat16,
                    device=device,
                )
                reasons = implementation.not_supported_reasons(request, recipe)
                found.append(Ability(label, implementation.name, recipe.name, reasons))
    return found

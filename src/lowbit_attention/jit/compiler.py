"""Source to machine code, by NVRTC."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

from ..errors import InvalidArgumentError, LowbitError, MissingExtraError
from .source import Source

SCHEMA = 1
"""Raise it when the same key would now give other machine code, or a cache entry another form."""

MIN_NVRTC = (12, 8)
"""Older compilers build a trap for the FP8 MMA with an FP16 accumulator."""
_CACHES = (12, 9)
"""Older compilers know neither a cache of their own nor the option that turns it off."""

NVRTC_WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
"""The packages that bring NVRTC, of CUDA 13 and of CUDA 12."""

_importing = threading.Lock()
_ARCH = re.compile(r"sm_\d{2,3}[af]?")


class CompileError(LowbitError):
    """NVRTC refused a source; the message holds its diagnostics."""


@dataclass(frozen=True)
class Options:
    """Everything besides the source that changes the machine code.

    arch: ``sm_89``, ``sm_90a``, …; defines: preprocessor macros.
    """

    arch: str
    defines: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not _ARCH.fullmatch(self.arch):
            raise InvalidArgumentError(f"arch={self.arch!r} is none like 'sm_89' or 'sm_90a'")

    @classmethod
    def of(cls, arch: str, defines: Mapping[str, int | str] | None = None) -> Options:
        """Options with macros given as a mapping; their order does not matter."""
        return cls(arch, tuple(sorted((name, str(value)) for name, value in (defines or {}).items())))


@dataclass(frozen=True)
class Resources:
    """What ptxas says one kernel uses: registers a thread, and bytes of stack, spills and static shared memory."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    """Machine code for one architecture, what its kernels use (by name), and the compiler's other remarks."""

    cubin: bytes
    resources: dict[str, Resources]
    remarks: tuple[str, ...]


@lru_cache(maxsize=1)
def nvrtc_version() -> tuple[int, int]:
    """NVRTC's version.

    Raises:
        MissingExtraError: the run-time compiler is not installed.
    """
    result, major, minor = import_bindings("cuda.bindings.nvrtc").nvrtcVersion()
    if int(result) != 0:
        raise CompileError(f"NVRTC does not say its version: {result}")
    return int(major), int(minor)


def installed_nvrtc() -> dict[str, str]:
    """Versions of the installed packages that bring NVRTC."""
    found = {}
    for name in NVRTC_WHEELS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@lru_cache(maxsize=1)
def compiler_identity() -> tuple[str, ...]:
    """Which compiler this is, for the cache key. A package that says spares loading it, a third of a second.

    Raises:
        MissingExtraError: the run-time compiler is not installed.
    """
    if packages := installed_nvrtc():
        return tuple(f"{name} {version}" for name, version in packages.items())
    return (f"nvrtc {_dotted(nvrtc_version())}",)


def cache_key(source: Source, options: Options) -> str:
    """A name (64 hexadecimal digits) that is another as soon as the machine code could be."""
    everything = {
        "schema": SCHEMA,
        "compiler": compiler_identity(),
        "arch": options.arch,
        "defines": options.defines,
        "name": source.name,
        "text": source.text,
        "headers": source.headers,
    }
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def compile_source(source: Source, options: Options) -> Compiled:
    """Compile, without a GPU.

    Raises:
        CompileError: with NVRTC's diagnostics, or for an NVRTC below `MIN_NVRTC`.
        MissingExtraError: the run-time compiler is not installed.
    """
    core = _core()
    if nvrtc_version() < MIN_NVRTC:
        raise CompileError(
            f"NVRTC {_dotted(nvrtc_version())} is older than {_dotted(MIN_NVRTC)}, which the FP8 kernels need: "
            "pip install -U nvidia-cuda-nvrtc (or nvidia-cuda-nvrtc-cu12)"
        )
    log = io.StringIO()
    program_options = core.ProgramOptions(
        name=source.name,
        arch=options.arch,
        std="c++17",
        define_macro=[*options.defines] or None,
        include_path=None if source.root is None else str(source.root),
        ptxas_options=["-v"],  # its report of registers and spills
        # NVRTC's own cache, where there is a driver, gives the code without that report; older ones have none
        no_cache=True if nvrtc_version() >= _CACHES else None,
    )
    try:
        code = core.Program(source.text, "c++", program_options).compile("cubin", logs=log)
    except Exception as error:  # cuda-core raises its own private types
        raise CompileError(f"{source.name} does not compile for {options.arch}: {error}\n{log.getvalue()}") from None
    resources, remarks = read_report(log.getvalue().replace("\0", ""))  # (NVRTC ends its texts as C does)
    return Compiled(bytes(code.code), resources, remarks)


def read_report(text: str) -> tuple[dict[str, Resources], tuple[str, ...]]:
    """Resources by kernel from ptxas's verbose report, and the lines that are not of that report (warnings, say)."""
    resources: dict[str, Resources] = {}
    remarks = []
    name: str | None = None
    frame = (0, 0, 0)
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            frame = int(match[1]), int(match[2]), int(match[3])
        elif (match := re.search(r"Used (\d+) registers", line)) and name is not None:
            shared = re.search(r"(\d+) bytes smem", line)
            resources[name] = Resources(int(match[1]), *frame, shared=int(shared[1]) if shared else 0)
        elif line.strip() and (not line.startswith("ptxas info") or re.search(r"\(C\d+\)", line)):
            remarks.append(line.strip())
    return resources, tuple(remarks)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _core() -> Any:
    return import_bindings("cuda.core")


def import_bindings(name: str) -> Any:
    """A module of the run-time compiler's packages; threads that come together wait until it is whole."""
    with _importing:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise MissingExtraError("compiling kernels", "cuda13", error.name or name) from None

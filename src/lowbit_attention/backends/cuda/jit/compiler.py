"""Source to machine code, by NVRTC."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import threading
from functools import lru_cache
from typing import Any

from .bindings import broken, import_bindings, installed_nvrtc, no_fork_meanwhile, one_line
from .compiled import Compiled, CompileError, Options, Resources
from .fresh import compile_elsewhere
from .source import Source

SCHEMA = 2
"""Raise it when the same key would now give other machine code, or a cache entry another form."""

MIN_NVRTC = (12, 8)
"""Older compilers build a trap for the FP8 MMA with an FP16 accumulator."""
_CACHES = (12, 9)
"""Older compilers know neither a cache of their own nor the option that turns it off."""


_running: set[int] = set()
"""Threads that NVRTC compiles for."""
_forked_meanwhile = False


def _after_fork_in_child() -> None:
    """NVRTC has locks of its own: where a thread held one when this process was forked, it would wait for ever."""
    global _forked_meanwhile
    _forked_meanwhile = _forked_meanwhile or bool(_running)
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


@lru_cache(maxsize=1)
def nvrtc_version() -> tuple[int, int]:
    """NVRTC's version.

    Raises:
        CompilerMissingError: the run-time compiler is not installed.
        CompilerBrokenError: it is, and its library cannot be loaded.
    """
    nvrtc = import_bindings("cuda.bindings.nvrtc")
    try:
        with no_fork_meanwhile():
            result, major, minor = nvrtc.nvrtcVersion()  # the first call loads the library
    except Exception as error:
        raise broken("NVRTC's library cannot be loaded", error) from None
    if int(result) != 0:
        raise broken("NVRTC does not work", RuntimeError(f"it does not say its version: {result}"))
    return int(major), int(minor)


@lru_cache(maxsize=1)
def compiler_identity() -> tuple[str, ...]:
    """Which compiler this is, for the cache key. A package that says spares loading it, a third of a second.

    Raises:
        CompilerMissingError, CompilerBrokenError: as `nvrtc_version`, which is asked where no package says.
    """
    if packages := installed_nvrtc():
        return tuple(f"{name} {version}" for name, version in packages.items())
    return (f"nvrtc {_dotted(nvrtc_version())}",)


def cache_key(source: Source, options: Options) -> str:
    """A name (64 hexadecimal digits) that is another as soon as the machine code could be."""
    everything = {**made_of(source, options), "text": source.text, "headers": source.headers}
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def made_of(source: Source, options: Options) -> dict[str, Any]:
    """What a key is made of, without the source's text: an entry holds it for people to read."""
    return {
        "schema": SCHEMA,
        "compiler": compiler_identity(),
        "arch": options.arch,
        "defines": options.defines,
        "name": source.name,
    }


def compile_source(source: Source, options: Options) -> Compiled:
    """Compile, without a GPU.

    Raises:
        CompileError: with NVRTC's diagnostics, or for an NVRTC below `MIN_NVRTC`.
        CompilerMissingError: the run-time compiler is not installed.
        CompilerBrokenError: it is, and does not work.
    """
    if _forked_meanwhile:
        return compile_elsewhere(cache_key(source, options), source, options)
    core = _core()
    if nvrtc_version() < MIN_NVRTC:
        raise CompileError(
            f"NVRTC {_dotted(nvrtc_version())} is older than {_dotted(MIN_NVRTC)}, which the FP8 kernels need",
            "pip install -U nvidia-cuda-nvrtc (or nvidia-cuda-nvrtc-cu12)",
        )
    log = io.StringIO()
    program_options = {
        "name": source.name,
        "arch": options.arch,
        "std": "c++17",
        "define_macro": [*options.defines] or None,
        "include_path": None if source.root is None else str(source.root),
        "ptxas_options": ["-v"],  # its report of registers and spills
        # NVRTC's own cache, where there is a driver, gives the code without that report; older ones have none
        "no_cache": True if nvrtc_version() >= _CACHES else None,
    }
    _running.add(threading.get_ident())
    try:
        program = core.Program(source.text, "c++", core.ProgramOptions(**program_options))
        cubin = bytes(program.compile("cubin", logs=log).code)
    except Exception as error:  # cuda-core raises its own private types, and others where its libraries are damaged
        raise CompileError(
            f"{source.name} does not compile for {options.arch} ({one_line(error)})",
            "`lowbit doctor` tells whether the compiler works here",
            f"{error}\n{log.getvalue()}".replace("\0", "").strip(),
        ) from None
    finally:
        _running.discard(threading.get_ident())
    resources, remarks = read_report(log.getvalue().replace("\0", ""))  # (NVRTC ends its texts as C does)
    return Compiled(cubin, resources, remarks)


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

"""The Python packages of the run-time compiler: found, imported, and what is wrong where they are not."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ....errors import KernelUnavailableError, MissingExtraError

NVRTC_WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
"""The packages that bring NVRTC, of CUDA 13 and of CUDA 12."""

_WAY_OUT = 'pip install "lowbit-attention[cuda13]" (or cuda12, for an older driver)'
_REPAIR = (
    'pip install --force-reinstall "lowbit-attention[cuda13]" (or cuda12); `lowbit doctor` tells whether it works then'
)
_FORK_SECONDS = 10.0
"""How long a fork waits for another thread that is importing: several times what the packages take."""
_importing = threading.RLock()
_forking = threading.local()


@contextlib.contextmanager
def no_fork_meanwhile() -> Iterator[None]:
    """Threads that come together wait for each other, and a fork waits, too.

    A child forked while a thread imports has the half of a module for ever, and locks that nobody releases.
    """
    with _importing:
        yield


def _before_fork() -> None:
    _forking.waited = _importing.acquire(timeout=_FORK_SECONDS)  # (not for ever: whom it waits for may wait for us)


def _after_fork_in_parent() -> None:
    if _forking.waited:
        _importing.release()


def _after_fork_in_child() -> None:
    global _importing
    _importing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


class CompilerMissingError(KernelUnavailableError, MissingExtraError):
    """The run-time compiler's packages are not installed."""

    def __init__(self, reason: str, way_out: str = _WAY_OUT, details: str = "") -> None:
        self.extra = "cuda13"
        KernelUnavailableError.__init__(self, reason, way_out, details)


class CompilerBrokenError(KernelUnavailableError):
    """The run-time compiler is installed and does not work: its library is missing or damaged, or it is shadowed."""


def import_bindings(name: str) -> Any:
    """A module of the run-time compiler's packages; threads that come together wait until it is whole.

    Raises:
        CompilerMissingError: it is not installed.
        CompilerBrokenError: it is, and cannot be imported.
    """
    with no_fork_meanwhile():
        if name not in sys.modules and (shadow := _shadow()):
            raise CompilerBrokenError(*shadow)  # (and the stranger is not run)
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or name
            raise CompilerMissingError(
                f"compiling kernels needs the package {missing!r}, which is not installed"
            ) from None
        except Exception as error:  # whatever a damaged package raises
            raise broken(f"{name} cannot be imported", error) from None


def broken(what: str, error: BaseException) -> CompilerBrokenError:
    """The error for a compiler that is there and does not work."""
    return CompilerBrokenError(f"{what} ({one_line(error)})", _REPAIR)


def one_line(error: BaseException) -> str:
    """An error's kind and the first line of its text, which may be a listing of folders."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def compiler_reasons() -> tuple[str, ...]:
    """Why kernels cannot be compiled here, as far as can be told without loading the compiler."""
    if shadow := _shadow():
        return (f"{shadow[0]}: {shadow[1]}",)
    try:
        missing = any(find_spec(name) is None for name in ("cuda", "cuda.bindings", "cuda.core"))
    except Exception as error:  # (it imports packages that may be damaged)
        return (str(broken("the run-time compiler cannot be imported", error)),)
    return (f"the run-time compiler is not installed: {_WAY_OUT}",) if missing else ()


def installed_nvrtc() -> dict[str, str]:
    """Versions of the installed packages that bring NVRTC."""
    found = {}
    for name in NVRTC_WHEELS:
        with contextlib.suppress(metadata.PackageNotFoundError, KeyError):  # (KeyError: metadata without a version)
            found[name] = str(metadata.version(name))
    return found


def _shadow() -> tuple[str, str] | None:
    """The file that Python finds as ``cuda`` instead of NVIDIA's package, and the way out; ``None`` if there is none.

    NVIDIA's ``cuda`` is a folder without ``__init__.py``, which any ``cuda.py`` or package ``cuda`` comes before.
    """
    try:
        spec = find_spec("cuda")
    except ValueError:  # (in sys.modules, and without a spec)
        return None
    if spec is None or spec.origin is None:
        return None
    if any(Path(folder, "bindings").is_dir() for folder in spec.submodule_search_locations or ()):
        return None  # (a build of NVIDIA's package that has one)
    return (
        f"{spec.origin} hides NVIDIA's package `cuda`, which the run-time compiler is in",
        "rename it, or start Python in another folder",
    )

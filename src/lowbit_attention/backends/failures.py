"""Kernels that failed in this process: ``auto`` and lenient rerouting go round them, with one warning and a count.

A kernel that cannot be compiled, loaded or run must not take a call down that something else can run. What failed is
remembered by what its machine code depends on, so that nothing is compiled or tried again with every call.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass

import torch

from ..call.request import Request
from ..errors import FallbackWarning, KernelUnavailableError
from ..recipes.definition import Recipe
from .cuda.jit.cache import CaptureError

Key = tuple[str, Recipe, torch.dtype, torch.device, int, int]


@dataclass
class Failure:
    """Why a kernel failed, and how many calls something else ran for it. ``lasting``: it is not tried again."""

    reason: str
    lasting: bool
    calls: int = 0


_failures: dict[Key, Failure] = {}
_lock = threading.Lock()


def _key(implementation: str, recipe: Recipe, request: Request) -> Key:
    return implementation, recipe, request.dtype, request.device, request.head_dim, request.v_head_dim


def can_go_round(error: Exception) -> bool:
    """Whether another implementation may run a call that a kernel failed with this error.

    Not where a CUDA graph is being captured: it would hold the slow way for ever.
    """
    return not isinstance(error, CaptureError)


def note(implementation: str, recipe: Recipe, request: Request, error: Exception) -> str:
    """Remember a failure, warn the first time, and say in one line why something else ran the call."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not isinstance(error, KernelUnavailableError):
        reason = f"{type(error).__name__}: {reason}"
    lasting = not isinstance(error, torch.OutOfMemoryError)
    with _lock:
        key = _key(implementation, recipe, request)
        first = key not in _failures
        failure = _failures.setdefault(key, Failure(reason, lasting))
        failure.calls += 1
    if first:
        warnings.warn(
            f"{implementation} with recipe {recipe} failed, and something else runs such calls: {reason} "
            "(`lowbit doctor` looks for the cause)",
            FallbackWarning,
            stacklevel=2,
        )
    return reason


def known(implementation: str, recipe: Recipe, request: Request, count: bool = False) -> str | None:
    """Why a kernel is not tried again for such a call; ``None``: it may be. ``count``: something else runs a call."""
    if not _failures:  # (nearly always)
        return None
    failure = _failures.get(_key(implementation, recipe, request))
    if failure is None or not failure.lasting:
        return None
    if count:
        with _lock:
            failure.calls += 1
    return f"it failed before in this process: {failure.reason}"


def all_failures() -> dict[Key, Failure]:
    """Everything that failed so far."""
    with _lock:
        return dict(_failures)


def forget() -> None:
    """Try everything again."""
    with _lock:
        _failures.clear()

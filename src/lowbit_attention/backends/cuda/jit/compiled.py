"""What the run-time compiler is told, and what it answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ....errors import InvalidArgumentError, KernelUnavailableError

_ARCH = re.compile(r"sm_\d{2,3}[af]?")


class CompileError(KernelUnavailableError):
    """NVRTC refused a source; ``details`` holds its diagnostics."""


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

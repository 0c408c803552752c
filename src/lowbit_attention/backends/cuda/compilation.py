"""One compilation of a kernel's source: what it is called, what it is told, and what its machine code must hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .jit.compiled import Options
from .jit.source import Source, read_source

CSRC = Path(__file__).parent / "csrc"

ENTRIES = {
    "attention_wgmma": "hopper/attention.cu",
    "attention_mma": "mma/attention.cu",
    "pack": "pack/pack.cu",
    "smooth_q": "pack/smooth_q.cu",
    "mask": "mask/mask.cu",
    "sequences": "sequences/sequences.cu",
}
"""The source of a kernel, below `CSRC`."""


@dataclass(frozen=True)
class Instance:
    """One compilation.

    ``kernel``: its name; `ENTRIES` has its source. ``defines``: the switches of recipe, head dimension and type, as
    macros; they are its name, too. ``config``: the numbers that follow from them (configs.py), as text that stands
    before the source. ``mma``: instructions that its machine code must hold; ``spill_limit``: bytes of spills it may
    have, 0 unless a reason stands beside it, and none in a loop with MMAs unless ``spills_anywhere``.
    """

    kernel: str
    arch: str
    defines: tuple[tuple[str, int], ...]
    config: str = ""
    mma: tuple[str, ...] = ()
    spill_limit: int = 0
    spills_anywhere: bool = False

    @property
    def entry(self) -> str:
        """The source file below `CSRC`."""
        return ENTRIES[self.kernel]

    def source(self) -> Source:
        """Its source with everything that it includes, behind its configuration."""
        source = read_source(CSRC, self.entry)
        return replace(source, text=f'{self.config}#line 1 "{self.entry}"\n{source.text}')

    def options(self) -> Options:
        """Its compiler options."""
        return Options.of(self.arch, dict(self.defines))

    def __str__(self) -> str:
        return f"{self.kernel} {self.arch} " + " ".join(f"{name}={value}" for name, value in self.defines)

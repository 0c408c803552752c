"""Kernel instances: what a source is compiled for. `MANIFEST` is what CI compiles; adding a row there adds a check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..jit.compiler import Options
from ..jit.source import Source, read_source
from ..machine import Geometry
from ..recipe import Recipe

CSRC = Path(__file__).parent / "csrc"

HEAD_DIMS = (64, 128)
"""Head dimensions that kernels are compiled for; smaller ones are padded inside the kernel."""

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""`Dtype` of csrc/tile/strided.cuh."""

TILE_KEYS = 128
"""Keys of a packed tile."""


@dataclass(frozen=True)
class Instance:
    """One compilation.

    ``kernel`` is the source's name below csrc/kernels; ``mma``: instructions that its machine code must hold;
    ``spill_limit``: bytes of spills it may have, 0 unless a reason stands beside it.
    """

    kernel: str
    arch: str
    defines: tuple[tuple[str, int], ...]
    mma: tuple[str, ...] = ()
    spill_limit: int = 0

    @property
    def entry(self) -> str:
        """The source file below `CSRC`."""
        return f"kernels/{self.kernel}.cu"

    def source(self) -> Source:
        """Its source with everything that it includes."""
        return read_source(CSRC, self.entry)

    def options(self) -> Options:
        """Its compiler options."""
        return Options.of(self.arch, dict(self.defines))

    def __str__(self) -> str:
        return f"{self.kernel} {self.arch} " + " ".join(f"{name}={value}" for name, value in self.defines)


def pack_instance(head_dim: int, dtype: torch.dtype, arch: str) -> Instance:
    """The packing kernels for K and V of that type, channels padded to ``head_dim``."""
    return Instance("pack", arch, (("HEAD_DIM", head_dim), ("INPUT_DTYPE", DTYPE_CODES[dtype])))


@dataclass(frozen=True)
class WgmmaConfig:
    """What the Hopper attention kernel is compiled for.

    ``sums_f16``: P·V in FP16 sums, else in FP32-typed ones; ``promotion_keys``: after how many keys they are added to
    the FP32 output, 64 or 128.
    """

    head_dim: int
    sums_f16: bool
    promotion_keys: int

    consumers = 2
    """Warpgroups of 64 query rows in a thread block (kConsumers)."""
    geometry = Geometry(b_q=64, b_k=TILE_KEYS, warp_rows=16)

    @property
    def q_rows(self) -> int:
        """Query rows of a thread block."""
        return self.consumers * 64

    @property
    def threads(self) -> int:
        """Threads of a block: the consumers and the producer's warpgroup."""
        return 128 * (self.consumers + 1)

    @property
    def shared_bytes(self) -> int:
        """Size of the kernel's ``Shared``: K and V stages, Q, scales, barriers."""
        stages = 3 if self.head_dim == 128 else 4
        tile = TILE_KEYS * self.head_dim
        rows = self.consumers * 64
        used = stages * 2 * tile + rows * self.head_dim + stages * 16 + rows * 4 + stages * 4 * 8
        return -(-used // 1024) * 1024

    def instance(self) -> Instance:
        """Its compilation."""
        sums = "F16" if self.sums_f16 else "F32"
        return Instance(
            "attention_wgmma",
            "sm_90a",
            (
                ("HEAD_DIM", self.head_dim),
                ("PROMOTION_KEYS", self.promotion_keys),
                ("SUMS_F16", int(self.sums_f16)),
            ),
            mma=("IGMMA.64x128x32.S8.S8", f"QGMMA.64x{self.head_dim}x32.{sums}.E4M3.E4M3"),
        )


def wgmma_config(recipe: Recipe, head_dim: int) -> WgmmaConfig:
    """The configuration that runs a recipe which `attention_wgmma` supports, for channels padded to ``head_dim``."""
    keys = recipe.promotion_keys(WgmmaConfig.geometry)
    if keys is None:
        raise ValueError(f"recipe {recipe} never promotes, and attention_wgmma has no such instance")
    return WgmmaConfig(head_dim, recipe.accumulator == "fp8_f16", keys)


def padded_head_dim(head_dim: int) -> int | None:
    """The smallest compiled head dimension that holds ``head_dim`` channels; ``None`` if none does."""
    return next((d for d in HEAD_DIMS if head_dim <= d), None)


def _manifest() -> Iterable[Instance]:
    for head_dim in HEAD_DIMS:
        for dtype in DTYPE_CODES:
            yield pack_instance(head_dim, dtype, "sm_90a")
        for sums_f16, keys in ((False, 128), (True, 64), (True, 128)):
            yield WgmmaConfig(head_dim, sums_f16, keys).instance()


MANIFEST: tuple[Instance, ...] = tuple(_manifest())
"""Every instance that a recipe can ask for."""

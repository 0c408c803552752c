"""Kernel instances: what a source is compiled for. `MANIFEST` is what CI compiles; adding a row there adds a check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..jit.compiler import Options
from ..jit.source import Source, read_source
from ..machine import MACHINES
from ..recipe import Recipe
from ..recipe_options import RestartedMax
from ..recipes import RECIPES

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
    """What the Hopper attention kernel is compiled for; the macros of csrc/kernels/attention_wgmma.cu.

    ``sums_f16``: P·V in FP16 sums, else in FP32-typed ones; ``promotion_keys``: after how many keys they are added to
    the FP32 output; ``promote_first``: after the first tile, too; ``restart``: each interval has its own maximum;
    ``sum_in_mma``: the row sum is a column of ones beside V.
    """

    head_dim: int
    sums_f16: bool = False
    promotion_keys: int = 128
    promote_first: bool = False
    restart: bool = False
    sum_in_mma: bool = False

    geometry = MACHINES["sm_90a"].geometry

    @property
    def output_in_shared(self) -> bool:
        """Whether O lies in shared memory (kOutputInShared)."""
        return self.sums_f16 and self.promotion_keys > self.geometry.b_k

    @property
    def consumers(self) -> int:
        """Warpgroups of 64 query rows in a thread block (kConsumers)."""
        return 3 if self.output_in_shared else 2

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
        """Size of the kernel's ``Shared``: K and V stages, Q, O, scales, barriers."""
        stages = 4 if self.head_dim == 64 else 2 if self.output_in_shared else 3
        tile = TILE_KEYS * self.head_dim
        ones = 8 * TILE_KEYS if self.sum_in_mma else 0
        rows = self.consumers * 64
        used = stages * (2 * tile + ones) + 2 * rows * self.head_dim
        used += rows * self.head_dim * 4 if self.output_in_shared else 0
        used += stages * 16 + 2 * self.consumers * 4 * 32 + 2 * rows * 4 + 8 + (2 * stages + 4) * 8
        return -(-used // 1024) * 1024

    def instance(self) -> Instance:
        """Its compilation."""
        sums = "F16" if self.sums_f16 else "F32"
        columns = self.head_dim + 8 * self.sum_in_mma
        return Instance(
            "attention_wgmma",
            "sm_90a",
            (
                ("HEAD_DIM", self.head_dim),
                ("SUMS_F16", int(self.sums_f16)),
                ("PROMOTION_KEYS", self.promotion_keys),
                ("PROMOTE_FIRST", int(self.promote_first)),
                ("RESTART", int(self.restart)),
                ("SUM_IN_MMA", int(self.sum_in_mma)),
            ),
            mma=("IGMMA.64x64x32.S8.S8", f"QGMMA.64x{columns}x32.{sums}.E4M3.E4M3"),
        )


def wgmma_config(recipe: Recipe, head_dim: int) -> WgmmaConfig:
    """The configuration that runs a recipe which `attention_wgmma` supports, for channels padded to ``head_dim``."""
    keys = recipe.promotion_keys(WgmmaConfig.geometry)
    if keys is None:
        raise ValueError(f"recipe {recipe} never promotes, and attention_wgmma has no such instance")
    return WgmmaConfig(
        head_dim,
        sums_f16=recipe.accumulator == "fp8_f16",
        promotion_keys=keys,
        promote_first=recipe.promote_first_tile and keys > WgmmaConfig.geometry.b_k,
        restart=isinstance(recipe.softmax_max, RestartedMax),
        sum_in_mma=recipe.row_sum == "accumulator",
    )


def padded_head_dim(head_dim: int) -> int | None:
    """The smallest compiled head dimension that holds ``head_dim`` channels; ``None`` if none does."""
    return next((d for d in HEAD_DIMS if head_dim <= d), None)


def _manifest() -> Iterable[Instance]:
    for head_dim in HEAD_DIMS:
        for dtype in DTYPE_CODES:
            yield pack_instance(head_dim, dtype, "sm_90a")
        for name in WGMMA_RECIPES:
            yield wgmma_config(RECIPES[name], head_dim).instance()


WGMMA_RECIPES = ("sage2_8b", "sage2pp_8b", "fast_8b")
"""Named recipes that `attention_wgmma` runs; their options may vary within what its `not_supported_reasons` says."""

MANIFEST: tuple[Instance, ...] = tuple(_manifest())
"""Every instance that a recipe can ask for."""

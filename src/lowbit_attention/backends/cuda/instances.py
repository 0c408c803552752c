"""Kernel instances: what a source is compiled for. `MANIFEST` is what CI compiles; adding a row there adds a check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...recipes.definition import Recipe
from ...recipes.machine import MACHINES
from ...recipes.named import RECIPES
from ...recipes.options import RestartedMax
from .jit.compiled import Options
from .jit.source import Source, read_source

CSRC = Path(__file__).parent / "csrc"

HEAD_DIMS = (64, 128)
"""Head dimensions that kernels are compiled for; smaller ones are padded inside the kernel."""

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""`Dtype` of csrc/tile/strided.cuh."""

ENTRIES = {
    "attention_wgmma": "hopper/attention.cu",
    "attention_mma": "mma/attention.cu",
    "pack": "pack/pack.cu",
    "smooth_q": "pack/smooth_q.cu",
}
"""The source of a kernel, below `CSRC`."""

TILE_KEYS = 128
"""Keys of a tile that is packed for wgmma."""


@dataclass(frozen=True)
class Instance:
    """One compilation.

    ``kernel``: its name; `ENTRIES` has its source. ``mma``: instructions that its machine code must hold;
    ``spill_limit``: bytes of spills it may have, 0 unless a reason stands beside it, and none in a loop with MMAs
    unless ``spills_anywhere``.
    """

    kernel: str
    arch: str
    defines: tuple[tuple[str, int], ...]
    mma: tuple[str, ...] = ()
    spill_limit: int = 0
    spills_anywhere: bool = False

    @property
    def entry(self) -> str:
        """The source file below `CSRC`."""
        return ENTRIES[self.kernel]

    def source(self) -> Source:
        """Its source with everything that it includes."""
        return read_source(CSRC, self.entry)

    def options(self) -> Options:
        """Its compiler options."""
        return Options.of(self.arch, dict(self.defines))

    def __str__(self) -> str:
        return f"{self.kernel} {self.arch} " + " ".join(f"{name}={value}" for name, value in self.defines)


@dataclass(frozen=True)
class PackFormat:
    """How K and V lie in tiles; the macros of csrc/pack/pack.cu.

    ``k_lanes``: bits that a number of K takes; ``v_half``: V in FP16, else in E4M3; ``rotate``: K is rotated;
    ``v_tile_means``: V without its means by tile. Tiles of 64 keys (mma.sync's) are records of K, V and K's scales side
    by side; those of 128 (wgmma's) lie in an array each.
    """

    tile_keys: int = TILE_KEYS
    k_lanes: int = 8
    v_half: bool = False
    rotate: bool = False
    v_tile_means: bool = False

    @property
    def is_record(self) -> bool:
        """Whether a tile's K, V and scales lie side by side."""
        return self.tile_keys == 64

    @property
    def has_clusters(self) -> bool:
        """Whether the packing kernels use thread block clusters (CLUSTERS): on Hopper, for wgmma."""
        return self.tile_keys == TILE_KEYS

    def k_bytes(self, dim: int) -> int:
        """Bytes of a tile's K."""
        return self.tile_keys * dim * self.k_lanes // 8

    def v_bytes(self, dim: int) -> int:
        """Bytes of a tile's V."""
        return self.tile_keys * dim * (2 if self.v_half else 1)

    def record_bytes(self, dim: int) -> int:
        """Bytes of a record: K, V, four scales, and what keeps records at multiples of 128."""
        return self.k_bytes(dim) + self.v_bytes(dim) + 128


WGMMA_FORMAT = PackFormat()


def wgmma_format(recipe: Recipe) -> PackFormat:
    """How K and V are packed for `attention_wgmma`."""
    return PackFormat(v_tile_means=recipe.v_tile_means)


_MOST_KEYS = 1 << 30
"""The longest sequence that kernels take. A longer promotion interval never ends, and the kernel counts in 32 bits."""


def pack_instance(head_dim: int, dtype: torch.dtype, arch: str, form: PackFormat = WGMMA_FORMAT) -> Instance:
    """The packing kernels for K and V of that type, channels padded to ``head_dim``."""
    return Instance(
        "pack",
        arch,
        (
            ("HEAD_DIM", head_dim),
            ("INPUT_DTYPE", DTYPE_CODES[dtype]),
            ("TILE_KEYS", form.tile_keys),
            ("K_LANES", form.k_lanes),
            ("V_HALF", int(form.v_half)),
            ("ROTATE", int(form.rotate)),
            *((("V_TILE_MEANS", 1),) if form.v_tile_means else ()),
        ),
    )


def smooth_q_instance(head_dim: int, dtype: torch.dtype, arch: str) -> Instance:
    """The kernels that smooth Q takes besides, for Q and K of that type."""
    return Instance("smooth_q", arch, (("HEAD_DIM", head_dim), ("INPUT_DTYPE", DTYPE_CODES[dtype])))


@dataclass(frozen=True)
class WgmmaConfig:
    """What the Hopper attention kernel is compiled for; the macros of csrc/hopper/attention.cu.

    ``dtype``: Q's and the output's (code for all types at once is twice as long, and does not always stay in the
    instruction cache: docs/kernels/hopper.md); ``sums_f16``: P·V in FP16 sums, else in FP32-typed ones;
    ``promotion_keys``: after how many keys they are added to the FP32 output; ``promote_first``: after the first tile,
    too; ``restart``: each interval has its own maximum; ``sum_in_mma``: the row sum is that of the columns of ones;
    ``tile_means``: these hold a tile's row sum each, by which V's means by tile are put back.
    """

    head_dim: int
    dtype: torch.dtype
    sums_f16: bool = False
    promotion_keys: int = 128
    promote_first: bool = False
    restart: bool = False
    sum_in_mma: bool = False
    tile_means: bool = False

    geometry = MACHINES["sm_90a"].geometry

    @property
    def output_in_shared(self) -> bool:
        """Whether O lies in shared memory (OUTPUT_IN_SHARED)."""
        return self.sums_f16 and self.promotion_keys > self.geometry.b_k

    @property
    def consumers(self) -> int:
        """Warpgroups of 64 query rows in a thread block (CONSUMERS)."""
        if not self.output_in_shared:
            return 2
        return 3 if self.head_dim == 128 else 4

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
        """Size of the kernel's ``Shared``: K and V stages, Q, O, scales and means, barriers."""
        stages = 4 if self.head_dim == 64 else 2 if self.output_in_shared else 3
        tile = TILE_KEYS * self.head_dim
        ones = 8 * TILE_KEYS if self.sum_in_mma else 0
        rows = self.consumers * 64
        used = stages * (2 * tile + ones) + 2 * rows * self.head_dim
        used += rows * self.head_dim * 4 if self.output_in_shared else 0
        used += 2 * 2 * self.head_dim * 4  # V's scales and means
        used += stages * 16 + 2 * self.consumers * 4 * 32 + 2 * rows * 4 + 8 + (2 * stages + 4) * 8
        used += self.consumers * 128 * 24 if self.consumers == 4 else 0  # what only promotions ask for
        used += 2 * 36 + 3 * 8 if self.output_in_shared else 2 * 20  # pieces of work; and who takes them
        used += 2 * 16 * (2 * self.head_dim + 16) if self.tile_means else 0
        return -(-used // 1024) * 1024

    def instance(self) -> Instance:
        """Its compilation."""
        sums = "F16" if self.sums_f16 else "F32"
        in_halves = not self.sums_f16 and self.head_dim == 128 and self.promotion_keys == 128  # (SPLITS_CHANNELS)
        columns = self.head_dim // (2 if in_halves else 1) + 8 * self.sum_in_mma
        scores = 64 if self.consumers == 4 else 128  # keys at a time
        return Instance(
            "attention_wgmma",
            "sm_90a",
            (
                ("HEAD_DIM", self.head_dim),
                ("INPUT_DTYPE", DTYPE_CODES[self.dtype]),
                ("SUMS_F16", int(self.sums_f16)),
                ("PROMOTION_KEYS", self.promotion_keys),
                ("PROMOTE_FIRST", int(self.promote_first)),
                ("RESTART", int(self.restart)),
                ("SUM_IN_MMA", int(self.sum_in_mma)),
                ("TILE_KEYS", TILE_KEYS),
                *((("TILE_MEANS", 1),) if self.tile_means else ()),
            ),
            mma=(f"IGMMA.64x{scores}x32.S8.S8", f"QGMMA.64x{columns}x32.{sums}.E4M3.E4M3"),
            # the producer of four consumers has 32 registers, and time
            spill_limit=320 if self.consumers == 4 else 0,
        )


def wgmma_config(recipe: Recipe, head_dim: int, dtype: torch.dtype) -> WgmmaConfig:
    """The configuration that runs a recipe which `attention_wgmma` supports, for channels padded to ``head_dim``."""
    keys = recipe.promotion_keys(WgmmaConfig.geometry)
    if keys is None:
        raise ValueError(f"recipe {recipe} never promotes, and attention_wgmma has no such instance")
    return WgmmaConfig(
        head_dim,
        dtype,
        sums_f16=recipe.accumulator == "fp8_f16",
        promotion_keys=min(keys, _MOST_KEYS),
        promote_first=recipe.promote_first_tile and keys > WgmmaConfig.geometry.b_k,
        restart=isinstance(recipe.softmax_max, RestartedMax),
        sum_in_mma=recipe.row_sum == "accumulator",
        tile_means=recipe.v_tile_means,
    )


MMA_GEOMETRY = MACHINES["sm_89"].geometry
"""Tiles of `attention_mma`, on every architecture."""

MMA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Architectures that `attention_mma` is compiled for; their machine code runs on later cards of the same generation."""

_FP8_MMA = {"sm_89": "QMMA.16832.{sums}.E4M3.E4M3", "sm_120": "QMMA.16832.{sums}.E4M3.E4M3"}
"""Where FP8 MMAs are the card's own; on sm_90 and sm_100 the compiler makes FP16 ones of them."""
INT4_MMA_ARCHS = ("sm_80", "sm_86", "sm_89")
"""Where INT4 MMAs are the card's own."""


@dataclass(frozen=True)
class MmaConfig:
    """What `attention_mma` is compiled for; the macros of csrc/mma/attention.cu.

    ``qk_lanes``: bits that a number of Q and K takes (4-bit numbers may lie in 8-bit lanes); ``v_half``: FP16 P·V, else
    E4M3; ``sums_f16``: in FP16 sums; ``promote``: each tile's sums are added to an FP32 output, else the MMA sums all;
    ``sum_in_mma``: the row sum is taken by an MMA with ones; ``smooth_q``, ``rotate``: what happens to Q first.
    """

    arch: str
    head_dim: int
    qk_lanes: int = 8
    v_half: bool = False
    sums_f16: bool = False
    promote: bool = True
    sum_in_mma: bool = False
    smooth_q: bool = False
    rotate: bool = False

    @property
    def groups(self) -> int:
        """Query tiles of 128 rows of a thread block (kGroups)."""
        return 2 if self.v_half and self.head_dim == 128 else 1

    @property
    def q_rows(self) -> int:
        """Query rows of a thread block."""
        return self.groups * MMA_GEOMETRY.b_q

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.q_rows // MMA_GEOMETRY.warp_rows * 32

    @property
    def own_mmas(self) -> int:
        """MMAs of a warp's iteration (64 keys) where the card has them all."""
        blocks, keys = MMA_GEOMETRY.warp_rows // 16, MMA_GEOMETRY.b_k
        qk = blocks * (keys // 8) * (self.head_dim * self.qk_lanes // 8 // 32)
        pv = blocks * (self.head_dim // 8) * (keys // (16 if self.v_half else 32))
        return qk + pv + (blocks * keys // 32 if self.sum_in_mma else 0)

    @property
    def form(self) -> PackFormat:
        """How K and V are packed for it."""
        return PackFormat(MMA_GEOMETRY.b_k, self.qk_lanes, self.v_half, self.rotate)

    @property
    def shared_bytes(self) -> int:
        """Size of the kernel's ``Shared``: two stages of tiles, Q, and a scratch of the warps' maxima."""
        stage = self.form.k_bytes(self.head_dim) + self.form.v_bytes(self.head_dim)
        stage += self.groups * MMA_GEOMETRY.b_k * 4 if self.smooth_q else 0
        return 2 * stage + self.q_rows * self.head_dim * self.qk_lanes // 8 + self.groups * 16

    def instance(self) -> Instance:
        """Its compilation."""
        lanes = "16864.S4.S4" if self.qk_lanes == 4 and self.arch in INT4_MMA_ARCHS else "16832.S8.S8"
        sums = "F16" if self.sums_f16 else "F32"
        pv = f"HMMA.16816.{sums}" if self.v_half else _FP8_MMA.get(self.arch, "HMMA.16816.{sums}").format(sums=sums)
        return Instance(
            "attention_mma",
            self.arch,
            (
                ("HEAD_DIM", self.head_dim),
                ("QK_LANES", self.qk_lanes),
                ("V_HALF", int(self.v_half)),
                ("SUMS_F16", int(self.sums_f16)),
                ("PROMOTE", int(self.promote)),
                ("SUM_IN_MMA", int(self.sum_in_mma)),
                ("SMOOTH_Q", int(self.smooth_q)),
                ("ROTATE", int(self.rotate)),
                ("TILE_KEYS", MMA_GEOMETRY.b_k),
            ),
            mma=(f"IMMA.{lanes}", pv),
            # sm_90 and sm_100 have no FP8 and INT4 MMAs: unpacking operands for others takes registers, and the kernel
            # runs there to be tested, or where nothing else does
            spill_limit=1024 if self.arch in ("sm_90", "sm_100") else 0,
            spills_anywhere=self.arch in ("sm_90", "sm_100"),
        )


def mma_config(recipe: Recipe, head_dim: int, arch: str, int4_mma: bool | None = None) -> MmaConfig:
    """The configuration that runs a recipe which `attention_mma` supports, for channels padded to ``head_dim``.

    ``int4_mma``: whether 4-bit numbers go through the INT4 MMA; by default where the card has one.
    """
    int4 = arch in INT4_MMA_ARCHS if int4_mma is None else int4_mma
    return MmaConfig(
        arch,
        head_dim,
        qk_lanes=4 if recipe.qk_bits == 4 and int4 else 8,
        v_half=recipe.pv_format == "fp16",
        sums_f16=recipe.accumulator in ("fp8_f16", "fp16"),
        # FP32 sums lose nothing in an MMA that a promotion would keep
        promote=recipe.accumulator != "fp32" and recipe.promotion_keys(MMA_GEOMETRY) is not None,
        sum_in_mma=recipe.row_sum == "accumulator",
        smooth_q=recipe.smooth_q,
        rotate=recipe.rotation == "hadamard",
    )


def padded_head_dim(head_dim: int) -> int | None:
    """The smallest compiled head dimension that holds ``head_dim`` channels; ``None`` if none does."""
    return next((d for d in HEAD_DIMS if head_dim <= d), None)


def _manifest() -> Iterable[Instance]:
    for head_dim in HEAD_DIMS:
        for dtype in DTYPE_CODES:
            forms = dict.fromkeys(wgmma_format(RECIPES[name]) for name in WGMMA_RECIPES)
            yield from (pack_instance(head_dim, dtype, "sm_90a", form) for form in forms)
            yield from (wgmma_config(RECIPES[name], head_dim, dtype).instance() for name in WGMMA_RECIPES)
    for arch in MMA_ARCHS:
        for head_dim in HEAD_DIMS:
            configs = [mma_config(RECIPES[name], head_dim, arch) for name in mma_recipes(arch)]
            if arch == "sm_90":  # the INT4 MMA is tested there
                configs += [
                    mma_config(RECIPES[n], head_dim, arch, True) for n in MMA_RECIPES if RECIPES[n].qk_bits == 4
                ]
            yield from (config.instance() for config in dict.fromkeys(configs))
            dtypes = DTYPE_CODES if arch == "sm_90" else (torch.float16, torch.bfloat16)  # (tests use float32, too)
            for form in dict.fromkeys(config.form for config in configs):
                yield from (pack_instance(head_dim, dtype, arch, form) for dtype in dtypes)
            if any(config.smooth_q for config in configs):
                yield from (smooth_q_instance(head_dim, dtype, arch) for dtype in dtypes)


WGMMA_RECIPES = ("sage2_8b", "sage2pp_8b", "fast_8b")
"""Named recipes that `attention_wgmma` runs; their options may vary within what its `not_supported_reasons` says."""

MMA_RECIPES = (
    "sage1",
    "sage2_v1_4b",
    "sage2_8b",
    "sage2_4b",
    "sage2pp_8b",
    "sage2pp_4b",
    "hadamard_attn",
    "rotated_4b",
    "int8_fp16",
)
"""Named recipes that `attention_mma` runs, likewise; where there is no FP8, those with FP16 P·V."""


def mma_recipes(arch: str) -> tuple[str, ...]:
    """Those of `MMA_RECIPES` that run on ``arch``."""
    return tuple(n for n in MMA_RECIPES if arch not in ("sm_80", "sm_86") or RECIPES[n].pv_format == "fp16")


MANIFEST: tuple[Instance, ...] = tuple(_manifest())
"""Every instance that a named recipe can ask for."""

"""What kernels are compiled for: a table of tile numbers a kernel, checked here and written out for the device.

The device derives nothing: what follows from a recipe, a head dimension and a type is worked out once, here, and a
configuration's `header` stands before the kernel's source as constants (``kStages``) and, where a member of a struct
or an argument depends on it, as a macro (``OUTPUT_IN_SHARED``). A configuration that cannot be is refused with the
limit and the values, before anything is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from ...errors import InvalidArgumentError
from ...recipes.machine import MACHINES
from .compilation import Instance

HEAD_DIMS = (64, 128)
"""Head dimensions that kernels are compiled for; smaller ones are padded inside the kernel."""

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""`Dtype` of csrc/tile/strided.cuh."""

TILE_KEYS = 128
"""Keys of a tile that is packed for wgmma."""

MaskForm = Literal["none", "keys", "bits", "bias", "sequences"]
"""What hides scores beside causality and the sequence's end (csrc/common/masks.cuh): nothing, or a list of the keys
that are seen, the same for all rows, or a bit a score, or a bias a score (packed K and V know no bias: bits). Or
nothing, and sequences of different lengths lie one behind the other (csrc/common/sequences.cuh)."""

SHARED_KIB = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_90a": 228, "sm_100": 228, "sm_120": 100}
"""Shared memory of a multiprocessor (CUDA programming guide, table of compute capabilities). A thread block may have
1 KiB less than all of it, and costs 1 KiB besides what it asks for."""
_KIB = 1024


class ConfigError(InvalidArgumentError):
    """A kernel configuration that no card can run; the text holds the limit and the values."""


@dataclass(frozen=True)
class Part:
    """A named part of a kernel's shared memory: ``size`` bytes at a multiple of ``alignment``."""

    name: str
    size: int
    alignment: int


@dataclass(frozen=True)
class SharedPlan:
    """A kernel's ``Shared``, member by member, as a C compiler lays it out; it begins and ends at ``alignment``."""

    parts: tuple[Part, ...]
    alignment: int

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each part begins."""
        found, end = {}, 0
        for part in self.parts:
            found[part.name] = -(-end // part.alignment) * part.alignment
            end = found[part.name] + part.size
        return found

    @property
    def size(self) -> int:
        """Bytes of all."""
        last = self.parts[-1]
        return -(-(self.offsets[last.name] + last.size) // self.alignment) * self.alignment

    def check(self, who: str, arch: str, blocks: int = 1) -> None:
        """Refuse what does not fit ``blocks`` times in a multiprocessor of ``arch``.

        Raises:
            ConfigError: with the limit and every part's bytes.
        """
        limit = SHARED_KIB[arch] * _KIB // blocks - _KIB
        if self.size > limit:
            parts = ", ".join(f"{part.name} {part.size:,}" for part in self.parts if part.size)
            each = f" for each of {blocks} thread blocks" if blocks > 1 else ""
            raise ConfigError(
                f"{who} takes {self.size:,} bytes of shared memory, and {arch} has {limit:,}{each}: {parts}"
            )


def header(title: str, constants: Mapping[str, int | bool], macros: Mapping[str, bool]) -> str:
    """A configuration as the device reads it."""

    def line(name: str, value: int | bool) -> str:
        if isinstance(value, bool):
            return f"constexpr bool {name} = {str(value).lower()};"
        return f"constexpr int {name} = {value};"

    lines = ['#line 1 "config.cuh"', f"// {title}: written by backends/cuda/configs.py"]
    lines += [f"#define {name} {int(value)}" for name, value in macros.items()]
    lines += [line(name, value) for name, value in constants.items()]
    return "\n".join(lines) + "\n"


# ---- packed K and V


@dataclass(frozen=True)
class PackFormat:
    """How K and V lie in tiles; the macros of csrc/pack/pack.cu.

    ``k_lanes``: bits that a number of K takes; ``v_half``: V in FP16, else in E4M3; ``rotate``: K is rotated;
    ``v_tile_means``: V without its means by tile; ``mask``: which keys count. Tiles of 64 keys (mma.sync's) are
    records of K, V and K's scales side by side; those of 128 (wgmma's) lie in an array each.
    """

    tile_keys: int = TILE_KEYS
    k_lanes: int = 8
    v_half: bool = False
    rotate: bool = False
    v_tile_means: bool = False
    mask: MaskForm = "none"

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


def packed_mask(mask: MaskForm) -> MaskForm:
    """What packed K and V know of a mask."""
    return "bits" if mask == "bias" else mask


_PACK_THREADS = 128
"""Of a block (kPackThreads, kMeanThreads)."""


def pack_instance(head_dim: int, dtype: torch.dtype, arch: str, form: PackFormat = WGMMA_FORMAT) -> Instance:
    """The packing kernels for K and V of that type, channels padded to ``head_dim``.

    Raises:
        ConfigError: with the limit and the values.
    """
    _check_channels("pack", head_dim)
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
            *_mask_defines(form.mask),
        ),
        header(
            "pack",
            {"kDim": head_dim},
            {"CLUSTERS": form.has_clusters} | _absent(V_TILE_MEANS=form.v_tile_means) | _mask_macros(form.mask),
        ),
        spill_limit=16 if form.mask == "keys" else 0,  # (of 128 registers, which four blocks a multiprocessor leave)
    )


def smooth_q_instance(head_dim: int, dtype: torch.dtype, arch: str, mask: MaskForm = "none") -> Instance:
    """The kernels that smooth Q takes besides, for Q and K of that type.

    Raises:
        ConfigError: with the limit and the values.
    """
    _check_channels("smooth_q", head_dim)
    return Instance(
        "smooth_q",
        arch,
        (("HEAD_DIM", head_dim), ("INPUT_DTYPE", DTYPE_CODES[dtype]), *_mask_defines(mask)),
        header("smooth_q", {"kDim": head_dim}, _mask_macros(mask)),
    )


def mask_instance(tile_keys: int, arch: str) -> Instance:
    """The kernels that prepare masks, for tiles of so many keys."""
    return Instance("mask", arch, (("TILE_KEYS", tile_keys),), header("mask", {}, _mask_macros("none")))


def sequences_instance(arch: str) -> Instance:
    """The kernel that prepares sequences of different lengths."""
    return Instance("sequences", arch, (), header("sequences", {}, {}))


def _check_channels(who: str, head_dim: int) -> None:
    """Refuse more channels than threads: `pack`, `statistics` and `query_means` give a thread one channel."""
    if head_dim > _PACK_THREADS or head_dim % 32:
        raise ConfigError(
            f"{who} gives {_PACK_THREADS} threads a channel each, in whole warps, not {head_dim} channels"
        )


def _mask_defines(mask: MaskForm) -> tuple[tuple[str, int], ...]:
    switches = {"keys": "KEY_LIST", "bits": "MASK_BITS", "bias": "MASK_BIAS", "sequences": "SEQUENCES"}
    return () if mask == "none" else ((switches[mask], 1),)


def _mask_macros(mask: MaskForm) -> dict[str, bool]:
    """Those of csrc/common/masks.cuh: ``KEYS_UNSEEN``, whether keys that no row sees are left out of statistics;
    ``LISTS_TILES``, whether work tiles have lists of the key tiles that they visit."""
    absent = _absent(
        KEY_LIST=mask == "keys", MASK_BITS=mask == "bits", MASK_BIAS=mask == "bias", SEQUENCES=mask == "sequences"
    )
    lists = {"LISTS_KEYS": mask in ("keys", "bits", "bias"), "LISTS_TILES": mask in ("bits", "bias")}
    return absent | {"KEYS_UNSEEN": mask != "none"} | lists


def _absent(**switches: bool) -> dict[str, bool]:
    """Switches that stand among an instance's macros only if they are set: the others, so that all are defined."""
    return {name: False for name, is_set in switches.items() if not is_set}


# ---- attention_wgmma


@dataclass(frozen=True)
class WgmmaTile:
    """A row of the Hopper kernel's table.

    ``consumers``: warpgroups of 64 query rows in a thread block, beside the producer's. ``stages``: pairs of tiles of K
    and V in flight. Registers a thread: at the launch, and what ``setmaxnreg`` makes of them. ``halves_scores``: P
    takes the place of the half of the scores that it was made of, and the next scores of that half begin when P·V has
    ended, not beside it; what only promotions ask for lies in shared memory.
    """

    consumers: int
    stages: int
    launch_registers: int
    producer_registers: int
    consumer_registers: int
    halves_scores: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block: the consumers and the producer's warpgroup."""
        return 128 * (self.consumers + 1)

    def check(self, who: str) -> None:
        """Refuse registers that do not add up.

        Raises:
            ConfigError: with the limit and the values.
        """
        file, groups = 65536, self.consumers + 1
        launched = self.launch_registers * groups
        wanted = self.producer_registers + self.consumers * self.consumer_registers
        if self.launch_registers * self.threads > file:
            raise ConfigError(
                f"{who}: {self.threads} threads of {self.launch_registers} registers, and there are {file:,}"
            )
        if wanted != launched:  # (setmaxnreg would wait for ever, or leave some unused)
            raise ConfigError(
                f"{who}: setmaxnreg wants {self.producer_registers} + {self.consumers} · {self.consumer_registers} = "
                f"{wanted} registers a lane, and the launch has {self.launch_registers} · {groups} = {launched}"
            )
        for registers in (self.launch_registers, self.producer_registers, self.consumer_registers):
            if registers % 8 or not 24 <= registers <= 256:
                raise ConfigError(f"{who}: {registers} registers; setmaxnreg takes multiples of 8 from 24 to 256")


_WGMMA_TILES = {
    # O changes with every tile, so it lies in registers, which leaves room for two warpgroups
    ("registers", 64): WgmmaTile(2, 4, launch_registers=168, producer_registers=72, consumer_registers=216),
    ("registers", 128): WgmmaTile(2, 3, launch_registers=168, producer_registers=72, consumer_registers=216),
    # O changes seldom, so it lies in shared memory, and a third warpgroup fills the time that a warp's latencies leave;
    # with 64 channels, whose O is half as large, a fourth (of 112 registers S, the sums and P take 98)
    ("shared", 128): WgmmaTile(3, 2, launch_registers=128, producer_registers=80, consumer_registers=144),
    ("shared", 64): WgmmaTile(
        4, 4, launch_registers=96, producer_registers=32, consumer_registers=112, halves_scores=True
    ),
}
"""By where O lies and the padded head dimension."""

_NUDGES: dict[tuple[MaskForm, int], int] = {("keys", 2): 7, ("bias", 2): 3}
"""By mask and warpgroups: kNudges."""
_WORK_BYTES: dict[MaskForm, int] = {"none": 0, "keys": 4, "bits": 4, "bias": 4, "sequences": 8}
"""What a work tile says besides (WorkTile of csrc/hopper/block.cuh)."""
_WGMMA_ROWS = 64
"""Query rows of a warpgroup: wgmma's M."""
_ONES = 8
"""More rows of V, for row sums: wgmma's N goes in eights."""
_MEAN_SLOTS = 16
"""Slots of V's means by tile. A promotion reads those of eight tiles up to the last multiplied, e, whose stage has been
released: the copies are at tile e + stages at most. Where another warpgroup's rows see tiles that these do not, their
stages are passed on before the last promotion: consumers · 64 / 128 ≤ stages tiles. (And what lies in slots that no
tile of the interval has is multiplied with 0, so that it must only be finite.)"""

_TILE_SLOTS = 8
"""Slots of the numbers of the key tiles that a work tile visits: a consumer asks for those of the tile that it works on
and of the next, and the copies are ``stages`` (4 at most) tiles further at most."""


@dataclass(frozen=True)
class WgmmaConfig:
    """What the Hopper attention kernel is compiled for; the macros of csrc/hopper/attention.cu.

    ``dtype``: Q's and the output's (code for all types at once is twice as long, and does not always stay in the
    instruction cache: docs/kernels/hopper.md); ``sums_f16``: P·V in FP16 sums, else in FP32-typed ones;
    ``promotion_keys``: after how many keys they are added to the FP32 output; ``promote_first``: after the first tile,
    too; ``restart``: each interval has its own maximum; ``sum_in_mma``: the row sum is that of the columns of ones;
    ``tile_means``: these hold a tile's row sum each, by which V's means by tile are put back; ``jump``: tiles that jump
    (`RestartedMax`) have intervals of their own; ``mask``: what hides scores.
    """

    head_dim: int
    dtype: torch.dtype
    sums_f16: bool = False
    promotion_keys: int = 128
    promote_first: bool = False
    restart: bool = False
    sum_in_mma: bool = False
    tile_means: bool = False
    jump: bool = False
    mask: MaskForm = "none"

    geometry = MACHINES["sm_90a"].geometry

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: with the limit and the values.
        """
        self.tile.check(str(self))
        self.shared.check(str(self), "sm_90a")
        if not self.sums_f16 and self.promotion_keys != TILE_KEYS:
            raise ConfigError(f"{self}: FP32-typed sums are promoted after {TILE_KEYS} keys, not {self.promotion_keys}")
        if self.promotion_keys % TILE_KEYS and self.promotion_keys != TILE_KEYS // 2:
            raise ConfigError(f"{self}: it promotes after {TILE_KEYS // 2} keys or a multiple of {TILE_KEYS}")
        if self.tile_means:
            interval, rows = self.interval, self.q_rows
            if not (self.output_in_shared and self.sum_in_mma):
                raise ConfigError(f"{self}: means by tile are put back by FP16 row sums of promoted intervals")
            if interval > _ONES:
                raise ConfigError(f"{self}: {interval} tiles an interval, and {_ONES} columns of ones")
            if _ONES + self.tile.stages > _MEAN_SLOTS or rows > self.tile.stages * TILE_KEYS:
                raise ConfigError(f"{self}: {self.tile.stages} stages and {rows} rows: a mean would be overwritten")

    @property
    def tile(self) -> WgmmaTile:
        """Its row of the table.

        Raises:
            ConfigError: there is none.
        """
        key = "shared" if self.output_in_shared else "registers", self.head_dim
        if key not in _WGMMA_TILES:
            rows = ", ".join(f"{dim} with O in {place}" for place, dim in _WGMMA_TILES)
            raise ConfigError(
                f"attention_wgmma has no tile for head dimension {key[1]} with O in {key[0]}, only for {rows}"
            )
        return _WGMMA_TILES[key]

    @property
    def output_in_shared(self) -> bool:
        """Whether O lies in shared memory (OUTPUT_IN_SHARED)."""
        return self.sums_f16 and self.promotion_keys > self.geometry.b_k

    @property
    def splits_channels(self) -> bool:
        """Whether P·V is two products, the second's sums in the first's registers: in FP32 the sums of 128 channels and
        of P would not fit beside O, S and P (SPLITS_CHANNELS)."""
        return not self.sums_f16 and self.head_dim == 128 and self.promotion_keys == TILE_KEYS

    @property
    def interval(self) -> int:
        """Tiles from promotion to promotion (kInterval)."""
        return max(self.promotion_keys // TILE_KEYS, 1)

    @property
    def columns(self) -> int:
        """Columns of a P·V MMA: channels, and those of ones (kColumns)."""
        return self.head_dim // (2 if self.splits_channels else 1) + _ONES * self.sum_in_mma

    @property
    def consumers(self) -> int:
        """Warpgroups of 64 query rows in a thread block (kConsumers)."""
        return self.tile.consumers

    @property
    def q_rows(self) -> int:
        """Query rows of a thread block."""
        return self.consumers * _WGMMA_ROWS

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.tile.threads

    @property
    def shared(self) -> SharedPlan:
        """The kernel's ``Shared``."""
        stages, consumers, dim, rows = self.tile.stages, self.consumers, self.head_dim, self.q_rows
        ones = _ONES * TILE_KEYS if self.sum_in_mma else 0
        takes_work = self.output_in_shared
        parts = (
            Part("k", stages * TILE_KEYS * dim, 1024),
            Part("v", stages * (TILE_KEYS * dim + ones), 1024),
            Part("q", 2 * rows * dim, 1024),
            Part("o", rows * dim * 4 * self.output_in_shared, 16),
            Part("promoted", consumers * 128 * 24 * self.tile.halves_scores, 4),
            Part("seen", consumers * 4 * 8 * 2 * 4 * self.seen_in_shared, 4),
            Part("v_scale", 2 * dim * 4, 4),
            Part("v_mean", 2 * dim * 4, 4),
            Part("tile_means", 2 * _MEAN_SLOTS * 2 * self.mean_pitch * self.tile_means, 16),
            Part("k_scale", stages * 16, 4),
            Part("q_scale", 2 * consumers * 4 * 32, 4),
            Part("mean_logit", 2 * rows * 4, 4),
            Part("k_largest_scale", 8, 4),
            Part("spoilt", 2 * consumers * 32, 1),
            Part("tile_block", 2 * _TILE_SLOTS * 4 * (self.mask in ("bits", "bias")), 4),
            Part("work", 2 * ((36 if takes_work else 20) + _WORK_BYTES[self.mask]), 4),
            Part("barriers", (2 * stages + 4) * 8 + 3 * 8 * takes_work, 8),
        )
        return SharedPlan(tuple(part for part in parts if part.size), 1024)

    @property
    def shared_bytes(self) -> int:
        """Size of the kernel's ``Shared``."""
        return self.shared.size

    @property
    def makes_more(self) -> bool:
        """Whether each tile makes more anew than its factors' bound (MAKES_MORE): means by tile with FP32 outputs,
        which leave from registers, take those of three warpgroups."""
        wants_more = self.dtype == torch.float32 or self.mask in ("bits", "bias")
        return self.tile_means and not self.tile.halves_scores and wants_more

    @property
    def seen_in_shared(self) -> bool:
        """Whether the largest logits seen lie in shared memory: such instances have no register left for what tiles
        that jump ask for (SEEN_IN_SHARED)."""
        return self.jump and self.makes_more

    @property
    def mean_pitch(self) -> int:
        """Means from slot to slot (kMeanPitch): 8 more, so that eight slots' equal chunks lie in different banks."""
        return self.head_dim + 8

    def header(self) -> str:
        """What follows from it, as the device reads it."""
        tile, in_shared, in_two = self.tile, self.output_in_shared, self.splits_channels
        # (Channels in two parts and a mask: for want of a register the assembler serialised one instance or the other.
        # Q's scale is read anew for each tile.)
        reads_scale = tile.halves_scores or (in_two and self.mask in ("bits", "bias"))
        macros = {
            "OUTPUT_IN_SHARED": in_shared,
            # FP32's rows do not fit. (From registers through shared memory they would take registers for addresses, and
            # there are none left: the assembler serialises the MMAs of some instances.)
            "ROWS_THROUGH_SHARED": in_shared and self.dtype != torch.float32,
            # (Two warpgroups have no register left for either: their code became a fifth slower, or the assembler
            # serialised its MMAs. Each of their blocks has every gridDim-th work tile, and all keys.)
            "SPLITS_KEYS": in_shared,
            "TAKES_WORK": in_shared,
            "HALVES_SCORES": tile.halves_scores,
            # Promotions that put means back take registers from three warpgroups: the bound of the tiles' factors is
            # made anew for each tile.
            "MAKES_BOUND": reads_scale or self.tile_means,
            "READS_SCALE": reads_scale,
            "MAKES_MORE": self.makes_more,
            "SEEN_IN_SHARED": self.seen_in_shared,
        } | _absent(TILE_MEANS=self.tile_means, JUMP=self.jump)
        macros |= _mask_macros(self.mask)
        constants: dict[str, int | bool] = {
            "kDim": self.head_dim,
            "kRows": _WGMMA_ROWS,
            "kConsumers": tile.consumers,
            "kStages": tile.stages,
            "kThreads": tile.threads,
            "kProducerRegisters": tile.producer_registers,
            "kConsumerRegisters": tile.consumer_registers,
            "kPromotesHalves": self.promotion_keys < TILE_KEYS,
            "kSplitsChannels": in_two,
            "kTwoParts": self.promotion_keys < TILE_KEYS or in_two,
            "kInterval": self.interval,
            "kOnes": _ONES * self.sum_in_mma,
            "kColumns": self.columns,
            # Eight lanes of two rows of Q have 16 registers of 16-bit channels, which fit in 80 (BF16: a conversion
            # is a shift) but not in 72; FP32 takes twice that.
            "kQueryLanes": 16 if self.head_dim == 128 and (self.dtype != torch.bfloat16 or tile.consumers == 2) else 8,
            # (Timed with two warpgroups: hiding scores last is up to 8 % faster, but with channels in two parts 15 %
            # slower; there, with a restarted maximum, the assembler else lacks a register and serialises the MMAs.)
            "kHidesLast": tile.consumers == 2 and (not in_two or self.restart),
            # where the unit for exponentials is what a tile waits for, some are a polynomial of the FMA units
            "kPolynomial": tile.halves_scores and self.sum_in_mma,
            # (Never executed. With channels in two parts, whatever changes in front of the main loop decides at random
            # whether the assembler serialises the MMAs behind it; found by trying, for all types.)
            "kNudges": _NUDGES.get((self.mask, tile.consumers), 0),
            # (Channels in two parts: to ask whether a tile hides any, and to fetch its bits ahead, there is none left.)
            **({"kTileSlots": _TILE_SLOTS, "kLacksRegisters": in_two} if self.mask in ("bits", "bias") else {}),
            **({"kMeanSlots": _MEAN_SLOTS, "kMeanPitch": self.mean_pitch} if self.tile_means else {}),
            "kSharedBytes": self.shared_bytes,
        }
        return header(str(self), constants, macros)

    def instance(self) -> Instance:
        """Its compilation."""
        sums = "F16" if self.sums_f16 else "F32"
        scores = 64 if self.tile.halves_scores else 128  # keys at a time
        spills = self.mask == "bias" or (
            # (of 64 channels one register, once a work tile)
            self.mask == "bits" and self.tile_means and (self.dtype == torch.float32 or self.head_dim == 64)
        )
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
                *((("JUMP", 1),) if self.jump else ()),
                *_mask_defines(self.mask),
            ),
            self.header(),
            mma=(f"IGMMA.64x{scores}x32.S8.S8", f"QGMMA.64x{self.columns}x32.{sums}.E4M3.E4M3"),
            # The producer of four consumers has 32 registers, and time. (FP32 outputs and bits are one too many for
            # consumers with FP16 sums over many tiles: such inputs are for tests. Biases come eight at a time, for
            # which no consumer has room; they cost more than that in other ways.)
            spill_limit=640 if spills else 384 if self.consumers == 4 else 0,
            spills_anywhere=spills,
        )


# ---- attention_mma

MMA_GEOMETRY = MACHINES["sm_89"].geometry
"""Tiles of `attention_mma`, on every architecture."""

MMA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Architectures that `attention_mma` is compiled for; their machine code runs on later cards of the same generation."""

_FP8_MMA = {"sm_89": "QMMA.16832.{sums}.E4M3.E4M3", "sm_120": "QMMA.16832.{sums}.E4M3.E4M3"}
"""Where FP8 MMAs are the card's own; on sm_90 and sm_100 the compiler makes FP16 ones of them."""
INT4_MMA_ARCHS = ("sm_80", "sm_86", "sm_89")
"""Where INT4 MMAs are the card's own."""


@dataclass(frozen=True)
class MmaTile:
    """A row of mma.sync's table.

    ``groups``: query tiles of 128 rows of a thread block; ``blocks``: thread blocks that a multiprocessor runs, by
    registers: 8 warps of up to 255. ``stages``: of key tiles in shared memory.
    """

    groups: int
    blocks: int
    stages: int = 2  # (the offset of the one is a stage's size less the offset of the other)


_MMA_TILES = {
    ("e4m3", 64): MmaTile(groups=1, blocks=2),
    ("e4m3", 128): MmaTile(groups=1, blocks=2),
    ("fp16", 64): MmaTile(groups=1, blocks=2),
    # V is twice as large: two stages leave room for one thread block on a card with 100 KB, which so has twice the
    # rows
    ("fp16", 128): MmaTile(groups=2, blocks=1),
}
"""By V's format and the padded head dimension."""

_COPY_REACH = 4096
"""Bytes of a tile that a warp copies: what an instruction's offsets of ±2 KB reach."""


@dataclass(frozen=True)
class MmaConfig:
    """What `attention_mma` is compiled for; the macros of csrc/mma/attention.cu.

    ``qk_lanes``: bits that a number of Q and K takes (4-bit numbers may lie in 8-bit lanes); ``v_half``: FP16 P·V, else
    E4M3; ``sums_f16``: in FP16 sums; ``promote``: each tile's sums are added to an FP32 output, else the MMA sums all;
    ``sum_in_mma``: the row sum is taken by an MMA with ones; ``smooth_q``, ``rotate``: what happens to Q first;
    ``mask``: what hides scores.
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
    mask: MaskForm = "none"

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: with the limit and the values.
        """
        self.shared.check(str(self), self.arch, self.tile.blocks)
        of_warp = (self.form.k_bytes(self.head_dim) + self.form.v_bytes(self.head_dim)) // self.warps
        if of_warp > _COPY_REACH or of_warp % 512:
            raise ConfigError(
                f"{self}: a warp copies {of_warp} bytes of a tile, not a multiple of 512 up to {_COPY_REACH}"
            )

    @property
    def tile(self) -> MmaTile:
        """Its row of the table.

        Raises:
            ConfigError: there is none.
        """
        key = "fp16" if self.v_half else "e4m3", self.head_dim
        if key not in _MMA_TILES:
            rows = ", ".join(f"{dim} with {form} V" for form, dim in _MMA_TILES)
            raise ConfigError(f"attention_mma has no tile for head dimension {key[1]} with {key[0]} V, only for {rows}")
        return _MMA_TILES[key]

    @property
    def groups(self) -> int:
        """Query tiles of 128 rows of a thread block (kGroups)."""
        return self.tile.groups

    @property
    def q_rows(self) -> int:
        """Query rows of a thread block."""
        return self.groups * MMA_GEOMETRY.b_q

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.q_rows // MMA_GEOMETRY.warp_rows

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * 32

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
        return PackFormat(MMA_GEOMETRY.b_k, self.qk_lanes, self.v_half, self.rotate, mask=packed_mask(self.mask))

    @property
    def shared(self) -> SharedPlan:
        """The kernel's ``Shared``: stages of tiles, Q, a scratch of the warps' maxima, and which rows are spoilt."""
        stage = self.form.k_bytes(self.head_dim) + self.form.v_bytes(self.head_dim)
        stage += self.groups * MMA_GEOMETRY.b_k * 4 if self.smooth_q else 0
        return SharedPlan(
            (
                Part("stages", self.tile.stages * stage, 4),
                Part("q", self.q_rows * self.head_dim * self.qk_lanes // 8, 1),
                Part("warp_max", self.groups * 16, 4),
                Part("spoilt", self.threads, 1),
            ),
            4,
        )

    @property
    def shared_bytes(self) -> int:
        """Size of the kernel's ``Shared``."""
        return self.shared.size

    def header(self) -> str:
        """What follows from it, as the device reads it."""
        depth, keys = 16 if self.v_half else 32, MMA_GEOMETRY.b_k
        constants: dict[str, int | bool] = {
            "kDim": self.head_dim,
            "kWarpRows": MMA_GEOMETRY.warp_rows,
            "kScaleRows": MMA_GEOMETRY.b_q,
            "kGroups": self.groups,
            "kWarps": self.warps,
            "kRows": self.q_rows,
            "kThreads": self.threads,
            "kBlocks": self.tile.blocks,
            "kStages": self.tile.stages,
            "kQkRowBytes": self.head_dim * self.qk_lanes // 8,
            "kVRowBytes": 2 * self.head_dim if self.v_half else keys,
            "kKTileBytes": self.form.k_bytes(self.head_dim),
            "kVTileBytes": self.form.v_bytes(self.head_dim),
            "kPvDepth": depth,
            "kPvSteps": keys // depth,
            # Left alone, the assembler lets P·V run ahead of the additions to O, or of the exponentials, and then lacks
            # registers. It must not look further than fences (about a clock each): every so many channels, and between
            # the phases.
            "kFencedChannels": 32 if self.v_half or not self.sums_f16 else self.head_dim,
            "kFencedPhases": self.v_half and self.sums_f16,
            "kSharedBytes": self.shared_bytes,
        }
        return header(str(self), constants, _mask_macros(self.mask))

    def instance(self) -> Instance:
        """Its compilation."""
        lanes = "16864.S4.S4" if self.qk_lanes == 4 and self.arch in INT4_MMA_ARCHS else "16832.S8.S8"
        sums = "F16" if self.sums_f16 else "F32"
        lists_tiles = self.mask in ("bits", "bias")
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
                *_mask_defines(self.mask),
            ),
            self.header(),
            mma=(f"IMMA.{lanes}", pv),
            # sm_90 and sm_100 have no FP8 and INT4 MMAs: unpacking operands for others takes registers, and the kernel
            # runs there to be tested, or where nothing else does. With bits and biases all tiles take the exact path,
            # for which some instances lack some registers of 255.
            spill_limit=1024 if self.arch in ("sm_90", "sm_100") else 256 if lists_tiles else 0,
            spills_anywhere=self.arch in ("sm_90", "sm_100") or lists_tiles,
        )

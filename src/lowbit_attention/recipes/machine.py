"""The two things besides the recipe that make the numbers: the kernel's tiles and the machine's accumulators.

The recipe is the method. The *geometry* decides who shares a scale, what the tile mean of Q is and where tile
maxima are taken. The *accumulator model* is what the tensor core does to a sum. A kernel publishes both, and the
reference is run with both when that kernel is judged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidArgumentError

Fidelity = Literal["step", "instruction"]
"""``step``: one matrix product per instruction depth, then the running sum is truncated or rounded (fast, the
default). ``instruction``: every product of an instruction is aligned and truncated on its own, as the card does."""


@dataclass(frozen=True)
class Geometry:
    """Tiles of a kernel, in tokens.

    ``b_q`` query rows and ``b_k`` keys a tile; one warp holds ``warp_rows`` of the query rows.
    """

    b_q: int = 128
    b_k: int = 64
    warp_rows: int = 32

    def __post_init__(self) -> None:
        if self.warp_rows < 16 or self.warp_rows % 16:
            raise InvalidArgumentError(f"warp_rows={self.warp_rows}: an MMA has 16 rows, so a positive multiple of 16")
        if self.b_q < 1 or self.b_q % self.warp_rows:
            raise InvalidArgumentError(f"b_q={self.b_q} is not a positive multiple of warp_rows={self.warp_rows}")
        if self.b_k < 32 or self.b_k % 32:
            raise InvalidArgumentError(f"b_k={self.b_k}: an 8-bit MMA is 32 keys deep, so a positive multiple of 32")

    def __str__(self) -> str:
        return f"{self.b_q}×{self.b_k}, {self.warp_rows} rows a warp"


@dataclass(frozen=True)
class AccumulatorModel:
    """What the tensor core does to the sum of an FP8 P·V product.

    ``fp8_align_bits``: inside one instruction, the accumulator and all products are truncated toward zero at this many
    bits below the largest exponent among them; a product's exponent is the sum of its operands' exponents.
    ``f32_fraction_bits``: fraction bits that an FP32-typed accumulator keeps after each instruction, the rest being
    truncated toward zero; ``None`` means a true FP32 accumulator.
    ``fp8_by_fp16``: the instruction is not native: two FP16 MMAs sum its products from zero, and an ordinary addition
    adds that to the accumulator.
    ``lossless``: sums lose nothing at all; what is left is the rounding of the operands.
    """

    name: str
    provenance: str
    fp8_align_bits: int | None = None
    f32_fraction_bits: int | None = None
    fp8_by_fp16: bool = False
    lossless: bool = False

    def __str__(self) -> str:
        return self.name


ADA_FP22 = AccumulatorModel(
    "ada_fp22",
    "the papers' description (1 + 8 + 13 bits, low bits truncated), taken to work as sm90_wgmma; not probed on a card",
    fp8_align_bits=13,
    f32_fraction_bits=13,
)
SM90_WGMMA = AccumulatorModel(
    "sm90_wgmma",
    "an H200's wgmma e4m3 to f16 and f32, bit for bit, chains included (tests/cpu/reference/test_h200.py)",
    fp8_align_bits=13,
    f32_fraction_bits=13,
)
SM90_MMA = AccumulatorModel(
    "sm90_mma",
    "an H200's mma.sync e4m3 to f16 and f32, bit for bit, chains included (tests/cpu/reference/test_h200.py)",
    fp8_by_fp16=True,
)
EXACT_SUMS = AccumulatorModel("exact", "sums in float64: only the operands are rounded", lossless=True)

ACCUMULATOR_MODELS: dict[str, AccumulatorModel] = {m.name: m for m in (ADA_FP22, SM90_WGMMA, SM90_MMA, EXACT_SUMS)}


@dataclass(frozen=True)
class Machine:
    """Whose numbers an emulation gives: a geometry, an accumulator model and how faithfully it is followed.

    ``row_sum_columns``: how many columns of ones beside V share the keys among them where the MMA adds up P (see
    `row_sum_column`). ``polynomial_exp2``: with head dimensions up to 64 and FP16 sums over several key tiles, P of
    some keys (`polynomial_keys`) is a polynomial's (reference/softmax.py) instead of 2^x rounded once.
    """

    name: str
    geometry: Geometry = Geometry()
    accumulators: AccumulatorModel = ADA_FP22
    fidelity: Fidelity = "step"
    row_sum_columns: Literal[1, 8] = 1
    polynomial_exp2: bool = False

    def __post_init__(self) -> None:
        if self.row_sum_columns not in (1, 8):
            raise InvalidArgumentError(f"row_sum_columns={self.row_sum_columns}: 1, or 8 (an MMA's narrowest)")
        if self.fidelity not in ("step", "instruction"):
            raise InvalidArgumentError(f"fidelity={self.fidelity!r} is neither 'step' nor 'instruction'")

    def __str__(self) -> str:
        return f"{self.name} ({self.geometry}; {self.accumulators} accumulators, {self.fidelity} fidelity)"


def row_sum_column(keys: Tensor, columns: int) -> Tensor:
    """Which of a machine's columns of ones counts a key, int64 like ``keys`` (numbers of keys).

    A kernel's P·V may have ``columns`` times the ones it needs, because an MMA has at least 8 columns. With the keys
    shared among them every sum is an eighth, and so is what its truncation takes from each P. Key k goes to the column
    of its half of 16 and of the thread of a quad whose registers hold it.
    """
    return keys % 32 // 16 * 4 + keys % 8 // 2 if columns == 8 else torch.zeros_like(keys)


def polynomial_keys(keys: Tensor) -> Tensor:
    """Which keys' exponentials a machine with ``polynomial_exp2`` approximates, bool like ``keys`` (numbers in a tile).

    The unit for exponentials is what Hopper waits for at head dimension 64; the FMA units take a quarter off it.
    """
    return keys % 64 // 16 == 3


_ADA_TILES = Geometry(b_q=128, b_k=64, warp_rows=32)  # the papers' tiles, four warps of 32 rows
_HOPPER_TILES = Geometry(b_q=64, b_k=128, warp_rows=16)  # one warpgroup: 4 warps × 16 rows of a wgmma.m64

MACHINES: dict[str, Machine] = {
    m.name: m
    for m in (
        Machine("sm_80", _ADA_TILES, SM90_MMA),  # no FP8 here: where a recipe wants it, FP16 MMAs do it as on sm_90
        Machine("sm_86", _ADA_TILES, SM90_MMA),
        Machine("sm_89", _ADA_TILES, ADA_FP22),
        Machine("sm_90a", _HOPPER_TILES, SM90_WGMMA, row_sum_columns=8, polynomial_exp2=True),
        Machine("sm_120a", _ADA_TILES, SM90_MMA),  # not probed; its FP32 sums are true FP32, as these are
    )
}
DEFAULT_MACHINE = MACHINES["sm_89"]


def resolve_machine(like: str | Machine | None, fidelity: Fidelity | None = None) -> Machine:
    """The machine that ``like`` names (``"sm_89"``, ``"sm_90a"``, …), `DEFAULT_MACHINE` for ``None``."""
    if like is None:
        machine = DEFAULT_MACHINE
    elif isinstance(like, Machine):
        machine = like
    elif isinstance(like, str) and like in MACHINES:
        machine = MACHINES[like]
    else:
        raise InvalidArgumentError(f"like={like!r} names no machine; known: {', '.join(MACHINES)}")
    return machine if fidelity is None else replace(machine, fidelity=fidelity)

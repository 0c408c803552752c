"""Sums as the tensor cores make them.

The probes of an H200 are repeated case by case (random operands: test_h200.py). An oracle in exact rational arithmetic
then follows the model in words: align the accumulator and the instruction's products (a product's
exponent is the sum of its operands') to the largest exponent among them, truncate each toward zero at 2^(e_max − 13),
add exactly, and keep 13 fraction bits (f32) or round to FP16 (ties to even). An emulated mma.sync is two FP16 MMAs (25
bits, 23 fraction bits) and an addition.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lowbit_attention.recipes.machine import ADA_FP22, EXACT_SUMS, SM90_MMA, SM90_WGMMA, AccumulatorModel
from lowbit_attention.reference.accumulate import accumulate, round_to_accumulator

WGMMA_F16, WGMMA_F32 = (SM90_WGMMA, "fp8_f16"), (SM90_WGMMA, "fp8_f32")
MMA_F16, MMA_F32 = (SM90_MMA, "fp8_f16"), (SM90_MMA, "fp8_f32")
MACHINES = [WGMMA_F16, WGMMA_F32, MMA_F16, MMA_F32]

# D, the products, and what wgmma→f16, wgmma→f32, mma.sync→f16 and mma.sync→f32 gave; None: not probed
PROBES = [
    (1024, [0.75], 1025, 1024.75, 1025, 1024.75),
    (1024, [0.5], 1024, 1024.5, 1024, 1024.5),
    (1025, [0.5], 1026, 1025.5, 1026, 1025.5),
    (1024, [-0.25], 1024, 1023.75, 1024, 1023.75),
    (-1024, [-0.75], -1025, -1024.75, -1025, -1024.75),
    (1024, 32 * [2**-5], 1024, 1024, 1025, 1025),
    (128, [2**-6], 128, 128.015625, 128, 128.015625),
    (256, [2**-6], 256, 256, 256, 256.015625),
    (256, 8 * [2**-7], 256, 256, 256, 256.0625),
    (256, [-(2**-6)], 256, 256, 256, 255.984375),
    (-256, 3 * [-(2**-6)], -256, -256, -256, -256.046875),
    (0, [256] + 31 * [2**-6], 256, 256, 256.5, 256.484375),
    (1 + 2**-13, [], None, 1 + 2**-13, None, 1 + 2**-13),
    (1 + 2**-14, [], None, 1, None, 1 + 2**-14),
    (1.9999999, [], None, 1.9998779296875, None, float(np.float32(1.9999999))),
]
PROBE_CASES = [
    pytest.param(d, products, machine, expected, id=f"{machine[0]}-{machine[1]}-{d:g}+{len(products)}x{products[-1:]}")
    for d, products, *results in PROBES
    for machine, expected in zip(MACHINES, results, strict=True)
    if expected is not None
]


@pytest.mark.parametrize(("d", "products", "machine", "expected"), PROBE_CASES)
@pytest.mark.parametrize("reverse", [False, True], ids=["first", "last"])
def test_probes_of_the_card(
    d: float, products: list[float], machine: tuple[AccumulatorModel, str], expected: float, reverse: bool
) -> None:
    model, kind = machine
    row = products + (32 - len(products)) * [0.0]
    p = torch.tensor([[row[::-1] if reverse else row]])
    acc = torch.full((1, 1, 1), float(d))
    accumulate(acc, p, torch.ones(1, 32, 1), kind, model, "instruction")
    assert acc.item() == expected


def exponent(x: Fraction) -> int:
    """e with 2^e ≤ |x| < 2^(e + 1); x is a binary number of a few bits, so its float is exact."""
    assert Fraction(float(x)) == x
    return math.frexp(float(x))[1] - 1


def toward_zero(x: Fraction, quantum: Fraction) -> Fraction:
    return math.trunc(x / quantum) * quantum


def to_fp16(x: Fraction) -> Fraction:
    """Nearest FP16 number, ties to even (Python rounds fractions that way); no overflow in these tests."""
    if x == 0:
        return x
    quantum = Fraction(2) ** (max(exponent(x), -14) - 10)
    assert abs(x) < 65504
    return round(x / quantum) * quantum


def to_fp32(x: Fraction) -> Fraction:
    if x == 0:
        return x
    quantum = Fraction(2) ** (exponent(x) - 23)
    return round(x / quantum) * quantum


Pairs = list[tuple[Fraction, Fraction]]


def aligned(d: Fraction, pairs: Pairs, bits: int, f16: bool, kept: int) -> Fraction:
    """One MMA, aligned at ``bits`` below the largest exponent; keeps ``kept`` fraction bits or rounds to FP16."""
    terms = [(exponent(a) + exponent(b), a * b) for a, b in pairs if a * b]  # normal numbers: no subnormals here
    terms += [(exponent(d), d)] if d else []
    if not terms:
        return Fraction(0)
    quantum = Fraction(2) ** (max(e for e, _ in terms) - bits)
    total = sum((toward_zero(t, quantum) for _, t in terms), Fraction(0))
    if f16:
        return to_fp16(total)
    return toward_zero(total, Fraction(2) ** (exponent(total) - kept)) if total else total


def one_instruction(d: Fraction, pairs: Pairs, kind: str, model: AccumulatorModel) -> Fraction:
    f16 = kind != "fp8_f32"
    if kind == "fp16":
        return aligned(d, pairs, 25, f16, 23)
    if model is not SM90_MMA:
        return aligned(d, pairs, 13, f16, 13)
    first = aligned(Fraction(0), [x for n, x in enumerate(pairs) if n % 4 in (0, 1)], 25, f16, 23)
    both = aligned(first, [x for n, x in enumerate(pairs) if n % 4 in (2, 3)], 25, f16, 23)
    return to_fp16(d + both) if f16 else to_fp32(d + both)


def oracle(
    acc: torch.Tensor, p: torch.Tensor, v: torch.Tensor, kind: str, model: AccumulatorModel, depth: int
) -> list[float]:
    out = []
    for s, row, column in np.ndindex(*acc.shape):
        total = Fraction(acc[s, row, column].item())
        pairs = [(Fraction(a), Fraction(b)) for a, b in zip(p[s, row].tolist(), v[s, :, column].tolist(), strict=True)]
        for start in range(0, len(pairs), depth):
            total = one_instruction(total, pairs[start : start + depth], kind, model)
        out.append(float(total))
    return out


def e4m3_numbers(shape: tuple[int, ...], exponents: tuple[int, int], generator: np.random.Generator) -> torch.Tensor:
    """±(8…15) · 2^e: E4M3 numbers of any sign whose exponents spread over the given range; some are zero."""
    mantissa = generator.integers(8, 16, shape) * generator.choice([-1, 0, 1, 1], shape)
    return torch.from_numpy(np.ldexp(mantissa.astype(np.float32), generator.integers(*exponents, shape)))


@pytest.mark.parametrize("keys", [32, 96, 40, 33, 34], ids=["one", "chain", "ragged", "one more", "two more"])
@pytest.mark.parametrize("exponents", [(-2, 1), (-6, 3)], ids=["narrow", "wide"])
@pytest.mark.parametrize("machine", [*MACHINES, (ADA_FP22, "fp8_f32")], ids=lambda m: f"{m[0]}-{m[1]}")
def test_instruction_fidelity_is_the_model_in_rational_arithmetic(
    machine: tuple[AccumulatorModel, str], exponents: tuple[int, int], keys: int
) -> None:
    model, kind = machine
    generator = np.random.default_rng(keys)
    p, v = e4m3_numbers((2, 3, keys), exponents, generator), e4m3_numbers((2, keys, 4), (-6, -3), generator)
    acc = torch.from_numpy(generator.integers(-512, 513, (2, 3, 4)).astype(np.float32))
    expected = oracle(acc, p, v, kind, model, 32)
    accumulate(acc, p, v, kind, model, "instruction")
    assert acc.flatten().tolist() == expected


@pytest.mark.parametrize("fidelity", ["step", "instruction"])
@pytest.mark.parametrize("model", [SM90_WGMMA, SM90_MMA], ids=str)
def test_fp16_mma_rounds_to_fp16_after_every_16_keys(model: AccumulatorModel, fidelity: str) -> None:
    generator = np.random.default_rng(0)
    p = torch.from_numpy(generator.integers(0, 1025, (1, 4, 48)) / 1024).float()  # FP16 numbers
    v = torch.from_numpy(generator.integers(-64, 65, (1, 48, 5)) / 16).float()
    acc = torch.zeros(1, 4, 5)  # sums are multiples of 2^-14 below 2^8: exact in float32 before they are rounded
    expected = oracle(acc, p, v, "fp16", model, 16)
    accumulate(acc, p, v, "fp16", model, fidelity)
    assert acc.flatten().tolist() == expected
    assert expected != (p.double() @ v.double()).flatten().tolist()  # there was something to round


@pytest.mark.parametrize(
    ("model", "kind", "expected"),
    [
        (SM90_WGMMA, "fp8_f32", 1 + 2**-13),  # 1 + 3·2^-14, truncated
        (SM90_WGMMA, "fp8_f16", 1.0),  # rounded to FP16
        (SM90_MMA, "fp8_f32", 1 + 3 * 2**-14),
    ],
    ids=str,
)
def test_step_fidelity_adds_first_and_loses_then(model: AccumulatorModel, kind: str, expected: float) -> None:
    acc = torch.ones(1, 1, 1)
    p, v = torch.full((1, 1, 32), 2.0**-9), torch.full((1, 32, 1), 3 * 2.0**-10)  # 32 · 3 · 2^-19 = 3 · 2^-14
    accumulate(acc, p, v, kind, model, "step")
    assert acc.item() == expected


@pytest.mark.parametrize("machine", [WGMMA_F32, WGMMA_F16], ids=lambda m: f"{m[0]}-{m[1]}")
def test_step_is_close_to_instruction_on_ordinary_inputs(machine: tuple[AccumulatorModel, str]) -> None:
    model, kind = machine
    generator = np.random.default_rng(3)
    p, v = e4m3_numbers((2, 16, 128), (-4, 1), generator).abs(), e4m3_numbers((2, 128, 8), (-4, -2), generator).abs()
    acc = {}
    for fidelity in ("step", "instruction"):
        acc[fidelity] = torch.zeros(2, 16, 8)
        accumulate(acc[fidelity], p, v, kind, model, fidelity)
    # All terms are positive, so no exponent exceeds that of the final sum S. Each of the 4 instructions truncates 33
    # terms by less than 2^(e − 13) ≤ S · 2^-13 and each fidelity's result moves by at most 2^-13 (f32) or 2^-11 (f16)
    # of S; float32's own rounding inside the step is below 2^-18 of S.
    bound = 4 * (33 * 2**-13 + 2 * (2**-13 if kind == "fp8_f32" else 2**-11) + 2**-18)
    difference = (acc["step"] - acc["instruction"]).abs()
    assert (difference <= bound * acc["step"]).all()
    assert difference.any(), "the two fidelities never differed: nothing was compared"
    exact = p.double() @ v.double()
    if kind == "fp8_f32":  # truncation only ever loses here, and the instruction loses more
        assert (acc["instruction"] <= acc["step"]).all()
        assert (acc["step"] <= exact).all()


@pytest.mark.parametrize("fidelity", ["step", "instruction"])
def test_integer_sums_are_exact_up_to_the_largest_of_512_keys(fidelity: str) -> None:
    generator = np.random.default_rng(4)
    p, v = generator.integers(0, 256, (2, 3, 512)), generator.integers(-127, 128, (2, 512, 4))
    p[0, 0], v[0, :, 0] = 255, 127  # 512 · 255 · 127 = 16 581 120 < 2^24
    p[0, 0, 7], v[0, 7, 0] = 1, 1  # and an odd sum
    start = generator.integers(-1000, 1000, (2, 3, 4))
    acc = torch.from_numpy(start.astype(np.float32))
    accumulate(acc, torch.from_numpy(p).float(), torch.from_numpy(v).float(), "int32", SM90_WGMMA, fidelity)
    np.testing.assert_array_equal(acc.numpy(), start + p @ v)


@pytest.mark.parametrize("model", [ADA_FP22, SM90_WGMMA, SM90_MMA], ids=str)
def test_fp32_sums_keep_all_24_bits(model: AccumulatorModel) -> None:
    acc = torch.full((1, 1, 1), 2.0**23)
    accumulate(acc, torch.ones(1, 1, 33), torch.ones(1, 33, 1), "fp32", model, "instruction")
    assert acc.item() == 2**23 + 33


@pytest.mark.parametrize("kind", ["fp32", "fp8_f32", "fp8_f16", "fp16", "int32"])
@pytest.mark.parametrize("fidelity", ["step", "instruction"])
def test_the_lossless_model_loses_nothing(kind: str, fidelity: str) -> None:
    acc = torch.full((1, 1, 1), 2.0**20, dtype=torch.float64)
    p, v = torch.full((1, 1, 64), 2.0**-9), torch.full((1, 64, 1), 1.125 * 2.0**-9)
    accumulate(acc, p, v, kind, EXACT_SUMS, fidelity)
    assert acc.item() == 2**20 + 64 * 1.125 * 2**-18  # 42 bits: float64 holds it, float32 does not


@pytest.mark.parametrize("fidelity", ["step", "instruction"])
@pytest.mark.parametrize("kind", ["fp8_f32", "fp8_f16", "fp16", "fp32", "int32"])
def test_only_the_given_rows_are_written_and_the_operands_are_not(kind: str, fidelity: str) -> None:
    whole = torch.full((2, 6, 3), 5.0)
    p, v = torch.ones(2, 2, 64), torch.full((2, 64, 3), 2.0)
    assert accumulate(whole[:, 2:4], p, v, kind, SM90_WGMMA, fidelity) is None
    assert (whole[:, 2:4] == 5 + 64 * 2).all()
    assert (whole[:, [0, 1, 4, 5]] == 5).all()
    assert (p == 1).all()
    assert (v == 2).all()


@pytest.mark.parametrize(
    ("kind", "model", "expected"),
    [
        ("fp8_f16", SM90_WGMMA, 1.0),
        ("fp16", SM90_MMA, 1.0),
        ("fp8_f32", SM90_WGMMA, 1 + 2**-12),
        ("fp32", ADA_FP22, 1 + 2**-12),
        ("fp8_f16", EXACT_SUMS, 1 + 2**-12),
    ],
)
def test_a_rescaled_sum_is_rounded_only_in_fp16_registers(kind: str, model: AccumulatorModel, expected: float) -> None:
    assert round_to_accumulator(torch.tensor(1 + 2**-12), kind, model).item() == expected

"""The number formats against two independent oracles.

Every code of E4M3, E5M2 and FP16 is built here from the format's definition (sign, exponent, mantissa) and compared
with ml_dtypes, torch and numpy. Rounding is then judged by a search in that table: nearest value, ties to the even
code, at every code, every midpoint and both float32 neighbours of every midpoint. No rounding arithmetic is shared
with the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch

from lowbit_attention.recipes import formats


@dataclass(frozen=True)
class Format:
    name: str
    rounds: Callable[[torch.Tensor], torch.Tensor]
    exponent_bits: int
    mantissa_bits: int
    largest: float
    dtypes: tuple[object, ...]

    def table(self) -> np.ndarray:
        """All finite values ≥ 0 in the order of their codes, float64; the index of a value is its code."""
        bias = 2 ** (self.exponent_bits - 1) - 1
        values = []
        for code in range(2 ** (self.exponent_bits + self.mantissa_bits)):
            exponent, mantissa = divmod(code, 2**self.mantissa_bits)
            if exponent == 0:
                value = math.ldexp(mantissa, 1 - bias - self.mantissa_bits)
            else:
                value = math.ldexp(2**self.mantissa_bits + mantissa, exponent - bias - self.mantissa_bits)
            values.append(value)
        return np.array([v for v in values if v <= self.largest])


FORMATS = [
    Format("e4m3", formats.round_e4m3, 4, 3, 448.0, (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn)),
    Format("e5m2", formats.round_e5m2, 5, 2, 57344.0, (ml_dtypes.float8_e5m2, torch.float8_e5m2)),
    Format("fp16", formats.round_fp16, 5, 10, 65504.0, (np.float16, torch.float16)),
]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)


def nearest_even(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The table's nearest value to each |x| (ties to the even code) with x's sign; saturates at the last value."""
    magnitude = np.minimum(np.abs(x.astype(np.float64)), table[-1])
    above = np.searchsorted(table, magnitude).clip(1, len(table) - 1)
    below = above - 1
    to_above, to_below = np.abs(table[above] - magnitude), np.abs(magnitude - table[below])  # exact in float64
    code = np.where(to_above < to_below, above, below)
    code = np.where(to_above == to_below, np.where(above % 2 == 0, above, below), code)
    return np.copysign(table[code], x)


def rounded(fmt: Format, x: np.ndarray) -> np.ndarray:
    assert x.dtype == np.float32
    return fmt.rounds(torch.from_numpy(x.copy())).numpy()


@each_format
def test_tables_are_the_formats_of_two_other_libraries(fmt: Format) -> None:
    table = fmt.table()
    numpy_dtype, torch_dtype = fmt.dtypes
    storage = np.uint16 if fmt.name == "fp16" else np.uint8
    codes = np.arange(len(table), dtype=storage)
    np.testing.assert_array_equal(codes.view(numpy_dtype).astype(np.float64), table)
    by_torch = torch.from_numpy(codes.copy()).view(torch_dtype).double().numpy()
    np.testing.assert_array_equal(by_torch, table)
    # the next code is no larger finite number: the table is complete
    after = np.array([len(table)], dtype=storage).view(numpy_dtype).astype(np.float64)
    assert not np.isfinite(after).any()
    assert table[-1] == fmt.largest


@each_format
def test_every_code_is_kept(fmt: Format) -> None:
    values = fmt.table().astype(np.float32)
    np.testing.assert_array_equal(rounded(fmt, values), values)
    np.testing.assert_array_equal(rounded(fmt, -values), -values)


@each_format
@pytest.mark.parametrize("sign", [1, -1])
def test_midpoints_go_to_the_even_code_and_their_neighbours_to_the_nearer(fmt: Format, sign: int) -> None:
    table = fmt.table()
    middle = ((table[:-1] + table[1:]) / 2).astype(np.float32)
    np.testing.assert_array_equal(middle.astype(np.float64) * 2, table[:-1] + table[1:])  # float32 holds midpoints
    codes = np.arange(len(middle))
    even = np.where(codes % 2 == 0, table[:-1], table[1:])
    np.testing.assert_array_equal(rounded(fmt, sign * middle), sign * even)
    np.testing.assert_array_equal(rounded(fmt, sign * np.nextafter(middle, np.float32(0))), sign * table[:-1])
    np.testing.assert_array_equal(rounded(fmt, sign * np.nextafter(middle, np.float32(np.inf))), sign * table[1:])


@each_format
def test_any_float32_goes_to_the_nearest(fmt: Format) -> None:
    x = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(rounded(fmt, x), nearest_even(x, fmt.table()))


@each_format
def test_ordinary_numbers_agree_with_other_libraries_casts(fmt: Format) -> None:
    generator = np.random.default_rng(0)
    smallest = fmt.table()[1]
    exponents = generator.uniform(math.log2(smallest) - 2, math.log2(fmt.largest), 20000)
    x = (generator.choice([-1, 1], 20000) * 2.0**exponents).astype(np.float32)
    numpy_dtype, torch_dtype = fmt.dtypes
    ours = rounded(fmt, x)
    np.testing.assert_array_equal(ours, x.astype(numpy_dtype).astype(np.float32))
    np.testing.assert_array_equal(ours, torch.from_numpy(x).to(torch_dtype).float().numpy())


@each_format
@pytest.mark.parametrize("factor", [1 + 2**-23, 1.04, 1.2, 2.0, 1e30, math.inf])
def test_large_numbers_saturate(fmt: Format, factor: float) -> None:
    x = np.array([fmt.largest * factor, -fmt.largest * factor], dtype=np.float32)
    assert np.abs(x).min() > fmt.largest
    np.testing.assert_array_equal(rounded(fmt, x), [fmt.largest, -fmt.largest])


@each_format
def test_nan_stays_nan_and_zero_zero(fmt: Format) -> None:
    payloads = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF], dtype=np.uint32).view(np.float32)
    assert np.isnan(rounded(fmt, payloads)).all()
    np.testing.assert_array_equal(rounded(fmt, np.array([0.0, -0.0, 1e-30, -1e-45], dtype=np.float32)), [0] * 4)


@each_format
def test_the_input_is_not_written_to(fmt: Format) -> None:
    x = torch.tensor([1.01, 1e9, math.nan])
    before = x.clone()
    fmt.rounds(x)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


# Worked by hand: halves go to the even integer, the ends saturate.
INTEGER_CASES = [
    (-1e9, -127),
    (-127.5, -127),
    (-126.5, -126),
    (-2.5, -2),
    (-1.5, -2),
    (-0.5, 0),
    (0.5, 0),
    (np.nextafter(np.float32(0.5), np.float32(1)), 1),
    (1.5, 2),
    (2.5, 2),
    (3.5, 4),
    (np.nextafter(np.float32(3.5), np.float32(0)), 3),
    (125.5, 126),
    (126.5, 126),
    (127.49, 127),
    (math.inf, 127),
]


@pytest.mark.parametrize(("x", "expected"), INTEGER_CASES)
def test_int8_rounds_half_to_even_and_clamps(x: float, expected: int) -> None:
    assert formats.round_int(torch.tensor([x], dtype=torch.float32), 127).item() == expected


@pytest.mark.parametrize(("largest", "smallest"), [(127, None), (7, None), (255, 0)], ids=["int8", "int4", "uint8"])
def test_integers_at_every_quarter(largest: int, smallest: int | None) -> None:
    low = -largest if smallest is None else smallest
    quarters = range(-4 * largest - 40, 4 * largest + 41)
    # Python's round() of a multiple of a quarter is exact and half to even
    expected = [min(max(round(i / 4), low), largest) for i in quarters]
    x = torch.tensor([i / 4 for i in quarters])
    assert formats.round_int(x, largest, smallest).tolist() == expected


def test_integers_keep_nan() -> None:
    assert formats.round_int(torch.tensor([math.nan]), 7).isnan().all()


def truncated(value: float, bits: int) -> float:
    """``value`` without all but the first ``bits`` of its fraction: by frexp, toward zero."""
    exponent = math.frexp(value)[1]
    exponent = max(exponent, -125)  # float32's subnormals share the exponent of the smallest normal number
    quantum = math.ldexp(1.0, exponent - 1 - bits)
    return math.trunc(value / quantum) * quantum


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (1 + 2**-13, 1 + 2**-13),
        (1 + 2**-14, 1.0),
        (1 + 2**-13 + 2**-14, 1 + 2**-13),
        (1.9999999, 2 - 2**-13),
        (256 + 2**-6, 256.0),
        (256 + 2**-5, 256 + 2**-5),
        (0.0, 0.0),
        (math.inf, math.inf),
    ],
)
def test_fp22_truncates_toward_zero(x: float, expected: float, sign: int) -> None:
    assert formats.truncate_fraction(torch.tensor([sign * x]), 13).item() == sign * expected


@pytest.mark.parametrize("bits", [10, 13, 22])
def test_truncation_of_any_number(bits: int) -> None:
    generator = np.random.default_rng(1)
    patterns = generator.integers(0, 2**32, 4000, dtype=np.uint32).view(np.float32)
    x = patterns[np.isfinite(patterns)]
    got = formats.truncate_fraction(torch.from_numpy(x.copy()), bits).numpy()
    np.testing.assert_array_equal(got, [truncated(float(value), bits) for value in x])


def test_truncation_works_in_place_on_a_part_of_a_tensor_and_keeps_nan() -> None:
    whole = torch.full((2, 4, 3), 1 + 2**-20)
    whole[0, 1, 2] = math.nan
    returned = formats.truncate_fraction(whole[:, 1:3], 13)
    assert returned.data_ptr() == whole[:, 1:3].data_ptr()
    assert whole[0, 1, 2].isnan()
    assert (whole[1, 1:3] == 1).all()
    assert (whole[:, [0, 3]] == 1 + 2**-20).all()

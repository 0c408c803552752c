"""The metrics against numbers worked out by hand, and what they are where a formula divides by zero."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit_attention import InvalidArgumentError, Metrics, compare


def test_by_hand() -> None:
    """O = (3, 4, 0, 0), O' = (3, 2, 1, −1): Σ O·O' = 17, norms 5 and √15, differences 0, 2, 1, 1."""
    m = compare(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [1.0, -1.0]]))
    assert m.cos_sim == pytest.approx(17 / (5 * math.sqrt(15)), rel=1e-14)
    assert m.l1 == pytest.approx(4 / 7, rel=1e-14)
    assert m.rmse == pytest.approx(math.sqrt(6 / 4), rel=1e-14)
    assert m.max_error == 2.0
    assert m.score == pytest.approx(17 / (5 * math.sqrt(15)) * (3 / 7), rel=1e-14)


def test_as_dict_holds_the_four_numbers() -> None:
    assert Metrics(0.5, 0.25, 2.0, 3.0).as_dict() == {"cos_sim": 0.5, "l1": 0.25, "rmse": 2.0, "max_error": 3.0}


def test_l1_is_relative_to_the_exact_output() -> None:
    """So the arguments are not interchangeable: 1 / 2 against 1 / 3."""
    a, b = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    assert compare(a, b).l1 == 0.5
    assert compare(b, a).l1 == pytest.approx(1 / 3, rel=1e-14)


def test_equal_and_opposite() -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    same = compare(x, x)
    assert same.cos_sim == pytest.approx(1.0, rel=1e-14)
    assert (same.l1, same.rmse, same.max_error) == (0.0, 0.0, 0.0)
    opposite = compare(x, -x)
    assert opposite.cos_sim == pytest.approx(-1.0, rel=1e-14)
    assert opposite.l1 == pytest.approx(2.0, rel=1e-14)


@pytest.mark.parametrize("mask", [torch.tensor([[True, False, True]]), torch.tensor([True, False, True])])
def test_rows_that_do_not_count(mask: torch.Tensor) -> None:
    exact, other = torch.ones(2, 3, 2), torch.ones(2, 3, 2)
    other[:, 1] = 100.0
    other[0, 0, 0] = 2.0
    counted = compare(exact, other, rows=mask)
    assert counted.max_error == 1.0
    assert counted.l1 == pytest.approx(1 / 8, rel=1e-14)
    assert counted.rmse == pytest.approx(math.sqrt(1 / 8), rel=1e-14)
    assert compare(exact, other).max_error == 99.0


def test_zeros() -> None:
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    assert compare(zero, zero) == Metrics(1.0, 0.0, 0.0, 0.0)
    wrong = compare(zero, one)
    assert (wrong.cos_sim, wrong.l1, wrong.rmse, wrong.max_error) == (0.0, math.inf, 1.0, 1.0)
    lost = compare(one, zero)
    assert (lost.cos_sim, lost.l1, lost.rmse, lost.max_error) == (0.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("rows", [None, torch.zeros(3, dtype=torch.bool)])
def test_nothing_to_compare_is_nan(rows: torch.Tensor | None) -> None:
    x = torch.zeros(0 if rows is None else 3, 2)
    assert all(math.isnan(value) for value in compare(x, x, rows=rows).as_dict().values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    m = compare(torch.ones(2, 2), torch.tensor([[1.0, bad], [1.0, 1.0]]))
    assert not math.isfinite(m.l1)
    assert not math.isfinite(m.rmse)
    assert not math.isfinite(m.max_error)
    assert not m.cos_sim <= 1.0


def test_float64_inside() -> None:
    """1 + 2⁻³⁰ is 1 in float32; bfloat16 against float64 is compared as it stands; 1e200² would overflow float32."""
    exact = torch.ones(1, 4, dtype=torch.float64)
    assert compare(exact, exact + 2.0**-30).max_error == 2.0**-30
    assert compare(exact, torch.ones(1, 4, dtype=torch.bfloat16)).l1 == 0.0
    large = torch.full((1, 2), 3e38)
    assert compare(large, large).cos_sim == pytest.approx(1.0, rel=1e-14)


def test_gradients_do_not_disturb() -> None:
    assert compare(torch.ones(1, 2, requires_grad=True), torch.ones(1, 2)).l1 == 0.0


def test_shapes_must_agree() -> None:
    with pytest.raises(InvalidArgumentError, match=r"\(2, 3\).*\(3, 2\)"):
        compare(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(InvalidArgumentError):  # no broadcasting: it would hide a missing dimension
        compare(torch.zeros(2, 3), torch.zeros(1, 3))

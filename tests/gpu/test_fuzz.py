"""Twenty thousand random calls of the Hopper kernels against float64, through torch's own function."""

import pytest

pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")

import wgmma_cases
from fuzz import run
from fuzz_cases import make_case
from kernel_cases import hopper_only
from wgmma_cases import KERNEL

pytestmark = hopper_only

CASES = 20_000
PARTS = 32  # so that workers can share them


@pytest.fixture(scope="module", autouse=True)
def compiled():
    wgmma_cases.compile_everything()


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part):
    numbers = range(part * CASES // PARTS, (part + 1) * CASES // PARTS)
    tally = run("gpu", 0, numbers, "cuda")
    assert not tally.failures, str(tally)
    assert tally.cases == len(numbers)
    cases = [make_case("gpu", 0, number) for number in numbers]
    empty = sum(case.refusal is None and any(0 in shape for shape in case.shapes) for case in cases)
    assert tally.ran[KERNEL] == tally.cases - tally.refused - empty
    assert tally.ran["emulation"] == empty  # (the kernel takes no empty call)
    assert tally.ran[KERNEL] >= 0.9 * tally.cases

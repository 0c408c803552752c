"""The instruction fidelity against what an H200 gave, bit for bit.

The recording holds random operands of seven kinds (any E4M3 number; products with mantissas above 2; subnormals; mostly
zeros; …), single instructions and chains, for wgmma and mma.sync with f16 and f32 accumulators. It is made by
``python tests/gpu/accumulator_probe.py``; tests/gpu/test_accumulators.py repeats it on fresh operands.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit_attention.recipes.machine import SM90_MMA, SM90_WGMMA
from lowbit_attention.reference.accumulate import accumulate

RECORDING = np.load(Path(__file__).parent / "data" / "h200_accumulators.npz")
CASES = sorted({name.rpartition("/")[0] for name in RECORDING.files if "/" in name})


def numbers(codes):
    return torch.from_numpy(codes).view(torch.float8_e4m3fn).float()


def test_the_recording_is_whole():
    assert str(RECORDING["card"]) == "NVIDIA H200"
    assert {case.split("/")[0] for case in CASES} == {"wgmma_f16", "wgmma_f32", "mma_f16", "mma_f32"}
    assert len(CASES) == 4 * (7 * 2 + 2)


@pytest.mark.parametrize("case", CASES)
def test_bit_for_bit(case):
    a, b, c, d = (RECORDING[f"{case}/{name}"] for name in "abcd")
    kernel = case.split("/")[0]
    acc = torch.from_numpy(c.astype(np.float32))
    model = SM90_WGMMA if kernel.startswith("wgmma") else SM90_MMA
    kind = "fp8_f16" if kernel.endswith("f16") else "fp8_f32"
    accumulate(acc, numbers(a), numbers(b).transpose(1, 2), kind, model, "instruction")
    np.testing.assert_array_equal(acc.numpy(), d.astype(np.float32))  # (inf and NaN included)
    assert not np.array_equal(c, d)

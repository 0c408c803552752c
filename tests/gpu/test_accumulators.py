"""The instruction fidelity of the accumulator models is the card, bit for bit, on fresh random operands."""

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)

from accumulator_probe import FAMILIES, KERNELS, Probe, problems  # noqa: E402

from lowbit_attention.recipes.machine import SM90_MMA, SM90_WGMMA  # noqa: E402
from lowbit_attention.reference.accumulate import accumulate  # noqa: E402


@pytest.fixture(scope="module")
def probe():
    return Probe()


@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_model_is_the_card(probe, kernel, family, steps):
    generator = np.random.default_rng()
    a, b, c = problems(generator, kernel, family, steps, 8)
    card = torch.from_numpy(probe.run(kernel, a, b, c))
    p, v = (torch.from_numpy(x).view(torch.float8_e4m3fn).float().cuda() for x in (a, b))
    acc = torch.from_numpy(c.astype(np.float32)).cuda()
    model = SM90_WGMMA if kernel.startswith("wgmma") else SM90_MMA
    accumulate(acc, p, v.transpose(1, 2), "fp8_f16" if kernel.endswith("f16") else "fp8_f32", model, "instruction")
    torch.testing.assert_close(acc.cpu(), card, rtol=0, atol=0, equal_nan=True)

"""The exponentials that attention_wgmma approximates are those that the reference does: constants, keys, recipes."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from lowbit_attention import RECIPES
from lowbit_attention.backends.cuda.instances import CSRC, HEAD_DIMS, WgmmaConfig, wgmma_config
from lowbit_attention.recipes.machine import MACHINES, polynomial_keys
from lowbit_attention.recipes.options import RestartedMax, RunningMax
from lowbit_attention.reference import softmax

MACHINE = MACHINES["sm_90a"]
SOURCE = (CSRC / "common/softmax.cuh").read_text()


def constant(name):
    """A constant of softmax.cuh, as C++ writes it."""
    ((value,),) = [re.findall(rf"\b{name} = ([^;,]+)[;,]", SOURCE)]
    return value


def test_constants_are_the_references():
    halves = [int(constant(name), 16) for name in ("kScale", "kShift", "kRest")]
    assert all(word >> 16 == word & 0xFFFF for word in halves)  # the same for both numbers of a pair
    low = torch.tensor([word & 0xFFFF for word in halves], dtype=torch.uint16).view(torch.float16)
    assert tuple(low.tolist()) == softmax.POLYNOMIAL
    assert float(constant("kPowerMagic").rstrip("f")) == softmax._POWER_MAGIC
    assert constant("kPowerBias") == f"kPowerMagic + {softmax._POWER_BIAS}.0f"
    assert float(constant("kMagic").rstrip("f")) == softmax._MAGIC
    assert float(constant("kLargestFastFactor").rstrip("f")) == softmax._LARGEST_FAST_FACTOR
    assert float.fromhex(constant("kSmallestFactor").rstrip("f")) == softmax._SMALLEST_FACTOR
    assert int(constant("kMagicBits"), 16) == torch.tensor(softmax._MAGIC).view(torch.int32)
    assert int(constant("kPowerMagicBits"), 16) == torch.tensor(softmax._POWER_MAGIC).view(torch.int32)


def test_keys_are_the_references():
    """A thread's register i of scores holds key 8 · (i / 4) + 2q + i % 2; group / 2 is that of 8 registers."""
    assert "return group / 2 % 4 == 3;" in SOURCE
    by_kernel = {8 * (i // 4) + 2 * q + i % 2 for i in range(64) for q in range(4) if i // 8 % 4 == 3}
    keys = torch.arange(128)
    assert by_kernel == set(keys[polynomial_keys(keys)].tolist())


def test_raised_scores_keep_away_from_what_the_bits_cannot_say():
    """The unmasked path, number by number: whatever the factor and the maximum, y stays in FP16's range, and P is
    2^x · P_r to .66 %, or 0 after rounding to E4M3."""
    rng = np.random.default_rng(0)
    n, f32, f64 = 400_000, np.float32, np.float64
    factor = np.exp2(rng.uniform(-149, -4, n)).astype(f32)  # down to denormal ones; larger ones take the careful path
    factor = np.maximum(factor, f32(softmax._SMALLEST_FACTOR))  # by set_factor
    s = np.trunc(rng.uniform(-1, 1, n) * np.exp2(rng.uniform(0, 20, n)))
    own = s + np.trunc(np.exp2(rng.uniform(0, 20, n)))  # a larger score of the same tile
    others = np.exp2(rng.uniform(-90, 16, n))  # or a logit of another tile
    m = np.maximum(own * factor, np.where(rng.random(n) < 0.5, others, -np.inf)).astype(f32)
    base = f32(math.log2(14)) - m
    inverse = (f32(1) / factor).astype(f32)
    lowest = ((f32(-14) - base).astype(f64) * inverse + 12582912).astype(f32)
    assert np.isfinite(lowest).all()
    start = f64(base + f32(12303))
    exact = start - 12582912 * f64(factor)
    offset = exact.astype(f32)
    too_high = (offset > exact) | (exact == start)  # (float64 lost the product, which is more than 0)
    offset = np.where(too_high, np.nextafter(offset, f32(-np.inf)), offset)
    with_magic = np.maximum((s.astype(np.int64) + 0x4B400000).astype(np.int32), lowest.view(np.int32)).view(f32)
    y = (f64(with_magic) * factor + offset).astype(f32)
    assert y.min() >= 12288
    assert y.max() < 12288 + 31
    p = softmax.polynomial_exp2(torch.from_numpy(y)).numpy()
    true = 14 * np.exp2(s * f64(factor) - m)
    units = 2 * f64(factor) * math.log(2)  # what the FMA may lose (BASE_ERROR of tests/gpu)
    seen = true > 2.0**-9
    assert seen.mean() > 0.2
    assert (p[seen] <= true[seen] * 1.0066).all()
    assert (p[seen] >= true[seen] * (1 - 0.0066 - units[seen])).all()
    assert (p[true < 2.0**-11] < 2.0**-10).all()  # E4M3's half of its smallest number


def test_exponents_are_rounded_down_whatever_the_factor():
    """`fma.rm(−magic, factor, base + bias)` in exact arithmetic, also where float64 loses the product."""
    rng = np.random.default_rng(0)
    factor = np.exp2(rng.uniform(-149, -4, 2000)).astype(np.float32)
    base = (rng.uniform(-1, 1, 2000) * np.exp2(rng.uniform(-10, 14, 2000))).astype(np.float32)
    zero = torch.zeros(2000)
    y = softmax._exponent(zero, zero, torch.from_numpy(factor), torch.from_numpy(base)).numpy()
    for f, b, got in zip(factor.tolist(), base, y, strict=True):
        f = Fraction(max(f, softmax._SMALLEST_FACTOR))
        start = Fraction(float(np.float32(b + np.float32(12303)))) - Fraction(1.5 * 2**23) * f
        below = np.float32(float(start))
        while Fraction(float(below)) > start:
            below = np.nextafter(below, np.float32(-np.inf))
        assert got == np.float32(float(Fraction(1.5 * 2**23) * f + Fraction(float(below))))


FAST = RECIPES["fast_8b"]
EXAMPLES = {
    **{name: RECIPES[name] for name in ("sage2_8b", "sage2pp_8b", "fast_8b")},
    "256 keys": FAST.replace(keys_per_promotion=256),
    "one tile": FAST.replace(keys_per_promotion=128, v_tile_means=False),
}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_recipes_are_the_references(name, head_dim):
    """Four warpgroups approximate, unless they need the exponentials' FP32 sum."""
    config = wgmma_config(EXAMPLES[name], head_dim, torch.bfloat16)
    kernel = config.consumers == 4 and config.sum_in_mma
    assert softmax.uses_polynomial(EXAMPLES[name], MACHINE, head_dim) == kernel
    assert kernel == (name in ("fast_8b", "256 keys") and head_dim == 64)


def test_four_warpgroups_without_row_sums_in_the_mma():
    config = WgmmaConfig(64, torch.bfloat16, sums_f16=True, promotion_keys=256)
    assert config.consumers == 4
    plain = FAST.replace(v_tile_means=False, promote_first_tile=False, softmax_max=RestartedMax(20.0, 4.0))
    r = plain.replace(keys_per_promotion=256, row_sum="unrounded", softmax_max=RunningMax())
    assert wgmma_config(r, 64, torch.bfloat16) == config
    assert not softmax.uses_polynomial(r, MACHINE, 64)

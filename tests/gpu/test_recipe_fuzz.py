"""Recipes without a name: whatever a kernel accepts gives the emulation's numbers."""

import pytest

pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")

from fuzz_recipes import check, compile_all
from kernel_cases import hopper_only
from recipe_cases import GPU_CASES, GPU_LENGTH, KERNELS, Case, first_cases

from lowbit_attention import recipe

pytestmark = hopper_only

CASES = [case for kernel in KERNELS for case in first_cases(kernel, 0, GPU_CASES, GPU_LENGTH)]

RESTARTED_AT_EVERY_TILE = [
    "sage2_8b:softmax_max=restarted(20;4)",
    "sage2_8b:softmax_max=restarted(60)",
    "sage2pp_8b:softmax_max=restarted(20;4)",
    "fast_8b:keys_per_promotion=128,p_max=112,promote_first_tile=false,v_tile_means=false,softmax_max=restarted(20;4)",
    "fast_8b:keys_per_promotion=128,p_max=112,v_tile_means=false",
]
"""Case K1, once accepted and wrong: O was not rescaled. From the second tile on, the more the longer."""


def restarted(spec, head_dim, keys, family):
    dims, dtype = (head_dim, head_dim), {64: "fp16", 128: "bf16"}[head_dim]
    return Case("attention_wgmma", 0, 0, keys, recipe(spec), dtype, dims, (2, 1), (200, keys), "none", family)


RESTARTED = [
    restarted(spec, head_dim, keys, family)
    for spec in RESTARTED_AT_EVERY_TILE
    for head_dim in (64, 128)
    for keys, family in ((129, "normal"), (1000, "sink"))
]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    compile_all([*CASES, *RESTARTED])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}-{case.number}")
def test_random_recipes(case):
    """``python tools/fuzz_recipes.py`` runs more of them, and longer ones."""
    check(case)


@pytest.mark.parametrize("case", RESTARTED, ids=str)
def test_a_maximum_restarted_at_every_tile(case):
    check(case)

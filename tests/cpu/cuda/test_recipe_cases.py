"""The recipes that tests/gpu/test_recipe_fuzz.py tries are what the kernels accept, all kinds of them."""

import itertools
import random

import pytest
from fuzz_recipes import compiled_badly, instances_of
from recipe_cases import DTYPES, GPU_CASES, GPU_LENGTH, KERNELS, Case, accepted_recipe, first_cases, reasons_of

from lowbit_attention import RECIPES, recipe
from lowbit_attention.backends.cuda.instances import MANIFEST, wgmma_config

RECIPES_DRAWN = 300
EVERY_KERNEL = pytest.mark.parametrize("kernel", KERNELS)


def the_cases(kernel):
    return first_cases(kernel, 0, GPU_CASES, GPU_LENGTH)


def of(recipe, kernel):
    """A call of ``recipe`` like any other."""
    return Case(kernel, 0, 0, 300, recipe, "bf16", (64, 64), (2, 2), (300, 300), "none", "normal")


@EVERY_KERNEL
def test_a_case_is_what_its_number_says(kernel):
    assert first_cases(kernel, 0, 5, GPU_LENGTH) == the_cases(kernel)[:5]
    assert first_cases(kernel, 1, 5, GPU_LENGTH) != the_cases(kernel)[:5]
    for number, case in enumerate(the_cases(kernel)):
        assert case.number == number
        assert f"--kernel {kernel} --seed 0 --max-length {GPU_LENGTH} --only {number}" in case.command()


@EVERY_KERNEL
def test_every_recipe_is_accepted_and_none_has_a_name(kernel):
    for case in the_cases(kernel):
        assert reasons_of(kernel, case.recipe) == ()
        assert case.recipe not in RECIPES.values()
        assert 129 <= case.lengths[1] <= GPU_LENGTH


SUMS = {
    "attention_wgmma": (
        "f16, 64 keys", "f16, 128 keys", "f16, 256 keys", "f16, 256 keys, first tile",
        "f32, 128 keys",
    ),
    "attention_mma": (
        "e4m3, f32, ones", "e4m3, f32, floats", "e4m3, f32, never, floats", "e4m3, f16, ones", "e4m3, f16, floats",
        "half, f16, floats", "half, f32, never, floats",
    ),
}  # fmt: skip
"""What the kernels' comments say they are compiled for."""
BESIDES = {
    "attention_wgmma": {"restart": (False, True), "sum_in_mma": (False, True), "dim": (64, 128)},
    "attention_mma": {"bits": (4, 8), "smooth_q": (False, True), "rotate": (False, True), "dim": (64, 128)},
}


@EVERY_KERNEL
def test_every_kind_of_sums_meets_everything_else_that_chooses_the_code(kernel):
    met = [case.kind() for case in the_cases(kernel)]
    assert {kind["sums"] for kind in met} == set(SUMS[kernel])
    for name, values in BESIDES[kernel].items():
        wanted = set(itertools.product(SUMS[kernel], values))
        assert wanted == {(kind["sums"], kind[name]) for kind in met}, name
    if kernel == "attention_wgmma":  # (the one pair that it refuses)
        assert not any(kind["restart"] and not kind["sum_in_mma"] for kind in met)


def test_some_calls_split_the_keys():
    split = [case for case in the_cases("attention_wgmma") if case.splits_keys]
    assert {case.kind()["restart"] for case in split} == {False, True}
    assert {case.kind()["sum_in_mma"] for case in split} == {False, True}
    assert {case.recipe.v_tile_means for case in the_cases("attention_wgmma")} == {False, True}
    assert {case.dim for case in split} == {64, 128}


@EVERY_KERNEL
def test_every_value_of_an_option_that_turns_up_is_among_them(kernel):
    r = random.Random(0)
    found = [of(accepted_recipe(kernel, r), kernel) for _ in range(RECIPES_DRAWN)]
    for name in ("q_granularity", "k_granularity", "smooth_k", "samples", "smooth_v", "power_of_two", "headroom"):
        of_many, ours = ({str(case.fields()[name]) for case in cases} for cases in (found, the_cases(kernel)))
        assert of_many == ours, name
    for name in ("dtype", "causal", "family", "heads", "head_dims"):
        assert len({getattr(case, name) for case in the_cases(kernel)}) >= 3, name


@EVERY_KERNEL
def test_what_is_accepted_can_be_compiled(kernel):
    """Each macro has a value that the kernel knows, and a thread block fits on a multiprocessor."""
    known = {key for instance in MANIFEST for key, _ in instance.defines}
    for instance in instances_of(the_cases(kernel)):
        macros = dict(instance.defines)
        assert macros.keys() <= known
        keys = macros.get("PROMOTION_KEYS", 64)
        assert keys == 64 or keys % 128 == 0
        assert 64 <= keys <= 1 << 30
    if kernel == "attention_wgmma":
        for case in the_cases(kernel):
            config = wgmma_config(case.recipe, case.dim, DTYPES[case.dtype])
            assert config.shared_bytes <= 227 * 1024


@pytest.mark.parametrize("keys", [64, 256, 384, 1024, 1 << 30])
def test_fp32_sums_of_anything_but_a_tile_are_refused(keys):
    """On the card they were wrong from the second interval on (this fuzz found it), and they spilled."""
    (reason,) = reasons_of("attention_wgmma", recipe(f"sage2_8b:keys_per_promotion={keys}"))
    assert f"not after {keys}" in reason


@pytest.mark.parametrize("spec", ["sage2_8b:softmax_max=restarted(20;4)"])
def test_a_maximum_restarted_at_every_tile_leaves_the_mmas_alone(spec):
    """O is rescaled at every tile, and registers are scarce: the assembler once serialised these MMAs."""
    case = Case("attention_wgmma", 0, 0, 300, recipe(spec), "bf16", (128, 128), (2, 2), (300, 300), "none", "normal")
    attention = [i for i in case.instances() if i.kernel == "attention_wgmma"]
    assert len(attention) == 1
    assert compiled_badly([case]) == []

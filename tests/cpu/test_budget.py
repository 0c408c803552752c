"""The default error budget: the committed measurements are the code's, and decide as documented."""

import pytest

from lowbit_attention import RECIPES, budget, recipe
from lowbit_attention.synthetic import FAMILIES


def test_every_recipe_and_family_was_measured():
    for by_recipe in budget.measured().values():
        assert set(by_recipe) == {name for name, r in RECIPES.items() if not r.is_exact}
        for by_family in by_recipe.values():
            assert set(by_family) == set(FAMILIES)
            assert all(l1 > 0 for l1 in by_family.values())


@pytest.mark.parametrize(
    ("family", "name", "machine"), [("normal", "sage2_8b", "sm_89"), ("sink", "fast_8b", "sm_90a")]
)
def test_the_committed_measurements_are_what_the_code_gives(family, name, machine):
    now = budget.measure([family], [name], [machine], budget.SETTING["length"])[machine][name][family]
    # float32 sums in another order move single roundings of P and V: far less than 1 % of an error's mean
    assert now == pytest.approx(budget.measured()[machine][name][family], rel=0.01)


def test_who_is_within_the_budget():
    within = {name for name, r in RECIPES.items() if not budget.outside_reasons(r)}
    assert {"exact", "sage2_8b", "sage2pp_8b", "int8_fp16"} <= within
    assert all("asked for" in budget.outside_reasons(r)[0] for r in RECIPES.values() if r.qk_bits == 4)
    assert any("sink" in reason for reason in budget.outside_reasons(RECIPES["int8_u8"]))


def test_an_unmeasured_recipe_is_outside():
    assert "not measured" in budget.outside_reasons(recipe("sage2_8b:smooth_k=false"))[0]


def test_the_ratio_decides():
    errors = {"sm_89": {"sage2_8b": {"normal": 0.10}, "sage1": {"normal": 0.1101}}}
    assert budget.outside_reasons(RECIPES["sage1"], errors) != ()
    errors["sm_89"]["sage1"]["normal"] = 0.1099
    assert budget.outside_reasons(RECIPES["sage1"], errors) == ()

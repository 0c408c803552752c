"""The default error budget: the committed measurements are the code's, and decide as documented."""

import csv
from pathlib import Path

import pytest

from lowbit_attention import RECIPES, recipe
from lowbit_attention.backends import budget
from lowbit_attention.evaluation.errors import Grid
from lowbit_attention.evaluation.synthetic import FAMILIES
from lowbit_attention.recipes.machine import resolve_machine

ROWS = Path(__file__).resolve().parents[2] / "benchmarks/results/errors.csv"


def rows():
    with ROWS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_recipe_and_family_was_measured():
    """All at one length at the least, those that could be used at two."""
    for by_recipe in budget.measured().values():
        assert set(by_recipe) == {name for name, r in RECIPES.items() if not r.is_exact}
        for name, by_family in by_recipe.items():
            assert set(by_family) == set(FAMILIES)
            for by_length in by_family.values():
                assert 1024 in by_length
                assert 4096 in by_length or RECIPES[name].qk_bits == 4
                assert all(l1 > 0 for l1 in by_length.values())


def test_the_budget_is_made_of_the_committed_measurements():
    assert budget.measured() == budget.from_rows(rows())


@pytest.mark.parametrize(
    ("family", "name", "machine"),
    [("normal", "sage2_8b", "sm_89"), ("sink", "fast_8b", "sm_90a"), ("drift", "fast_8b", "sm_90a")],
)
def test_the_committed_measurements_are_what_the_code_gives(family, name, machine):
    length = 1024
    (row,) = [
        r for r in rows()
        if (r["family"], r["recipe"], r["machine"], r["length"]) == (family, name, machine, str(length))
        and all(r[option] == value for option, value in budget.MEASURED_AS.items())
    ]  # fmt: skip
    grid = Grid(int(row["heads"]), int(row["seeds"]), query_rows=int(row["query_rows"]))
    found = grid.measure([family], length, {name: RECIPES[name]}, resolve_machine(machine, "instruction"))
    # float32 sums in another order move single roundings of P and V: far less than 1 % of an error's mean
    assert found[family, name].l1 == pytest.approx(float(row["l1"]), rel=0.01)


def test_who_is_within_the_budget():
    within = {name for name, r in RECIPES.items() if not budget.outside_reasons(r)}
    assert {"exact", "sage2_8b", "int8_fp16"} <= within
    assert all("asked for" in budget.outside_reasons(r)[0] for r in RECIPES.values() if r.qk_bits == 4)
    assert any("sink" in reason for reason in budget.outside_reasons(RECIPES["int8_u8"]))


def test_the_default_on_hopper_is_within_at_every_length():
    lengths = (None, 1024, 4096, 32_768, 131_072, 300_000)
    assert not any(budget.outside_reasons(RECIPES["fast_8b"], n) for n in lengths)


def test_an_unmeasured_recipe_is_outside():
    assert "not measured" in budget.outside_reasons(recipe("sage2_8b:smooth_k=false"))[0]


def table(**of_sage1):
    """By length; the yardstick errs by .10 on every family at every length."""
    yardstick = dict.fromkeys((1024, 4096, 32_768), 0.10)
    return {"sm_89": {"sage2_8b": dict.fromkeys(("normal", "local", "sink"), yardstick), "sage1": of_sage1}}


def test_the_ratio_decides():
    within = {1024: 0.1099, 4096: 0.05, 32_768: 0.1099}
    above = within | {4096: 0.1101}
    assert budget.outside_reasons(RECIPES["sage1"], None, table(normal=within, local=within, sink=within)) == ()
    (reason,) = budget.outside_reasons(RECIPES["sage1"], None, table(normal=within, local=above, sink=within))
    assert reason == (
        "its L1 is above the default error budget (like sm_89) on local (1.00 × what is allowed at 4096 tokens)"
    )
    errs = table(normal={1024: 0.2}, local=within | {4096: 0.3}, sink=within)
    (reason,) = budget.outside_reasons(RECIPES["sage1"], None, errs)
    assert "local (2.73 × what is allowed at 4096 tokens), normal (1.82 × what is allowed at 1024 tokens)" in reason


def test_the_worse_of_the_published_recipes_counts():
    errs = table(normal={1024: 0.1}, local={1024: 0.16}, sink={1024: 0.1})
    assert budget.outside_reasons(RECIPES["sage1"], 1024, errs)
    errs["sm_89"]["sage2pp_8b"] = {"local": {1024: 0.15}}
    assert budget.outside_reasons(RECIPES["sage1"], 1024, errs) == ()


@pytest.mark.parametrize(
    ("kv_len", "outside"),
    [(1, False), (1024, False), (1025, True), (4096, True), (32_767, True), (32_768, False), (300_000, False)],
)
def test_the_measured_lengths_on_both_sides_decide(kv_len, outside):
    errors = table(normal={1024: 0.1, 4096: 0.2, 32_768: 0.1}, local={1024: 0.1}, sink={1024: 0.1, 4096: 0.1})
    assert bool(budget.outside_reasons(RECIPES["sage1"], kv_len, errors)) == outside


def test_the_longest_decides_beyond_it():
    errors = table(normal={1024: 0.1, 4096: 0.1, 32_768: 0.2}, local={1024: 0.1}, sink={1024: 0.1})
    (reason,) = budget.outside_reasons(RECIPES["sage1"], 300_000, errors)
    assert reason.endswith("on normal (1.82 × what is allowed at 32768 tokens)")


def test_a_family_that_was_not_measured_is_outside():
    assert budget.outside_reasons(RECIPES["sage1"], 1024, table(normal={1024: 0.1}, local={1024: 0.1})) == (
        "its errors were not measured on sink inputs (like sm_89)",
    )


def test_only_rows_of_the_setting_count():
    row = {**budget.MEASURED_AS, "machine": "sm_89", "recipe": "sage1", "family": "sink", "length": "64", "l1": "0.5"}
    others = [row | change for change in ({"fidelity": "step"}, {"by": "kernel"}, {"recipe": "sage1:p_max=2"})]
    assert budget.from_rows([row, *(other | {"l1": "9"} for other in others)]) == {
        "sm_89": {"sage1": {"sink": {64: 0.5}}}
    }

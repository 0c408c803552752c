"""The default error budget: which recipes ``auto`` may run at a length.

A recipe is within it if its relative L1 on every synthetic family is at most `SLACK` times that of the worse of the two
published 8-bit recipes (`PUBLISHED`), and it does not quantise Q·K to 4 bits (those are only run when asked for, or by
a policy).
``tools/measure_lengths.py`` measures the errors; ``make tables`` keeps them in ``data/family_errors.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import resources

from ..recipes.definition import Recipe
from ..recipes.named import RECIPES

YARDSTICK = "sage2_8b"
"""What errors are shown beside."""
PUBLISHED = ("sage2_8b", "sage2pp_8b")
SLACK = 1.1

MEASURED_AS = {
    "by": "emulation",
    "fidelity": "instruction",  # what truncation takes from sums of one sign does not show in `step`
    "dtype": "bfloat16",  # its grid is what a mean that is subtracted moves V off
    "causal": "False",
    "head_dim": "128",
    "same_mean": "False",
}
"""Which of the measured rows count."""

Errors = dict[str, dict[str, dict[str, dict[int, float]]]]
"""Relative L1 by machine, recipe, family and length (queries and keys)."""


def from_rows(rows: Iterable[Mapping[str, str]]) -> Errors:
    """The errors among the rows that ``tools/measure_lengths.py`` writes: named recipes, `MEASURED_AS`."""
    errors: Errors = {}
    for row in rows:
        if row["recipe"] in RECIPES and all(row[name] == value for name, value in MEASURED_AS.items()):
            by_family = errors.setdefault(row["machine"], {}).setdefault(row["recipe"], {})
            by_family.setdefault(row["family"], {})[int(row["length"])] = float(row["l1"])
    return errors


@lru_cache(maxsize=1)
def measured() -> Errors:
    """The errors of ``data/family_errors.json``."""
    text = resources.files("lowbit_attention").joinpath("data/family_errors.json").read_text(encoding="utf-8")
    return {
        machine: {
            name: {family: {int(n): l1 for n, l1 in by_length.items()} for family, by_length in by_family.items()}
            for name, by_family in by_recipe.items()
        }
        for machine, by_recipe in json.loads(text)["l1"].items()
    }


def outside_reasons(recipe: Recipe, kv_len: int | None = None, errors: Errors | None = None) -> tuple[str, ...]:
    """Why ``auto`` may not run ``recipe`` on so many keys (``None``: on all lengths); empty if it may.

    The measured lengths next to ``kv_len`` on both sides decide, beyond the longest that one. There is one reason for
    each machine, with every family on which the recipe errs too much, the worst first.
    """
    if recipe.is_exact:
        return ()
    if recipe.qk_bits == 4:
        return ("4 bits are only used when asked for",)
    if recipe.name not in RECIPES or RECIPES[recipe.name] != recipe:
        return ("its errors were not measured: it is no named recipe",)
    reasons = []
    for machine, by_recipe in (errors or measured()).items():
        if recipe.name not in by_recipe:
            return (f"its errors were not measured on {machine}",)
        found: list[tuple[float, str, int]] = []
        for family in by_recipe[YARDSTICK]:
            l1, allowed = by_recipe[recipe.name].get(family, {}), _allowed(by_recipe, family)
            lengths = _beside(allowed.keys() & l1.keys(), kv_len)
            if not lengths:
                return (f"its errors were not measured on {family} inputs (like {machine})",)
            found.append(max((l1[n] / allowed[n], family, n) for n in lengths))
        if above := sorted((f for f in found if f[0] > 1.0), reverse=True):
            told = ", ".join(f"{family} ({ratio:.2f} × what is allowed at {n} tokens)" for ratio, family, n in above)
            reasons.append(f"its L1 is above the default error budget (like {machine}) on {told}")
    return tuple(reasons)


def _allowed(by_recipe: Mapping[str, Mapping[str, Mapping[int, float]]], family: str) -> dict[int, float]:
    """The L1 that the budget allows on a family, by length."""
    published = [by_recipe[name][family] for name in PUBLISHED if family in by_recipe.get(name, {})]
    return {n: SLACK * max(l1.get(n, 0.0) for l1 in published) for n in by_recipe[YARDSTICK][family]}


def _beside(lengths: Iterable[int], wanted: int | None) -> set[int]:
    """The nearest of ``lengths`` at or below ``wanted`` and at or above it, if there are; all for ``None``."""
    known = set(lengths)
    if wanted is None:
        return known
    below, above = [n for n in known if n <= wanted], [n for n in known if n >= wanted]
    return {*([max(below)] if below else []), *([min(above)] if above else [])}

"""The default error budget: which recipes ``auto`` may run.

A recipe is within it if its relative L1 on every synthetic family is at most `SLACK` times that of `YARDSTICK`, and
it does not quantise Q·K to 4 bits (those are only run when asked for, or by a policy). The errors are measured by
``make tables`` and kept in ``data/family_errors.json``.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources

from .machine import MACHINES
from .metrics import compare
from .recipe import Recipe
from .recipes import RECIPES
from .reference.attention import emulate
from .reference.exact import exact
from .synthetic import make

YARDSTICK = "sage2_8b"
SLACK = 1.1
SETTING = {"batch": 1, "heads": 24, "length": 2048, "head_dim": 128, "seed": 0}
"""Many heads: on sinks the error is the luck of rounding one token's V, ± 10 % with four of them."""
MACHINE_NAMES = ("sm_89", "sm_90a")

Errors = dict[str, dict[str, dict[str, float]]]
"""Relative L1 by machine, recipe and family."""


def measure(families: list[str], recipes: list[str], machines: list[str], length: int) -> Errors:
    """Relative L1 of recipes on synthetic families against exact attention in float64."""
    errors: Errors = {machine: {name: {} for name in recipes} for machine in machines}
    for family in families:
        q, k, v = make(family, **{**SETTING, "length": length})
        sm_scale = q.shape[-1] ** -0.5
        target, _ = exact(q, k, v, sm_scale=sm_scale)
        for machine in machines:
            for name in recipes:
                out = emulate(q, k, v, RECIPES[name], sm_scale=sm_scale, machine=MACHINES[machine]).out
                errors[machine][name][family] = compare(target, out).l1
    return errors


@lru_cache(maxsize=1)
def measured() -> Errors:
    """The errors of ``data/family_errors.json``."""
    text = resources.files("lowbit_attention").joinpath("data/family_errors.json").read_text(encoding="utf-8")
    errors: Errors = json.loads(text)["l1"]
    return errors


def outside_reasons(recipe: Recipe, errors: Errors | None = None) -> tuple[str, ...]:
    """Why ``auto`` may not run ``recipe``: every family and machine where it errs too much; empty if it may."""
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
        for family, yardstick in by_recipe[YARDSTICK].items():
            ratio = by_recipe[recipe.name][family] / yardstick
            if ratio > SLACK:
                reasons.append(f"on {family} inputs its L1 is {ratio:.2f} × {YARDSTICK}'s (like {machine})")
    return tuple(reasons)

"""The cost model of ``auto`` from samples of benchmarks/results/samples: coefficients, and how far off they are.

python tools/fit_costs.py    # the errors on calls that were left out of the fit, and the choices that follow
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from lowbit_attention.backends.cuda.speeds import TORCH, Call, features, fit, microseconds, rows_of
from lowbit_attention.bench.shapes import Shape, parse_shape
from lowbit_attention.bench.timing import percentile

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "benchmarks/results/samples/h200-6c5c287.csv"
FOLDS = 5
Samples = dict[str, dict[str, float]]
"""Microseconds by shape and provider (`TORCH`, or a recipe)."""


def read() -> tuple[dict[str, Any], Samples]:
    """Where the samples come from, and those of calls without a mask."""
    with SAMPLES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found: Samples = defaultdict(dict)
    for row in rows:
        if parse_shape(row["shape"]).mask is None:
            name = TORCH if row["provider"] == "torch_default" else row["provider"].removeprefix("ours:")
            found[row["shape"]][name] = float(row["us"])
    facts = {name: rows[0][name] for name in ("gpu", "driver", "torch", "commit", "dtype")}
    return facts, dict(found)


def call_of(shape: Shape) -> Call:
    """What the model looks at."""
    offset = shape.kv_len - shape.q_len if shape.is_causal else None
    return Call(
        shape.batch, shape.q_heads, shape.kv_heads, shape.q_len, shape.kv_len, shape.head_dim, shape.v_head_dim, offset
    )


def fitted(samples: Samples, uses: Callable[[int], bool] = lambda number: True) -> dict[str, Any]:
    """The coefficients by provider, head dimension and causality; ``uses``: which samples of a group, by number."""
    groups: dict[tuple[str, str, str], list[tuple[tuple[float, ...], float]]] = defaultdict(list)
    for number, (label, times) in enumerate(sorted(samples.items())):
        shape = parse_shape(label)
        for name, us in times.items():
            if uses(number):
                row = features(call_of(shape), rows_of(name, shape.head_dim)), us
                groups[name, str(shape.head_dim), str(shape.is_causal)].append(row)
    models: dict[str, Any] = {}
    for (name, dim, causal), rows in sorted(groups.items()):
        models.setdefault(name, {}).setdefault(dim, {})[causal] = [float(f"{x:.6g}") for x in fit(rows)]
    return models


def costs_json() -> dict[str, Any]:
    """What data/hopper_costs.json holds."""
    facts, samples = read()
    return {**facts, "calls": len(samples), "models": fitted(samples)}


def left_out(samples: Samples) -> dict[str, dict[str, float]]:
    """Each sample's predictions by a model that was fitted to the other folds."""
    found: dict[str, dict[str, float]] = {}
    for fold in range(FOLDS):
        model = fitted(samples, lambda number: number % FOLDS != fold)  # noqa: B023 (used at once)
        for number, (label, times) in enumerate(sorted(samples.items())):
            if number % FOLDS == fold:
                call = call_of(parse_shape(label))
                found[label] = {name: microseconds(call, name, model) or 0.0 for name in times}
    return found


def losses(samples: Samples, predicted: Samples, recipes: tuple[str, ...] = ("fast_8b",)) -> list[tuple[float, str]]:
    """How much longer what is predicted to be faster takes than what is, worst first."""
    found = []
    for label, times in samples.items():
        candidates = [name for name in (TORCH, *recipes) if name in times]
        choice = min(candidates, key=lambda name: predicted[label][name])
        found.append((times[choice] / min(times[name] for name in candidates) - 1, label))
    return sorted(found, reverse=True)


def main() -> None:
    """Print what the folds say."""
    _, samples = read()
    predicted = left_out(samples)
    for name in sorted({name for times in samples.values() for name in times}):
        off = [abs(predicted[label][name] / times[name] - 1) for label, times in samples.items() if name in times]
        print(f"{name}: off by {median(off):.1%} (median), {percentile(off, 90):.1%} (9 of 10), {max(off):.1%} (most)")
    for recipes in (("fast_8b",), ("fast_8b", "sage2_8b")):
        found = losses(samples, predicted, recipes)
        near = sum(loss <= 0.03 for loss, _ in found) / len(found)
        worst = ", ".join(f"{loss:.1%} at {label}" for loss, label in found[:5] if loss > 0.03)
        print(f"torch or {' or '.join(recipes)}: within 3 % of the faster in {near:.1%} of {len(found)} calls; {worst}")


if __name__ == "__main__":
    main()

"""The shipped cost model of ``auto``, from samples of benchmarks/results/samples.

python tools/fit_costs.py    # the errors on calls that were left out of the fit, and the choices that follow
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lowbit_attention import RECIPES
from lowbit_attention.backends.cuda.instances import wgmma_config
from lowbit_attention.backends.cuda.speeds import CardModel
from lowbit_attention.bench.cost_fit import Samples, card_model, left_out, losses, offs, samples_of
from lowbit_attention.bench.sampling import SampleRow
from lowbit_attention.bench.timing import percentile

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "benchmarks/results/samples/h200-6c5c287.csv"
KERNELS = {"fast_8b": "attention_wgmma", "sage2_8b": "attention_wgmma"}
MULTIPROCESSORS = 132


def read() -> list[SampleRow]:
    """The rows of `SAMPLES`."""
    with SAMPLES.open(encoding="utf-8", newline="") as file:
        return [
            SampleRow(
                r["gpu"], r["driver"], r["torch"], r["commit"], r["dtype"], r["shape"], r["provider"], float(r["us"])
            )
            for r in csv.DictReader(file)
        ]


def fitted(samples: Samples, about: dict[str, Any], uses: Callable[[int], bool] = lambda number: True) -> CardModel:
    """An H200's model."""
    return card_model(
        samples, KERNELS, lambda name, dim: wgmma_config(RECIPES[name], dim, torch.bfloat16).q_rows, MULTIPROCESSORS,
        about, uses,
    )  # fmt: skip


def costs_json() -> dict[str, Any]:
    """What data/hopper_costs.json holds."""
    rows = read()
    samples = samples_of(rows)
    about = {field.name: getattr(rows[0], field.name) for field in fields(SampleRow)[:5]}
    return asdict(fitted(samples, {**about, "calls": len(samples)}))


def main() -> None:
    """Print what the folds say."""
    samples = samples_of(read())
    predicted = left_out(samples, lambda uses: fitted(samples, {}, uses))
    for name in sorted({name for times in samples.values() for name in times}):
        off = offs(samples, predicted, name)
        print(f"{name}: off by {median(off):.1%} (median), {percentile(off, 90):.1%} (9 of 10), {max(off):.1%} (most)")
    for recipes in (("fast_8b",), ("fast_8b", "sage2_8b")):
        found = losses(samples, predicted, recipes)
        near = sum(loss <= 0.03 for loss, _ in found) / len(found)
        worst = ", ".join(f"{loss:.1%} at {label}" for loss, label in found[:5] if loss > 0.03)
        print(f"torch or {' or '.join(recipes)}: within 3 % of the faster in {near:.1%} of {len(found)} calls; {worst}")


if __name__ == "__main__":
    main()

"""Adaptive policies for the witness: what each layer alone does to the predictions decides its recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowbit_attention import LowbitError
from lowbit_attention.adaptive import (
    Applied,
    Choice,
    Observations,
    Policy,
    Sensitivity,
    choose,
    observe,
    pareto,
    sensitivity,
)

from .measure import Way, judge, logits, policy_way
from .model import Witness

CANDIDATES = ("sage2pp_8b", "sage2pp_4b", "rotated_4b")
"""What a policy chooses from, beside exact: the fastest on an RTX 4090 by the papers' rates, at 8 and at 4 bits."""
SHARE = 0.6
"""At least so many of the layers at 4 bits."""
NAME = f"adaptive {100 * SHARE:.0f}"
_COST = "sm_89"
_ALL_POINTS = 100_000

Tell = Callable[[str], None]


def runs(layers: int) -> int:
    """How often `calibrate` calls ``tell``."""
    return 1 + layers * len(CANDIDATES)


@torch.no_grad()
def calibrate(
    witness: Witness, windows: Tensor, like: str | None, shuffles: int, folder: Path, tell: Tell
) -> list[Way]:
    """A policy by measured effects, and ``shuffles`` random ones with as many layers of each recipe.

    Args:
        windows: of the calibration text, int64 ``[W, N + 1]``; effects are measured on the first.
        folder: gets the policies and ``effects.json``.
    """
    with observe(witness.model, CANDIDATES, like=like) as watch:
        for window in windows:
            logits(witness.model, window[None])
    effects = _effects(witness, windows[:1], watch.observations, tell)
    effects.save(folder / "effects.json")
    choice = most_accurate(watch.observations, effects, SHARE)
    for number, chosen in enumerate([choice, *(choice.shuffled(seed) for seed in range(shuffles))]):
        chosen.policy(witness.model).save(_file(folder, number))
    return stored(folder, like)


def stored(folder: Path, like: str | None) -> list[Way]:
    """What `calibrate` has left in a folder; empty if it never ran there."""
    found: list[Way] = []
    while (path := _file(folder, len(found))).is_file():
        name = f"shuffled {len(found)}" if found else NAME
        found.append(policy_way(name, Policy.load(path), like))
    return found


def forget(folder: Path) -> None:
    """Remove the policies of an earlier run."""
    number = 0
    while (path := _file(folder, number)).is_file():
        path.unlink()
        number += 1


def _file(folder: Path, number: int) -> Path:
    return folder / (f"policy-shuffled-{number}.json" if number else "policy.json")


def _effects(witness: Witness, windows: Tensor, observations: Observations, tell: Tell) -> Sensitivity:
    def run(applied: Applied) -> Tensor:
        return logits(witness.model, windows)

    def divergence(exact: Tensor, other: Tensor) -> float:
        return max(0.0, judge(exact, other, windows)[0].kl)  # (rounding can make it −1e-18)

    return sensitivity(run, observations, model=witness.model, by="layer", metric=divergence, advance=tell)


def most_accurate(observations: Observations, effects: Sensitivity, share: float) -> Choice:
    """Of the choices on the Pareto curve with at least that share of calls at 4 bits, the most accurate.

    Raises:
        LowbitError: there is none.
    """
    recipes: Sequence[str] = [*observations.candidates, "exact"]
    for point in pareto(observations, recipes=recipes, cost=_COST, effects=effects, points=_ALL_POINTS):
        if point.four_bit_share() >= share - 1e-9:
            budget = point.error * (1 + 1e-9)
            return choose(observations, budget=budget, recipes=recipes, cost=_COST, effects=effects)
    raise LowbitError(f"no choice runs {100 * share:.0f} % of the calls at 4 bits")

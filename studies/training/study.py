"""One subject under every recipe and policy: calibrate, choose, run, judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lowbit_attention import LowbitError, recipe
from lowbit_attention.adaptive import (
    Choice,
    Observations,
    Policy,
    Sensitivity,
    choose,
    cost_table,
    observe,
    pareto,
    sensitivity,
)
from lowbit_attention.adaptive.sensitivity import By
from lowbit_studies.subjects.base import Subject

UNIFORM = ("sage2_8b", "sage2pp_8b", "fast_8b", "int8_u8", "sage2_4b", "sage2pp_4b", "rotated_4b")
"""Recipes that every call runs, beside exact."""
CANDIDATES = ("sage2pp_8b", "sage2pp_4b", "rotated_4b")
"""What a policy chooses from, beside exact: under the claimed costs of an RTX 4090 the fastest at 8 and at 4 bits."""
CHEAP, ACCURATE = "rotated_4b", "sage2pp_8b"
"""For SageAttention2's own rule, which knows two recipes."""
_ALL_POINTS = 100_000

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """shares: at least so many of the calls at 4 bits, a policy each. runs: to calibrate. like, cost: a machine."""

    shares: tuple[float, ...] = (0.6, 0.8)
    random: int = 10
    runs: int = 2
    like: str = "sm_89"
    cost: str = "sm_89"


@dataclass(frozen=True)
class Row:
    """One way to run the subject. four_bits: the share of its calls at 4 bits. seconds: modelled, NaN if not priced.

    group: ``recipe``, ``adaptive``, or ``random`` with the policy that it imitates in ``of``. values: by metric, a
    number for each input.
    """

    name: str
    group: str
    four_bits: float
    seconds: float
    values: dict[str, Tensor]
    of: str = ""


@dataclass
class Study:
    """Everything found. kept: results worth showing, by row. took: seconds of the work itself."""

    subject: Subject
    rows: list[Row] = field(default_factory=list)
    choices: dict[str, Choice] = field(default_factory=dict)
    observations: Observations | None = None
    effects: list[Sensitivity] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    bitwise: bool | None = None
    """Whether a stored policy, read back, gave the same bits."""

    def row(self, name: str) -> Row:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)


def run(
    subject: Subject,
    settings: Settings,
    folder: Path,
    tell: Tell = print,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Study:
    """Calibrate on the calibration inputs, then judge everything on the others; policies are saved to ``folder``.

    keep: what of a result is worth showing.
    """
    study = Study(subject)
    clock = _Clock(study, tell)
    observations, effects = _calibrate(subject, settings, clock)
    study.observations, study.effects = observations, effects
    study.choices = choices(observations, effects, settings)
    observations.save(folder / "observations.json")
    for sensitivities in effects:
        sensitivities.save(folder / f"effects_by_{sensitivities.by}.json")
    for name, choice in study.choices.items():
        tell(f"{name}: {choice}")
        choice.policy(subject.model).save(_policy_file(folder, name))
    clock.lap("calibration")

    exact = _judge(study, "exact", "recipe", _uniform(observations, "exact"), settings, None, keep)
    clock.lap("exact")
    for name in UNIFORM:
        _judge(study, name, "recipe", _uniform(observations, name), settings, exact, keep)
        clock.lap(name)
    for name, choice in study.choices.items():
        out = _judge(study, name, "adaptive", choice.policy(subject.model), settings, exact, keep, choice)
        if study.bitwise is None:
            stored = Policy.load(_policy_file(folder, name))
            study.bitwise = torch.equal(out, _outputs(subject, stored, settings))
            tell(f"stored, read back and applied again: {'the same bits' if study.bitwise else 'OTHER BITS'}")
        clock.lap(name)
        if not name.startswith("adaptive"):
            continue
        for seed in range(settings.random):
            other = choice.shuffled(seed)
            label = f"random {seed} like {name}"
            _judge(study, label, "random", other.policy(subject.model), settings, exact, keep, other, of=name)
        clock.lap(f"{settings.random} random policies like {name}")
    return study


def choices(observations: Observations, effects: Sequence[Sensitivity], settings: Settings) -> dict[str, Choice]:
    """The policies: for each share one by measured effects, for the first share also by scores and by the papers rule.

    A policy is given an error budget; which one leaves the wanted share of the calls at 4 bits is read off the Pareto
    curve.
    """
    found: dict[str, Choice] = {}
    offered = [*CANDIDATES, "exact"]
    for share in settings.shares:
        name = f"adaptive {100 * share:.0f}"
        curve = pareto(observations, recipes=offered, cost=settings.cost, effects=effects, points=_ALL_POINTS)
        point = _first(curve, share)
        found[name] = choose(
            observations, budget=point.error * (1 + 1e-9), recipes=offered, cost=settings.cost, effects=effects
        )
    first = settings.shares[0]
    curve = pareto(observations, recipes=offered, cost=settings.cost, points=_ALL_POINTS)
    point = _first(curve, first)
    found[f"by scores {100 * first:.0f}"] = choose(
        observations, budget=point.error * (1 + 1e-9), recipes=offered, cost=settings.cost
    )
    share = found[f"adaptive {100 * first:.0f}"].four_bit_share()
    found[f"papers rule {100 * first:.0f}"] = choose(
        observations, fraction=1 - share, recipes=(CHEAP, ACCURATE), cost=settings.cost
    )
    return found


def _first(curve: Sequence[Choice], share: float) -> Choice:
    """The most accurate point of a Pareto curve with that share of its calls at 4 bits."""
    for choice in curve:
        if choice.four_bit_share() >= share - 1e-9:
            return choice
    raise LowbitError(f"no choice runs {100 * share:.0f} % of the calls at 4 bits")


def _calibrate(subject: Subject, settings: Settings, clock: _Clock) -> tuple[Observations, list[Sensitivity]]:
    with observe(subject.model, CANDIDATES, timesteps=subject.timesteps, like=settings.like) as watch:
        for number in range(settings.runs):
            subject.calibrate(number, watch.restart)
    clock.lap("observing")
    found = []
    kinds: tuple[By, ...] = ("layer",) if subject.timesteps is None else ("layer", "timestep")
    for by in kinds:
        found.append(
            sensitivity(
                lambda applied: subject.calibrate(0, applied.restart),
                watch.observations,
                model=subject.model,
                by=by,
                metric=subject.distance,
                timesteps=subject.timesteps,
            )
        )
        clock.lap(f"effects by {by}")
    return watch.observations, found


def _policy_file(folder: Path, name: str) -> Path:
    return folder / f"policy_{name.replace(' ', '_')}.json"


def _uniform(observations: Observations, name: str) -> Policy:
    return Policy(routes={}, recipes={name: recipe(name)}, default=name, model=observations.model)


def _outputs(subject: Subject, policy: Policy, settings: Settings) -> Tensor:
    with policy.applied(
        subject.model, timesteps=subject.timesteps, like=settings.like, on_emulation="allow"
    ) as applied:
        return subject.outputs(applied.restart)


def _judge(
    study: Study,
    name: str,
    group: str,
    policy: Policy,
    settings: Settings,
    exact: Tensor | None,
    keep: Callable[[Tensor], Tensor] | None,
    choice: Choice | None = None,
    of: str = "",
) -> Tensor:
    out = _outputs(study.subject, policy, settings)
    values = {metric: v.cpu() for metric, v in study.subject.judge(out if exact is None else exact, out).items()}
    if choice is not None:
        four_bits, seconds = choice.four_bit_share(), choice.seconds
    else:
        four_bits, seconds = float(recipe(name).qk_bits == 4), _modelled(study, name, settings)
    study.rows.append(Row(name, group, four_bits, seconds, values, of))
    if keep is not None and group != "random":
        study.kept[name] = keep(out).cpu()
    return out


def _modelled(study: Study, name: str, settings: Settings) -> float:
    table = cost_table(settings.cost)
    if study.observations is None or not table.prices(name):
        return float("nan")
    return sum(table.seconds(name, record.shape) for record in study.observations.records.values())


class _Clock:
    """Seconds of each part, told as they pass."""

    def __init__(self, study: Study, tell: Tell) -> None:
        self._study, self._tell, self._last = study, tell, time.monotonic()

    def lap(self, name: str) -> None:
        """The part ``name`` is done."""
        now = time.monotonic()
        self._study.took[name] = now - self._last
        self._tell(f"[{now - self._last:6.1f} s] {self._study.subject.name}: {name}")
        self._last = now

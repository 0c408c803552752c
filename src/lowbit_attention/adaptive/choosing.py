"""`choose`: from observations to one recipe for each call, by a share, a threshold, or an error budget."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..errors import InvalidArgumentError, shown
from ..output.console import fitting, visible
from ..recipes.named import RECIPES
from ..recipes.named import recipe as find_recipe
from .clock import CallKey
from .costs import CostTable, cost_table
from .fingerprint import Fingerprint
from .optimise import Option, Solution, frontier, minimise_time
from .policy import Policy, PolicyMismatchError
from .records import Observations, Record

if TYPE_CHECKING:
    import torch

    from .sensitivity import Sensitivity

Mode = Literal["joint", "per-layer", "per-timestep"]
MODES: tuple[Mode, ...] = ("joint", "per-layer", "per-timestep")
Metric = Literal["l1", "rmse", "cos", "score"]
METRICS: tuple[Metric, ...] = ("l1", "rmse", "cos", "score")
"""What the error of a call is: relative L1, RMSE, 1 − CosSim, or 1 − CosSim · (1 − L1)."""
EXACT = "exact"


@dataclass(frozen=True)
class Choice:
    """One recipe for each observed call, and what that is expected to cost.

    error: the mean error of the calls (of ``metric``, or predicted effect if effects were given). seconds: modelled
    time of all calls; exact_seconds: if all were exact; bound: no choice within the budget takes less (NaN for the
    rules that optimise nothing). share: of the calls, by recipe. notes: what one should know.
    """

    observations: Observations
    recipes: dict[CallKey, str]
    rule: str
    mode: Mode
    metric: str
    cost: CostTable
    error: float
    seconds: float
    exact_seconds: float
    bound: float
    optimal: bool
    notes: tuple[str, ...]
    offered: tuple[str, ...]

    def share(self) -> dict[str, float]:
        """The share of the calls that each recipe runs, the largest first."""
        counts: dict[str, int] = {}
        for name in self.recipes.values():
            counts[name] = counts.get(name, 0) + 1
        total = max(1, len(self.recipes))
        return {name: n / total for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}

    def four_bit_share(self) -> float:
        """The share of the calls whose Q·K runs at 4 bits."""
        four = {n for n, r in self.observations.candidates.items() if r.qk_bits == 4}
        return sum(share for name, share in self.share().items() if name in four)

    def shuffled(self, seed: int) -> Choice:
        """As many groups with each recipe as here, but which ones is random: what a choice has to be better than."""
        groups = _groups(list(self.recipes), self.mode)
        picks = [self.recipes[keys[0]] for keys in groups]
        random.Random(seed).shuffle(picks)
        return self._with(
            {key: pick for keys, pick in zip(groups, picks, strict=True) for key in keys}, f"random, seed {seed}"
        )

    def uniform(self, recipe: str) -> Choice:
        """Every call by one recipe.

        Raises:
            InvalidArgumentError: neither exact nor a candidate that was observed.
        """
        if recipe != EXACT and recipe not in self.observations.candidates:
            raise InvalidArgumentError(f"{recipe!r} was not observed: {', '.join(self.observations.candidates)}")
        return self._with(dict.fromkeys(self.recipes, recipe), f"all {recipe}")

    def measured_by(self, metric: Metric) -> Choice:
        """The same recipes, their error in another metric."""
        return replace(self, metric=metric)._with(dict(self.recipes), self.rule)

    def _with(self, recipes: dict[CallKey, str], rule: str) -> Choice:
        records = self.observations.records
        errors = [
            _error(records[key], name, "l1" if self.metric == "effect" else self.metric)
            for key, name in recipes.items()
        ]
        priced = all(self.cost.prices(name) for name in recipes.values())
        seconds = math.fsum(_seconds(self.cost, records[k], n) for k, n in recipes.items()) if priced else math.nan
        error = math.nan if self.metric == "effect" else math.fsum(errors) / max(1, len(errors))
        return replace(
            self, recipes=recipes, rule=rule, error=error, seconds=seconds, bound=math.nan, optimal=False, notes=()
        )

    def policy(self, model: torch.nn.Module | None = None, default: str = EXACT) -> Policy:
        """The choice as a `Policy` that can be saved and applied to ``model``.

        Raises:
            InvalidArgumentError: the observations are of another model.
        """
        return make_policy(self, model, default)

    def __str__(self) -> str:
        shares = ", ".join(f"{100 * share:.0f} % {name}" for name, share in self.share().items())
        lines = [
            f"{self.rule}, {self.mode}: {shares}",
            f"modelled time {_ms(self.seconds)}, all exact {_ms(self.exact_seconds)}"
            f" ({self.exact_seconds / self.seconds:.2f}×)"
            * (self.seconds > 0)
            + f" by {self.cost.name}: {self.cost.summary}",
            f"{'predicted effect' if self.metric == 'effect' else f'mean error ({self.metric})'} {self.error:.5f}",
        ]
        if not math.isnan(self.bound):
            away = (self.seconds - self.bound) / self.seconds if self.seconds else 0.0
            lines.append("proved optimal" if self.optimal else f"at most {100 * away:.2g} % slower than the optimum")
        # (to be printed: on any console, and whatever stands in the names of modules)
        return fitting("\n".join([*lines, *(f"note: {visible(note)}" for note in self.notes)]))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def choose(
    observations: Observations,
    *,
    fraction: float | None = None,
    threshold: float | None = None,
    budget: float | None = None,
    recipes: Sequence[str] | None = None,
    cost: str | CostTable = "sm_89",
    mode: Mode = "joint",
    metric: Metric = "l1",
    effects: Sequence[Sensitivity] | Sensitivity = (),
) -> Choice:
    """One recipe for each call, by exactly one of three rules.

    Args:
        fraction: SageAttention2's rule: this share of the groups, those with the lowest score ``CosSim · (1 − L1)``
            of the cheap recipe, runs the accurate one (``recipes=(cheap, accurate)``), the rest the cheap one.
        threshold: each group runs the fastest recipe whose score is at least this in every one of its calls, or exact.
        budget: the fastest choice whose mean error over the calls is at most this.
        recipes: what may be chosen: names of candidates, or ``"exact"`` (which the last two rules always may). The
            default is every candidate that the cost table prices.
        cost: a table of modelled times: ``"sm_89"``, ``"sm_90"``, or one that `tune` made.
        mode: what is one group: every call (joint), a layer over all timesteps, a timestep over all layers.
        metric: the error that the budget is in; see `METRICS`.
        effects: measured end-to-end effects (`sensitivity`); the budget is then in their unit, the predicted sum.
            One by layer (or timestep) spreads each layer's effect over its calls by their L1; one of each multiplies.

    Raises:
        InvalidArgumentError: not exactly one rule, numbers out of range, a budget that nothing fits, recipes that were
            not observed or have no price.
    """
    rules = {"fraction": fraction, "threshold": threshold, "budget": budget}
    given = {name: value for name, value in rules.items() if value is not None}
    if len(given) != 1:
        raise InvalidArgumentError(f"give one of fraction, threshold and budget, got {', '.join(given) or 'none'}")
    if mode not in MODES or metric not in METRICS:
        raise InvalidArgumentError(
            f"mode={shown(mode)} is one of {', '.join(MODES)}; metric={shown(metric)} of {', '.join(METRICS)}"
        )
    ((rule, value),) = given.items()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max:  # (an integer may be beyond any float)
        raise InvalidArgumentError(f"{rule}={shown(value)} is no number from 0")
    if rule != "budget" and value > 1:
        raise InvalidArgumentError(f"{rule}={shown(value)} is above 1")
    table = cost_table(cost)
    chosen = Chooser(observations, table, mode, metric, _as_list(effects), recipes, pair=rule == "fraction")
    if rule == "fraction":
        return chosen.by_fraction(value)
    return chosen.by_threshold(value) if rule == "threshold" else chosen.by_budget(value)


def pareto(
    observations: Observations,
    *,
    recipes: Sequence[str] | None = None,
    cost: str | CostTable = "sm_89",
    mode: Mode = "joint",
    metric: Metric = "l1",
    effects: Sequence[Sensitivity] | Sensitivity = (),
    points: int = 60,
) -> list[Choice]:
    """The best choices from the most accurate to the fastest: the lower convex hull of error against modelled time."""
    chooser = Chooser(observations, cost_table(cost), mode, metric, _as_list(effects), recipes)
    return [chooser.choice(s, "Pareto") for s in frontier(chooser.options(), points)]


def _as_list(effects: Sequence[Sensitivity] | Sensitivity) -> list[Sensitivity]:
    return list(effects) if isinstance(effects, Sequence) else [effects]


def offered(
    known: Collection[str], table: CostTable, recipes: Sequence[str] | None, pair: bool = False
) -> tuple[list[str], list[str]]:
    """What may be chosen of the candidates ``known``, and notes on what may not; to be asked before they are scored.

    ``recipes``, ``table``: as in `choose`; ``pair``: for ``fraction``, the cheap one and the accurate one.

    Raises:
        InvalidArgumentError: recipes that are no candidates or have no price; no pair.
    """
    notes = []
    wanted = list(dict.fromkeys(recipes if recipes is not None else known))
    if unknown := [name for name in wanted if name != EXACT and name not in known]:
        raise InvalidArgumentError(f"{', '.join(unknown)}: not observed; observed were {', '.join(known)}")
    unpriced = [name for name in wanted if not table.prices(name)]
    if unpriced and (recipes is not None or len(unpriced) == len(wanted)):
        why = "; ".join(f"{name}: {table.why_not(name)}" for name in unpriced)
        raise InvalidArgumentError(f"cost table {table.name!r} has no price for {why}")
    if unpriced:
        notes.append(f"not offered, as {table.name} has no price for them: {', '.join(unpriced)}")
    found = [name for name in wanted if table.prices(name)]
    if idle := [] if pair else [name for name in found if not table.saves(name)]:
        notes += [f"{name} is not chosen: {table.provenance(name)}" for name in idle]
        found = [name for name in found if name not in idle]
    if pair:
        if len(found) != 2:
            raise InvalidArgumentError(f"fraction= needs recipes=(cheap, accurate), got {', '.join(found)}")
        return found, notes
    return [*found, *([EXACT] if EXACT not in found and table.prices(EXACT) else [])], notes


class Chooser:
    """What the rules share: the calls in groups, the recipes that may be chosen, and every group's options."""

    def __init__(
        self,
        observations: Observations,
        table: CostTable,
        mode: Mode,
        metric: Metric,
        effects: list[Sensitivity],
        recipes: Sequence[str] | None,
        pair: bool = False,
    ) -> None:
        everything = observations.records
        scored = {k: r for k, r in everything.items() if not r.problem and all(s.count for s in r.scores.values())}
        problems = [r.problem for r in everything.values() if r.problem]
        if not scored:
            why = f": {problems[0]}" if problems else ": no attention call with a row that counts"
            raise InvalidArgumentError(f"nothing was observed that a recipe could be chosen for{why}")
        self.observations, self.table, self.mode, self.metric = observations, table, mode, metric
        self.records = scored
        self.notes: list[str] = []
        self.offered, notes = offered(observations.candidates, table, recipes, pair)
        self.notes += notes
        self.groups = _groups(list(scored), mode)
        self.effects = effects
        self._factors = {name: self._effect_errors(name) for name in self.offered} if effects else {}
        if problems:
            first = " ".join(problems[0].split())
            self.notes.append(f"{len(problems)} calls are not in the choice, as no candidate runs them all: {first}")
        if unscored := len(everything) - len(scored) - len(problems):
            self.notes.append(f"{unscored} calls are not in the choice, as no row of theirs counts")

    def _effect_errors(self, recipe: str) -> dict[CallKey, float]:
        """Each call's part of the measured effects: its layer's effect by its part of the layer's L1, and so on."""
        l1 = {key: _error(r, recipe, "l1") for key, r in self.records.items()}
        total = math.fsum(l1.values())
        errors = dict(l1)
        for number, sensitivity in enumerate(self.effects):
            groups: dict[str | float, list[CallKey]] = {}
            for key in l1:
                groups.setdefault(sensitivity.group(key), []).append(key)
            everywhere = math.fsum(sensitivity.effect(g, recipe) for g in groups)
            for group, keys in groups.items():
                mine = math.fsum(l1[key] for key in keys)
                effect = sensitivity.effect(group, recipe)
                for key in keys:
                    if number == 0:
                        errors[key] = effect * l1[key] / mine if mine else effect / len(keys)
                    elif mine and everywhere:
                        errors[key] *= (effect / mine) / (everywhere / total)
        return errors

    def error(self, key: CallKey, recipe: str) -> float:
        """A call's error, or its part of the predicted effect."""
        if self.effects:
            return self._factors[recipe][key]
        return _error(self.records[key], recipe, self.metric)

    def options(self) -> list[list[Option]]:
        """Every group's options; errors are parts of the mean over the calls (of the sum, for effects)."""
        parts = 1 if self.effects else len(self.records)
        return [
            [
                Option(
                    name,
                    math.fsum(self.error(key, name) for key in keys) / parts,
                    math.fsum(_seconds(self.table, self.records[key], name) for key in keys),
                )
                for name in self.offered
            ]
            for keys in self.groups
        ]

    def by_fraction(self, fraction: float) -> Choice:
        cheap, accurate = self.offered
        order = sorted(range(len(self.groups)), key=lambda g: self._score(self.groups[g], cheap, worst=False))
        accurate_groups = set(order[: math.ceil(fraction * len(order) - 1e-9)])
        picks = [1 if g in accurate_groups else 0 for g in range(len(order))]
        del accurate
        return self._finish(picks, f"fraction {fraction:g}", math.nan, False)

    def by_threshold(self, threshold: float) -> Choice:
        picks = []
        for keys in self.groups:
            times = [math.fsum(_seconds(self.table, self.records[k], n) for k in keys) for n in self.offered]
            good = [
                i for i, n in enumerate(self.offered) if n == EXACT or self._score(keys, n, worst=True) >= threshold
            ]
            if not good:
                raise InvalidArgumentError(
                    f"no recipe offered ({', '.join(self.offered)}) reaches score {threshold:g} on {keys[0]}"
                )
            picks.append(min(good, key=lambda i: (times[i], i)))
        return self._finish(picks, f"threshold {threshold:g}", math.nan, False)

    def by_budget(self, budget: float) -> Choice:
        return self.choice(minimise_time(self.options(), budget), f"error budget {budget:g}")

    def choice(self, solution: Solution, rule: str) -> Choice:
        """A solution as a choice."""
        return self._finish(list(solution.picks), rule, solution.bound, solution.optimal)

    def _score(self, keys: list[CallKey], recipe: str, worst: bool) -> float:
        scores = [1.0 if recipe == EXACT else self.records[key].scores[recipe].score for key in keys]
        return min(scores) if worst else math.fsum(scores) / len(scores)

    def _finish(self, picks: list[int], rule: str, bound: float, optimal: bool) -> Choice:
        recipes = {key: self.offered[pick] for keys, pick in zip(self.groups, picks, strict=True) for key in keys}
        errors = [self.error(key, recipes[key]) for key in recipes]
        seconds = math.fsum(_seconds(self.table, self.records[key], name) for key, name in recipes.items())
        return Choice(
            observations=self.observations,
            recipes={key: recipes[key] for key in self.records},
            rule=rule,
            mode=self.mode,
            metric="effect" if self.effects else self.metric,
            cost=self.table,
            error=math.fsum(errors) / (1 if self.effects else len(errors)),
            seconds=seconds,
            exact_seconds=self._exact_seconds(),
            bound=bound,
            optimal=optimal,
            notes=tuple(self.notes + self._four_bit_notes(recipes)),
            offered=tuple(self.offered),
        )

    def _exact_seconds(self) -> float:
        if not self.table.prices(EXACT):
            return math.nan
        return math.fsum(_seconds(self.table, r, EXACT) for r in self.records.values())

    def _four_bit_notes(self, recipes: dict[CallKey, str]) -> list[str]:
        """Whether 4 bits were on offer and none was taken."""
        four = {n for n, r in self.observations.candidates.items() if r.qk_bits == 4}
        if four & set(self.offered) and not four & set(recipes.values()):
            return ["no call runs at 4 bits: none both keeps to the rule and saves time"]
        return []


def _groups(keys: list[CallKey], mode: Mode) -> list[list[CallKey]]:
    groups: dict[object, list[CallKey]] = {}
    for key in keys:
        group: object = key if mode == "joint" else (key.name, key.index) if mode == "per-layer" else key.timestep
        groups.setdefault(group, []).append(key)
    return list(groups.values())


def _error(record: Record, recipe: str, metric: str) -> float:
    if recipe == EXACT:
        return 0.0
    score = record.scores[recipe]
    if metric in ("cos", "score"):
        return max(0.0, 1.0 - (score.cos_sim if metric == "cos" else score.score))
    return score.l1 if metric == "l1" else score.rmse


def _seconds(table: CostTable, record: Record, recipe: str) -> float:
    return table.seconds(recipe, record.shape)


def make_policy(choice: Choice, model: torch.nn.Module | None, default: str) -> Policy:
    """A choice as a policy for ``model``."""
    seen = choice.observations
    if model is not None:
        if seen.model is None:
            raise InvalidArgumentError(
                "the observations were made without a model: their calls have no names of modules"
            )
        if differences := seen.model.differences(Fingerprint.of(model)):
            raise PolicyMismatchError(differences)
    names = dict.fromkeys([*choice.recipes.values(), find_recipe(default).name])
    known = {**seen.candidates, "exact": RECIPES["exact"]}
    return Policy(
        routes=dict(choice.recipes),
        recipes={name: known.get(name) or find_recipe(name) for name in names},
        default=find_recipe(default).name,
        model=seen.model,
        scores={key: {n: round(s.score, 6) for n, s in seen.records[key].scores.items()} for key in choice.recipes},
        about={
            "rule": choice.rule, "mode": choice.mode, "metric": choice.metric, "mean error": _finite(choice.error),
            "cost": choice.cost.name, "cost table": choice.cost.summary, "modelled seconds": _finite(choice.seconds),
            "modelled seconds, all exact": _finite(choice.exact_seconds), "scored like": seen.like,
            "share": {n: round(s, 4) for n, s in choice.share().items()}, "notes": list(choice.notes),
        },
    )  # fmt: skip


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if value == value and abs(value) != float("inf") else None

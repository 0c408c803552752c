"""A whole calibration: observe a subject, choose, and write everything to a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidArgumentError, LowbitError
from ..output.files import write_csv
from ..output.saving import check_writable
from ..recipes.machine import Machine, resolve_machine
from ..recipes.named import recipe as find_recipe
from .choosing import Choice, Metric, Mode, choose, offered
from .costs import CostTable, cost_table
from .observing import Observer, observe
from .records import Observations
from .report import write_report
from .scoring import Sample
from .sensitivity import Sensitivity, sensitivity
from .subjects import Subject, others_code
from .tuning import check_device, tune

POLICY, OBSERVATIONS, REPORT, SCORES = "policy.json", "observations.json", "report.html", "scores.csv"
EFFECTS = "effects-{}.json"


@dataclass(frozen=True)
class Rule:
    """How to choose: the arguments of `choose`; ``budget`` and the others as there."""

    fraction: float | None = None
    threshold: float | None = None
    budget: float | None = None
    recipes: tuple[str, ...] | None = None
    cost: str = "sm_89"
    mode: Mode = "joint"
    metric: Metric = "l1"


def check(folder: Path, rule: Rule, candidates: Sequence[str], like: str | Machine | None) -> None:
    """What can be known to fail before a model is run: recipes, their prices, the card to time, the folder to write.

    Raises:
        LowbitError: as `observe`, `choose` and `write_all` would, after the work.
    """
    recipes = [find_recipe(c) for c in candidates]
    names = list(dict.fromkeys(r.name for r in recipes))
    if len(names) < len(recipes) or any(r.is_exact for r in recipes):
        raise InvalidArgumentError(f"candidates must be different recipes that quantise, got {', '.join(candidates)}")
    if like is not None:
        for r in recipes:
            r.check_geometry(resolve_machine(like).geometry)
    if rule.cost == "this":
        check_device()
    else:
        wanted = None if rule.recipes is None else [find_recipe(r).name for r in rule.recipes]
        offered(names, cost_table(rule.cost), wanted, pair=rule.fraction is not None)
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"{folder} is a file, not a folder")
    for name in (POLICY, OBSERVATIONS, REPORT, SCORES):
        check_writable(folder / name)


def observe_subject(
    subject: Subject,
    candidates: Sequence[str],
    *,
    sample: Sample,
    like: str | Machine | None,
    resume: Observations | None,
    progress: Any,
    keep: Callable[[Observations], object] = lambda observations: None,
) -> Observations:
    """Run every prompt of a subject and score its calls.

    ``keep`` gets what was observed, also where the subject raised or Ctrl-C came on the way.

    Raises:
        InvalidArgumentError: the subject makes no call that can be observed, or raises.
    """
    watch: Observer | None = None
    try:
        with (
            torch.no_grad(),
            observe(
                subject.model, candidates, timesteps=subject.timesteps, sample=sample, like=like, resume=resume,
                progress=progress,
            ) as watch,
        ):  # fmt: skip
            for prompt in subject.prompts:
                watch.restart()
                with others_code(f"subject {subject.name}: its run"):
                    subject.run(prompt)
    finally:
        if watch is not None and watch.observations.records:
            keep(watch.observations)
    if not watch.observations.records:
        raise InvalidArgumentError(
            f"{subject.name}: no call of torch.nn.functional.scaled_dot_product_attention was seen while its model ran"
        )
    return watch.observations


def measure_effects(
    subject: Subject, observations: Observations, by: str, advance: Callable[[str], None] | None = None
) -> Sensitivity:
    """End-to-end effects on the subject's first prompt: how far its result moves."""

    def run(applied: Any) -> Any:
        applied.restart()
        with others_code(f"subject {subject.name}: its run"):
            return subject.run(subject.prompts[0])

    with torch.no_grad():
        return sensitivity(
            run, observations, model=subject.model, by=by, timesteps=subject.timesteps, advance=advance  # type: ignore[arg-type]
        )  # fmt: skip


def decide(observations: Observations, rule: Rule, effects: Sequence[Sensitivity] = ()) -> Choice:
    """The choice that a rule makes; cost ``"this"`` is timed first."""
    table: str | CostTable = rule.cost
    if rule.cost == "this":
        table = tune((r.shape for r in observations.records.values()), observations.candidates.values())
    return choose(
        observations, fraction=rule.fraction, threshold=rule.threshold, budget=rule.budget, recipes=rule.recipes,
        cost=table, mode=rule.mode, metric=rule.metric, effects=effects,
    )  # fmt: skip


def write_all(folder: Path, subject: Subject, choice: Choice, effects: Sequence[Sensitivity] = ()) -> list[Path]:
    """Write the policy, the observations, the report and the scores; the files written.

    Raises:
        LowbitError: the first that could not be written; the others are.
    """
    title = f"Adaptive attention: {subject.name}"
    jobs: dict[str, Callable[[Path], None]] = {
        POLICY: lambda path: choice.policy(subject.model).save(path),
        REPORT: lambda path: write_report(path, choice, title=title),
        OBSERVATIONS: lambda path: choice.observations.save(path),
        SCORES: lambda path: write_csv(path, choice.observations.rows()),
    }
    jobs |= {EFFECTS.format(one.by): one.save for one in effects}
    failed: LowbitError | None = None
    for name, write in jobs.items():
        try:
            write(folder / name)
        except LowbitError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return [folder / name for name in jobs]

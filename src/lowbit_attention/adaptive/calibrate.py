"""A whole calibration: observe a subject, choose, and write everything to a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidArgumentError
from ..machine import Machine
from ..report.files import write_csv
from .choosing import Choice, Metric, Mode, choose
from .costs import CostTable
from .observing import observe
from .records import Observations
from .report import write_report
from .scoring import Sample
from .sensitivity import Sensitivity, sensitivity
from .subjects import Subject
from .tuning import tune

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


def observe_subject(
    subject: Subject,
    candidates: Sequence[str],
    *,
    sample: Sample,
    like: str | Machine | None,
    resume: Observations | None,
    progress: Any,
) -> Observations:
    """Run every prompt of a subject and score its calls.

    Raises:
        InvalidArgumentError: the subject makes no call that can be observed.
    """
    with (
        torch.no_grad(),
        observe(
            subject.model, candidates, timesteps=subject.timesteps, sample=sample, like=like, resume=resume,
            progress=progress,
        ) as watch,
    ):  # fmt: skip
        for prompt in subject.prompts:
            watch.restart()
            subject.run(prompt)
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
    """Write the policy, the observations, the report and the scores; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    choice.observations.save(folder / OBSERVATIONS)
    choice.policy(subject.model).save(folder / POLICY)
    write_csv(folder / SCORES, choice.observations.rows())
    write_report(folder / REPORT, choice, title=f"Adaptive attention: {subject.name}")
    written = [folder / name for name in (POLICY, REPORT, OBSERVATIONS, SCORES)]
    for one in effects:
        written.append(folder / EFFECTS.format(one.by))
        one.save(written[-1])
    return written

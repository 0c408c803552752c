"""``lowbit calibrate``: from a model to a policy and a report."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.progress import Progress, TaskID

from ..adaptive import calibrate
from ..adaptive.calibrate import EFFECTS, OBSERVATIONS, REPORT, Rule
from ..adaptive.choosing import METRICS, MODES, Choice, Metric, Mode
from ..adaptive.observing import DEFAULT_CANDIDATES
from ..adaptive.records import Observations
from ..adaptive.scoring import Sample
from ..adaptive.sensitivity import By, Sensitivity
from ..adaptive.subjects import SUBJECTS, find_subject
from ..errors import InvalidArgumentError
from ..output.console import plain
from .common import LIKE_HELP, console, new_table, parse_like, progress, shaded

DEFAULT_BUDGET = 0.05
_SUBJECT_HELP = (
    f"What to calibrate: {', '.join(SUBJECTS)} (lm and dit: `pip install lowbit-attention-studies`), or "
    "`module:function`, a function of yours that returns a "
    "`lowbit_attention.adaptive.Subject` (the module is imported)."
)


def command(
    subject: Annotated[str, typer.Option("--subject", "-s", help=_SUBJECT_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the results.")],
    budget: Annotated[
        float | None,
        typer.Option(help=f"The fastest policy whose mean error is at most this (the default rule, {DEFAULT_BUDGET})."),
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="This share of the calls, the worst, runs the accurate one of two recipes.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Each call runs the fastest recipe with at least this CosSim · (1 − L1).")
    ] = None,
    recipes: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            help=f"A recipe to score and to choose from, repeatable: {', '.join(DEFAULT_CANDIDATES)} by default. "
            "With --fraction: the cheap one, then the accurate one.",
        ),
    ] = None,
    cost: Annotated[
        str, typer.Option(help="Times by: sm_89 (claimed by the papers), sm_90 (measured), this (timed on this GPU).")
    ] = "sm_89",
    mode: Annotated[str, typer.Option(help=f"What is decided on its own: {', '.join(MODES)}.")] = "joint",
    metric: Annotated[str, typer.Option(help=f"The error that --budget is in: {', '.join(METRICS)}.")] = "l1",
    effects: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure what each layer (`layer`) or timestep (`timestep`) does to the model's result, one run for "
            "each and recipe, and budget that instead; repeatable."
        ),
    ] = None,
    like: Annotated[str, typer.Option(help=LIKE_HELP + " `here`: what runs on this device.")] = "sm_89",
    heads: Annotated[int, typer.Option(min=1, help="Heads of each call that are scored.")] = 4,
    tiles: Annotated[int, typer.Option(min=1, help="Tiles of 128 queries of each head that are scored.")] = 2,
    resume: Annotated[
        bool, typer.Option("--resume", help=f"Add to the {OBSERVATIONS} that is in the folder already.")
    ] = False,
) -> None:
    """Measure a model's attention calls with every recipe, choose one for each, and show it all.

    Writes `policy.json` (apply it with `lowbit_attention.adaptive.Policy.load`), `report.html` (open it in any browser,
    offline), `observations.json` and `scores.csv`. The model's own output is exact while it is measured.

    * `lowbit calibrate --subject minilm --out out/minilm`: under two minutes on two cores
    * `lowbit calibrate -s minilm -o out --budget 0.08 --mode per-layer`: a looser budget
    * `lowbit calibrate -s dit -o out`: a diffusion transformer, so layers × timesteps (lm: a language model)
    * `lowbit calibrate -s minilm -o out --fraction 0.4 -r rotated_4b -r sage2_8b`: SageAttention2's rule
    * `lowbit calibrate -s my_model:make -o out --like here --cost this`: your model, on your GPU
    """
    rule = _rule(budget, fraction, threshold, recipes, cost, mode, metric)
    kinds = _kinds(effects)
    candidates = recipes or list(DEFAULT_CANDIDATES)
    machine = None if like == "here" else parse_like(like)
    calibrate.check(out, rule, candidates, machine)
    earlier = Observations.load(out / OBSERVATIONS) if resume else None
    start = time.perf_counter()
    found = find_subject(subject)
    with progress() as bar:
        observations = calibrate.observe_subject(
            found, candidates, sample=Sample(heads, tiles), like=machine, resume=earlier, progress=bar,
            keep=lambda seen: seen.save(out / OBSERVATIONS),
        )  # fmt: skip
        measured: list[Sensitivity] = []
        for kind in kinds:
            task = bar.add_task(f"effects by {kind}", total=None)
            tell = partial(_tell, bar, task)
            measured.append(calibrate.measure_effects(found, observations, kind, tell))
            measured[-1].save(out / EFFECTS.format(kind))
    choice = calibrate.decide(observations, rule, measured)
    _show(choice)
    written = calibrate.write_all(out, found, choice, measured)
    spent = observations.scoring_seconds / observations.attention_seconds if observations.attention_seconds else 0.0
    console.print(f"{time.perf_counter() - start:.0f} s; scoring took {spent:.1f} × the time of the attention itself")
    console.print(f"wrote {plain(', '.join(map(str, written)))}", soft_wrap=True)
    console.print(f"open {plain(out / REPORT)} in a browser", soft_wrap=True)


def _tell(bar: Progress, task: TaskID, what: str) -> None:
    bar.update(task, advance=1, description=what)


def _rule(
    budget: float | None,
    fraction: float | None,
    threshold: float | None,
    recipes: list[str] | None,
    cost: str,
    mode: str,
    metric: str,
) -> Rule:
    """The rule asked for; what can be wrong with it is found before the work."""
    if sum(x is not None for x in (budget, fraction, threshold)) > 1:
        raise InvalidArgumentError("give one of --budget, --fraction and --threshold")
    if fraction is not None and len(recipes or []) != 2:
        raise InvalidArgumentError("--fraction needs two recipes: -r cheap -r accurate")
    modes: dict[str, Mode] = {m: m for m in MODES}
    metrics: dict[str, Metric] = {m: m for m in METRICS}
    if mode not in modes or metric not in metrics:
        raise InvalidArgumentError(f"--mode is one of {', '.join(modes)}, --metric one of {', '.join(metrics)}")
    if fraction is None and threshold is None and budget is None:
        budget = DEFAULT_BUDGET
    for name, value, most in (("budget", budget, float("inf")), ("fraction", fraction, 1), ("threshold", threshold, 1)):
        if value is not None and not 0 <= value <= most:
            raise InvalidArgumentError(f"--{name} {value} is not between 0 and {most}")
    if cost not in ("sm_89", "sm_90", "this"):
        raise InvalidArgumentError(f"--cost {cost!r} is not one of sm_89, sm_90, this")
    return Rule(fraction, threshold, budget, tuple(recipes) if recipes else None, cost, modes[mode], metrics[metric])


def _kinds(effects: list[str] | None) -> list[By]:
    known: dict[str, By] = {kind: kind for kind in get_args(By)}
    if unknown := [kind for kind in effects or [] if kind not in known]:
        raise InvalidArgumentError(f"--effects {unknown[0]!r} is not one of {', '.join(known)}")
    return [known[kind] for kind in dict.fromkeys(effects or [])]


def _show(choice: Choice) -> None:
    seen = choice.observations
    table = new_table("mean relative L1 of each layer's calls", "layer", *seen.candidates, "runs")
    for name in seen.names[:40]:
        keys = [key for key in seen.records if key.name == name]
        cells = [shaded(sum(seen.records[k].scores[r].l1 for k in keys) / len(keys)) for r in seen.candidates]
        runs = [choice.recipes[k] for k in keys if k in choice.recipes]
        shares = {r: runs.count(r) for r in dict.fromkeys(runs)}
        what = next(iter(shares), "-") if len(shares) < 2 else ", ".join(f"{n}× {r}" for r, n in shares.items())
        table.add_row(plain(name), *cells, plain(what))
    console.print(table)
    console.print(str(choice), soft_wrap=True, markup=False)

"""``lowbit bench --steps``: whole steps of real models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import typer
from rich.table import Table

from ..bench.pictures import number
from ..bench.results import append_csv, check_csv
from ..bench.run import Note
from ..bench.step_models import STEP_MODELS, find_step_models
from ..bench.steps import StepResult, StepRow, StepSettings, fitting, run_steps
from ..bench.timing import Limits
from ..errors import InvalidArgumentError
from ..functional import find_recipe_or_auto
from ..integrations.call_report import CallKind
from ..output.console import plain
from ..output.files import write_json
from ..recipes.definition import Recipe
from .common import check_outputs, console, new_table, progress, write_results

STEP_SECONDS = 20.0
_MOST_KINDS_SHOWN = 4


def steps(
    device: torch.device,
    models: Sequence[str] | None,
    recipes: Sequence[str] | None,
    *,
    compiled: bool,
    tiny: bool,
    seconds: float | None,
    max_seconds: float | None,
    csv: Path | None,
    json: Path | None,
    commit: str | None,
) -> None:
    """Time the steps of these models, or of all that fit, and show and write what came of it.

    Raises:
        InvalidArgumentError, InvalidRecipeError: an unknown model or recipe; real sizes on a CPU; a file that is none.
        typer.Exit: nothing could be timed.
    """
    if device.type == "cpu" and not tiny:
        raise InvalidArgumentError("the models are for GPUs; on the CPU try tiny ones, to see that it works: --tiny")
    found: dict[str, str | Recipe] = {}
    for spec in recipes or ("auto",):
        recipe = find_recipe_or_auto(spec)
        found["auto" if recipe is None else recipe.name] = "auto" if recipe is None else recipe
    notes: list[Note] = []
    chosen = find_step_models(models) if models else list(STEP_MODELS.values())
    if not models:
        chosen, notes = fitting(chosen, device, tiny)
    check_outputs(csv, json)
    if csv:
        check_csv(csv, StepRow)
    limits = Limits(STEP_SECONDS if seconds is None else seconds, max_rounds=20)
    settings = StepSettings(device, tuple(found.values()), compiled, tiny, limits, max_seconds, commit)
    rows: list[StepRow] = []
    calls: list[dict[str, object]] = []
    try:
        with progress() as bar:
            task = bar.add_task("", total=len(chosen))
            say = lambda model, what: bar.update(task, description=f"{model.name}: {what}")  # noqa: E731
            for result in run_steps(chosen, settings, say):
                rows += result.rows
                notes += result.notes
                calls += _calls(result)
                if csv:
                    append_csv(csv, result.rows, StepRow)
                if result.rows:
                    bar.stop()  # the bar is on stderr, often the same terminal
                    console.print(_table(result))
                    bar.start()
                bar.advance(task)
    finally:  # what was measured is kept, whatever ended the run
        if csv and rows:
            console.print(f"appended {len(rows)} rows to {plain(csv)}", soft_wrap=True)
        print_notes(notes)
        document = {"rows": [asdict(r) for r in rows], "calls": calls, "notes": [asdict(note) for note in notes]}
        write_results((json, lambda path: write_json(path, document)))
    if not rows:
        console.print(
            "Nothing was timed. The models are classes of diffusers and transformers "
            "(`pip install diffusers transformers`); the smallest are --model bert-large and --model ltx-video, and "
            "--tiny tries any of them on any device."
        )
        raise typer.Exit(1)


def print_notes(notes: Sequence[Note]) -> None:
    """What was not measured, and why."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for note in notes:
        grouped.setdefault((note.provider, note.reason), []).append(note.shape)
    for (who, reason), places in grouped.items():
        at = ", ".join(dict.fromkeys(name for name in places if name))
        console.print(f"[yellow]not measured:[/] {plain(who + (f' at {at}' if at else ''))}: {plain(reason)}")


def _calls(result: StepResult) -> list[dict[str, object]]:
    """Each variant's attention calls of one step: who ran them, and why not a kernel."""
    return [
        {"model": result.model.name, "variant": variant, **asdict(kind), "calls": n}
        for variant, kinds in result.calls.items()
        for kind, n in kinds.items()
    ]


def _table(result: StepResult) -> Table:
    model, rows = result.model, result.rows
    columns = ("ms", "±%", "×torch", "attn", "mm", "rest", "calls", "L1", "GiB")
    table = new_table(f"{model.name}: {model.title}", "variant", *columns)
    table.collapse_padding, table.pad_edge = True, False  # ten columns in a console of 80
    best = min((row.median_ms for row in rows), default=0.0)
    for row in rows:
        ms = _milliseconds(row.median_ms)
        calls = (row.calls_kernels, row.calls_emulated, row.calls_torch)
        table.add_row(
            plain(f"{row.variant}*" if row.compiled else row.variant),
            f"[bold]{ms}[/]" if row.median_ms == best else ms,
            f"{50 * row.spread:.1f}",
            number(row.speedup, 2),
            *(_milliseconds(value) for value in (row.attention_ms, row.products_ms, row.rest_ms)),
            "-" if row.calls_torch is None else "/".join(str(n) for n in calls),
            number(row.l1, 4),
            "-" if row.peak_mib is None else f"{row.peak_mib / 1024:.1f}",
        )
    told = f"{rows[0].rounds} rounds; calls: by kernels/emulated/by torch" + "; * compiled" * any(
        r.compiled for r in rows
    )
    lines = [told + (f"; {result.reading}" if str(result.reading) else "")]
    lines += [f"{variant}: {_told(kinds)}" for variant, kinds in result.calls.items()]
    table.caption = "\n".join(map(plain, lines))
    return table


def _told(kinds: dict[CallKind, int]) -> str:
    """Who ran a step's attention calls, with the reasons that spoke against the recipe."""
    shown = [
        " ".join(
            [f"{n} {kind.implementation}"]
            + [kind.recipe] * (kind.recipe != "-")
            + [f"({kind.reason})"] * bool(kind.reason)
        )
        for kind, n in kinds.items()
    ]
    more = len(shown) - _MOST_KINDS_SHOWN
    return "; ".join(shown[:_MOST_KINDS_SHOWN]) + (f"; {more} kinds more" if more > 0 else "") if shown else "no call"


def _milliseconds(value: float | None) -> str:
    return (
        "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
    )

"""What the commands share: options, recipe lists, progress, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import InvalidArgumentError
from ..machine import MACHINES, Machine, resolve_machine
from ..recipe import Recipe
from ..recipes import RECIPES, recipe
from ..report.plots import check_plot

console = Console()
LIKE_HELP = f"Whose numbers to emulate: {', '.join(MACHINES)}. Default: sm_89 (an RTX 4090)."
RECIPE_HELP = (
    f"A recipe, repeatable: {', '.join(RECIPES)}; with changes: `sage2_4b:smooth_q=false,k_granularity=per_block`."
)


def parse_recipes(specs: Sequence[str] | None, default: Sequence[str]) -> list[Recipe]:
    """The recipes asked for, or the default ones, each once."""
    found: dict[str, Recipe] = {}
    for spec in specs or default:
        chosen = recipe(spec)
        found.setdefault(chosen.name, chosen)
    return list(found.values())


def parse_like(like: str | None) -> Machine | None:
    """The machine asked for, if any."""
    return None if like is None else resolve_machine(like)


def progress() -> Progress:
    """A progress bar on stderr that disappears when the work is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def check_outputs(csv: Path | None, json: Path | None, plot: Path | None) -> None:
    """Find out before the work, not after it, that a result cannot be written.

    Raises:
        InvalidArgumentError: a folder, or a plot's unknown ending. MissingExtraError: a plot without matplotlib.
    """
    for path in (csv, json, plot):
        if path is not None:
            if path.is_dir():
                raise InvalidArgumentError(f"{path} is a folder, not a file to write")
            path.parent.mkdir(parents=True, exist_ok=True)
    if plot is not None:
        check_plot(plot)


def new_table(title: str, first: str, *others: str) -> Table:
    """A table whose first column is left-aligned text and whose others are numbers."""
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def percent(value: float, digits: int = 3) -> str:
    """A similarity as a percentage."""
    return "-" if math.isnan(value) else f"{100 * value:.{digits}f}"


def shaded(l1: float) -> str:
    """An L1 error, coloured by what it means: green to 1 %, plain to 5 %, yellow to 15 %, red above."""
    text = f"{l1:.4f}"
    if l1 <= 0.01:
        return f"[green]{text}[/]"
    if l1 <= 0.05:
        return text
    return f"[yellow]{text}[/]" if l1 <= 0.15 else f"[red]{text}[/]"


def show(metric: str, value: float) -> str:
    """A number of `Metrics` as a table's cell."""
    if metric == "l1":
        return shaded(value)
    return percent(value) if metric == "cos_sim" else f"{value:.5f}"

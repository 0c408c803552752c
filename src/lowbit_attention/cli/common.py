"""What the commands share: options, recipe lists, progress, tables."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..errors import InvalidArgumentError, LowbitError
from ..output.console import as_text, plain
from ..output.console import console as new_console
from ..output.plots import check_plot
from ..output.saving import check_writable
from ..recipes.definition import Recipe
from ..recipes.machine import MACHINES, Machine, resolve_machine
from ..recipes.named import RECIPES, recipe

console = new_console()
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


class _Description(ProgressColumn):
    """What is being done: names of files, tensors and modules, so nothing in it is markup."""

    def render(self, task: Task) -> Text:
        return as_text(task.description)


def progress() -> Progress:
    """A progress bar on stderr that disappears when the work is done. Descriptions are plain text."""
    columns = (_Description(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stderr = new_console(stderr=True)
    # (in a file it would leave an empty line)
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


def check_outputs(*paths: Path | None, plot: Path | None = None, inputs: Iterable[Path | None] = ()) -> None:
    """Find out before the work, not after it, that a result cannot be written.

    Args:
        paths: the files that results go to, ``None`` for one that is not asked for; plot: a picture's.
        inputs: files that are read, which no result may replace.

    Raises:
        InvalidArgumentError: a folder or another thing that is no file, the same file twice, an input, or a plot's
            unknown ending. SaveError: it cannot be written. MissingExtraError: a plot without matplotlib.
    """
    taken = {_real(path): "is read, too" for path in inputs if path is not None}
    for path in (*paths, plot):
        if path is None:
            continue
        if path.is_dir():
            raise InvalidArgumentError(f"{path} is a folder, not a file to write")
        if why := taken.get(_real(path)):
            raise InvalidArgumentError(f"{path} {why}: name another file")
        taken[_real(path)] = "is named for two results"
    if plot is not None:
        check_plot(plot)
    for path in (*paths, plot):
        if path is not None:
            check_writable(path)


def _real(path: Path) -> str:
    return os.path.normcase(os.path.realpath(path))


def write_results(*results: tuple[Path | None, Callable[[Path], None]]) -> None:
    """Write every file that was asked for; what cannot be written keeps none of the others from it.

    Raises:
        LowbitError: the first that could not be written.
    """
    failed: LowbitError | None = None
    for path, write in results:
        if path is None:
            continue
        try:
            write(path)
        except LowbitError as error:
            failed = failed or error
        else:
            console.print(f"wrote {plain(path)}", soft_wrap=True)
    if failed is not None:
        raise failed


def new_table(title: str, first: str, *others: str) -> Table:
    """A table whose first column is left-aligned text and whose others are numbers; headings are plain text."""
    table = Table(title=plain(title), title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.add_column(plain(first), overflow="fold")
    for heading in others:
        table.add_column(plain(heading), justify="right", no_wrap=True)
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

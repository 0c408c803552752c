"""``lowbit inspect``: what the kernels' main loops cost, from their machine code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..backends.cuda.inspect.kernels import KernelCost, check_runs, inspect
from ..backends.cuda.inspect.machine_code import nvdisasm
from ..backends.cuda.instances import HEAD_DIMS, MMA_ARCHS, mma_recipes
from ..output.console import plain
from ..output.files import write_json
from ..output.saving import write_whole
from ..recipes.definition import Recipe
from ..recipes.named import recipe as find_recipe
from .common import RECIPE_HELP, check_outputs, console, new_table, progress, write_results


def command(
    arch: Annotated[
        list[str] | None, typer.Option("--arch", help=f"Repeatable: {', '.join(MMA_ARCHS)} (default sm_89).")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", "-r", help=f"Repeatable; default: all that run. {RECIPE_HELP}")
    ] = None,
    head_dim: Annotated[
        list[int] | None, typer.Option("--head-dim", "-d", help=f"Repeatable: {HEAD_DIMS} (default 128).")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a Markdown table to this file.")] = None,
) -> None:
    """Compile attention_mma and count its main loop's instructions. No GPU is needed.

    An iteration is 64 keys for 32 query rows of a warp; `other` are instructions that are no MMAs. The clocks are a
    multiprocessor's for one warp's iteration, by published rates; the slowest of the three bounds the TOPS.

    * `lowbit inspect --arch sm_89 -r sage2pp_8b -r sage2pp_4b`
    """
    jobs = []
    for a in arch or ["sm_89"]:
        if a not in MMA_ARCHS:
            raise typer.BadParameter(f"{a!r} is none of {', '.join(MMA_ARCHS)}", param_hint="--arch")
        for d in head_dim or [128]:
            if d not in HEAD_DIMS:
                raise typer.BadParameter(f"{d} is none of {HEAD_DIMS}", param_hint="--head-dim")
            jobs += [(find_recipe(r), d, a) for r in recipe or mma_recipes(a)]
    for job in jobs:
        check_runs(*job)
    check_outputs(json, markdown)
    nvdisasm()  # whether it is there
    rows = _inspect_all(jobs)
    title = "attention_mma: a main loop's iteration (64 keys × 32 rows of a warp)"
    for table in _tables(title, rows, console.width):
        console.print(table)
    document = {"rows": [asdict(row) | {"other_per_element": row.other_per_element} for row in rows]}
    write_results(
        (json, lambda path: write_json(path, document)),
        (markdown, lambda path: write_whole(path, markdown_table(rows))),
    )


def _inspect_all(jobs: list[tuple[Recipe, int, str]]) -> list[KernelCost]:
    """Their rows, in order; compilers run side by side."""
    rows = []
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        with progress() as bar:
            task = bar.add_task("compiling", total=len(jobs))
            for row in pool.map(lambda job: inspect(*job), jobs):
                rows.append(row)
                bar.advance(task)
    finally:  # after Ctrl-C, say, only what is being compiled is waited for
        pool.shutdown(wait=False, cancel_futures=True)
    return rows


def _tables(title: str, rows: list[KernelCost], width: int) -> Iterator[Table]:
    """As many tables, one below the other, as the columns need in this width; each tells the recipe, arch and d."""
    cells = [_cells(row) for row in rows]
    widths = [max(len(heading), *(len(line[c]) for line in cells)) + 1 for c, heading in enumerate(_HEAD)]
    room = width - min(widths[0], _WIDEST_RECIPE) - sum(widths[1:_KEYS])
    blocks: list[list[int]] = [[]]
    for column in range(_KEYS, len(_HEAD)):
        if blocks[-1] and sum(widths[c] for c in (*blocks[-1], column)) > room:
            blocks.append([])
        blocks[-1].append(column)
    for number, block in enumerate(blocks):
        columns = [*range(_KEYS), *block]
        table = new_table(title if number == 0 else "", *(_HEAD[c] for c in columns))
        table.collapse_padding, table.pad_edge, table.padding = True, False, (0, 1, 0, 0)
        table.columns[0].max_width = _WIDEST_RECIPE
        for line in cells:
            table.add_row(*(plain(line[c]) for c in columns))
        yield table


def _cells(row: KernelCost) -> list[str]:
    def number(x: float | None) -> str:
        return "–" if x is None else f"{x:.0f}"

    bound = "–" if row.bound_tops is None else f"{row.bound_tops:.0f} ({row.card})"
    return [
        row.recipe, row.arch, str(row.head_dim), row.tile, str(row.registers), str(row.spill_bytes),
        f"{row.smem_bytes / 1024:.1f}", str(row.mma), str(row.other), f"{row.other_per_element:.2f}",
        number(row.tensor_clocks), number(row.issue_clocks), number(row.mufu_clocks), bound,
    ]  # fmt: skip


def markdown_table(rows: list[KernelCost]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|---|---|" + "---:|" * (len(_HEAD) - 2)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


_HEAD = (
    "recipe", "arch", "d", "tile", "regs", "spill", "KiB", "MMA", "other", "per score", "MMA clk", "issue clk",
    "exp clk", "bound, TOPS",
)  # fmt: skip
_KEYS = 3
"""Columns that say which kernel a row is of."""
_WIDEST_RECIPE = 28
"""A longer name is folded: half of a narrow console is the numbers'."""

"""``lowbit inspect``: what the kernels' main loops cost, from their machine code."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..cuda.inspect import Row, inspect
from ..cuda.instances import HEAD_DIMS, MMA_ARCHS, mma_recipes
from ..recipes import recipe as find_recipe
from ..report.files import write_json
from .common import RECIPE_HELP, check_outputs, console, new_table, progress


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

    [bold]lowbit inspect --arch sm_89 -r sage2pp_8b -r sage2pp_4b[/bold]
    """
    check_outputs(markdown, json, None)
    jobs = []
    for a in arch or ["sm_89"]:
        if a not in MMA_ARCHS:
            raise typer.BadParameter(f"{a!r} is none of {', '.join(MMA_ARCHS)}", param_hint="--arch")
        for d in head_dim or [128]:
            if d not in HEAD_DIMS:
                raise typer.BadParameter(f"{d} is none of {HEAD_DIMS}", param_hint="--head-dim")
            jobs += [(find_recipe(r), d, a) for r in recipe or mma_recipes(a)]
    with progress() as bar, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        task = bar.add_task("compiling", total=len(jobs))
        rows = []
        for row in pool.map(lambda job: inspect(*job), jobs):
            rows.append(row)
            bar.advance(task)
    title = "attention_mma: a main loop's iteration (64 keys × 32 rows of a warp)"
    table = new_table(title, *_HEAD)
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    if json is not None:
        write_json(json, {"rows": [asdict(row) | {"other_per_element": row.other_per_element} for row in rows]})
    if markdown is not None:
        markdown.write_text(markdown_table(rows))
    for path in (json, markdown):
        if path is not None:
            console.print(f"wrote {path}")


def _cells(row: Row) -> list[str]:
    def number(x: float | None) -> str:
        return "–" if x is None else f"{x:.0f}"

    bound = "–" if row.bound_tops is None else f"{row.bound_tops:.0f} ({row.card})"
    return [
        row.recipe, row.arch, str(row.head_dim), row.tile, str(row.registers), str(row.spill_bytes),
        f"{row.smem_bytes / 1024:.1f}", str(row.mma), str(row.other), f"{row.other_per_element:.2f}",
        number(row.tensor_clocks), number(row.issue_clocks), number(row.mufu_clocks), bound,
    ]  # fmt: skip


def markdown_table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|---|---|" + "---:|" * (len(_HEAD) - 2)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


_HEAD = (
    "recipe", "arch", "d", "tile", "regs", "spill", "KiB", "MMA", "other", "per score", "MMA clk", "issue clk",
    "exp clk", "bound, TOPS",
)  # fmt: skip

"""``lowbit bench --random``: many random calls, which a cost model is fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer

from ..bench.base import Provider
from ..bench.results import append_csv, check_csv
from ..bench.run import Note, Settings, split_available
from ..bench.sampling import SampleRow, random_shapes, sample
from ..output.console import plain
from ..output.files import write_json
from .common import check_outputs, console, new_table, progress, write_results

TINY = 1e7
"""Operations of the largest call on a CPU, where it is only tried whether it works."""


def random_calls(
    count: int, seed: int, providers: Sequence[Provider], settings: Settings, csv: Path | None, json: Path | None
) -> None:
    """Time so many calls, and show and write what came of it: who was the fastest how often.

    Raises:
        InvalidArgumentError: a file that rows cannot be appended to. typer.Exit: nothing could be timed.
    """
    check_outputs(csv, json)
    if csv:
        check_csv(csv, SampleRow)
    options = {"most_flops": TINY, "least_flops": 0.0} if settings.device.type == "cpu" else {}
    shapes = random_shapes(count, seed, **options)
    available, notes = split_available(providers)
    rows: list[SampleRow] = []
    wins: dict[str, int] = {}
    timed = 0
    try:
        with progress() as bar:
            task = bar.add_task("random calls", total=len(shapes))
            for one in sample(shapes, available, settings) if available else ():
                rows += one.rows
                notes += one.notes
                timed += 1
                if one.rows:
                    fastest = min(one.rows, key=lambda row: row.us).provider
                    wins[fastest] = wins.get(fastest, 0) + 1
                if csv:
                    append_csv(csv, one.rows, SampleRow)
                bar.update(task, advance=1, description=one.shape.label)
    finally:  # what was measured is kept, whatever ended the run
        if csv and rows:
            console.print(f"appended {len(rows)} rows to {plain(csv)}", soft_wrap=True)
        document = {"rows": [asdict(row) for row in rows], "notes": [asdict(note) for note in notes]}
        write_results((json, lambda path: write_json(path, document)))
    table = new_table(f"{timed} random calls", "provider", "timed", "the fastest of them")
    for provider in providers:
        of = sum(row.provider == provider.name for row in rows)
        table.add_row(plain(provider.name), str(of), str(wins.get(provider.name, 0)))
    console.print(table)
    _print_reasons(notes)
    if not rows:
        raise typer.Exit(1)


def _print_reasons(notes: Sequence[Note]) -> None:
    """Why calls were not timed, and how many: there are too many to name each."""
    counts: dict[tuple[str, str], int] = {}
    for note in notes:
        counts[note.provider, note.reason] = counts.get((note.provider, note.reason), 0) + 1
    for (who, reason), count in counts.items():
        console.print(f"[yellow]not measured:[/] {plain(who)}, {count} ×: {plain(reason)}")

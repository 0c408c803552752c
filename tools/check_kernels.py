"""Compile the kernel manifest for every architecture, without a GPU, and check the machine code.

``make kernels`` compiles what CI wants, ``make kernels-all`` everything; ``--json FILE`` keeps the figures.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lowbit_attention.cli.common import progress
from lowbit_attention.cuda.instances import MANIFEST, Instance
from lowbit_attention.cuda.machine_code import problems
from lowbit_attention.jit.compiler import compile_source


def check(instance: Instance) -> dict[str, Any]:
    """Compile one instance; its resources, time and problems."""
    began = time.perf_counter()
    compiled = compile_source(instance.source(), instance.options())
    seconds = time.perf_counter() - began
    return {
        "instance": str(instance),
        "seconds": round(seconds, 2),
        "bytes": len(compiled.cubin),
        "resources": {name: dataclasses.asdict(used) for name, used in sorted(compiled.resources.items())},
        "problems": problems(instance, compiled),
    }


def main(
    only: Annotated[str, typer.Option(help="Instances whose description holds this text.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """Compile and check; exit code 1 if anything is wrong."""
    wanted = [instance for instance in MANIFEST if only in str(instance)]
    if not wanted:
        raise typer.BadParameter(f"no instance holds {only!r}")
    rows: list[dict[str, Any]] = []
    with progress() as bar, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        task = bar.add_task("compiling", total=len(wanted))
        for done in as_completed(pool.submit(check, instance) for instance in wanted):
            rows.append(done.result())
            bar.advance(task)
    rows.sort(key=lambda row: str(row["instance"]))
    table = Table("instance", "kernel", "registers", "spills", "KiB", "s")
    for row in rows:
        for name, used in row["resources"].items():
            spills = used["spill_stores"] + used["spill_loads"]
            size = f"{row['bytes'] / 1024:.0f}"
            table.add_row(row["instance"], name, str(used["registers"]), str(spills), size, str(row["seconds"]))
    console = Console(width=120)
    console.print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(rows, indent=2) + "\n")
    bad = [(row["instance"], problem) for row in rows for problem in row["problems"]]
    for instance, problem in bad:
        console.print(f"[red]{instance}: {problem}")
    console.print(f"{len(rows)} instances compiled, {len(bad)} problems")
    raise typer.Exit(1 if bad else 0)


if __name__ == "__main__":
    typer.run(main)

"""Compile the kernel manifest for every architecture, without a GPU, and check the machine code.

``make kernels`` compiles what CI wants, ``make kernels-all`` everything; ``--json FILE`` keeps the figures. The main
loops of `attention_mma` may not grow: tools/instruction_limits.json holds their instructions that are no MMAs;
``--tighten`` writes those that have become fewer.
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

from lowbit_attention.backends.cuda.inspect.kernels import main_loop
from lowbit_attention.backends.cuda.inspect.machine_code import disassemble, problems
from lowbit_attention.backends.cuda.instances import MANIFEST, MMA_ARCHS, Instance, MmaConfig, mma_config, mma_recipes
from lowbit_attention.backends.cuda.jit.compiler import compile_source
from lowbit_attention.cli.common import progress
from lowbit_attention.recipes.named import RECIPES

LIMITS = Path(__file__).with_name("instruction_limits.json")
NATIVE = ("sm_80", "sm_86", "sm_89", "sm_120")
"""Where `attention_mma` is at home; elsewhere the compiler makes its MMAs of others."""


OUT_OF_CI = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
"""Architectures whose instances with masks CI does not compile: the sources are those of sm_89, and all would take it
three times as long. ``make kernels-all`` does."""


def is_out_of_ci(instance: Instance) -> bool:
    """Whether CI leaves an instance out."""
    switches = dict(instance.defines)
    return instance.arch in OUT_OF_CI and any(
        mask in switches for mask in ("KEY_LIST", "MASK_BITS", "MASK_BIAS", "SEQUENCES")
    )


def limited() -> dict[str, MmaConfig]:
    """Configurations whose main loop is limited, by their instance's description."""
    found = (
        mma_config(RECIPES[n], d, arch)
        for arch in MMA_ARCHS
        if arch in NATIVE
        for d in (64, 128)
        for n in mma_recipes(arch)
    )
    return {str(config.instance()): config for config in found}


def check(instance: Instance) -> dict[str, Any]:
    """Compile one instance; its resources, time and problems."""
    began = time.perf_counter()
    compiled = compile_source(instance.source(), instance.options())
    seconds = time.perf_counter() - began
    config = limited().get(str(instance))
    other = None if config is None else main_loop(disassemble(compiled.cubin), config.own_mmas).other
    return {
        "instance": str(instance),
        "seconds": round(seconds, 2),
        "bytes": len(compiled.cubin),
        "resources": {name: dataclasses.asdict(used) for name, used in sorted(compiled.resources.items())},
        "other": other,
        "problems": problems(instance, compiled),
    }


def main(
    only: Annotated[str, typer.Option(help="Instances whose description holds this text.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    every: Annotated[bool, typer.Option(help="Also what CI leaves out: see OUT_OF_CI.")] = False,
    tighten: Annotated[
        bool, typer.Option(help="Lower the limits that are met with room, and set missing ones.")
    ] = False,
) -> None:
    """Compile and check; exit code 1 if anything is wrong."""
    wanted = [i for i in MANIFEST if only in str(i) and (every or only or not is_out_of_ci(i))]
    if not wanted:
        raise typer.BadParameter(f"no instance holds {only!r}")
    rows: list[dict[str, Any]] = []
    with progress() as bar, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        task = bar.add_task("compiling", total=len(wanted))
        for done in as_completed(pool.submit(check, instance) for instance in wanted):
            rows.append(done.result())
            bar.advance(task)
    rows.sort(key=lambda row: str(row["instance"]))
    limits: dict[str, int] = json.loads(LIMITS.read_text()) if LIMITS.exists() else {}
    for row in rows:
        if row["other"] is not None:
            limit = limits.get(row["instance"])
            if limit is None and not tighten:
                row["problems"].append(
                    f"no limit for its main loop of {row['other']} instructions (run with --tighten)"
                )
            elif limit is not None and row["other"] > limit:
                row["problems"].append(
                    f"its main loop has {row['other']} instructions that are no MMAs (limit {limit})"
                )
            elif tighten:
                limits[row["instance"]] = row["other"]
    if tighten:
        LIMITS.write_text(json.dumps(dict(sorted(limits.items())), indent=1) + "\n")
    table = Table("instance", "kernel", "registers", "spills", "loop", "KiB", "s")
    for row in rows:
        for name, used in row["resources"].items():
            spills = used["spill_stores"] + used["spill_loads"]
            size = f"{row['bytes'] / 1024:.0f}"
            loop = "" if row["other"] is None else str(row["other"])
            table.add_row(row["instance"], name, str(used["registers"]), str(spills), loop, size, str(row["seconds"]))
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

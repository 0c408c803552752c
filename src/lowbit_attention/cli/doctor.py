"""``lowbit doctor``: what is installed here and what can run."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer
from rich.table import Table

from ..doctor import Report, examine
from .common import console


def command(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, GPUs, driver, compiler and cache, which implementation can run what, and why the others cannot."""
    report = examine()
    if json:
        typer.echo(json_module.dumps(report.as_dict(), indent=2))
        return
    table = Table(title="this machine", title_justify="left", show_header=False)
    for name, value in report.versions.items():
        table.add_row(name, value)
    for gpu in report.gpus or ():
        table.add_row(f"GPU {gpu.index}", f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory_gib} GiB")
    if not report.gpus:
        table.add_row("GPU", "none that PyTorch can use")
    driver = f"{report.driver} (supports CUDA {report.driver_cuda})" if report.driver else "no NVIDIA driver found"
    table.add_row("driver", driver)
    table.add_row("NVRTC", ", ".join(f"{n} {v}" for n, v in report.nvrtc.items()) or "not installed")
    table.add_row("cache", report.cache + ("" if report.cache_writable else " (not writable)"))
    console.print(table)
    console.print(_abilities(report))
    for problem in report.problems:
        console.print(f"[yellow]problem:[/] {problem}")
    if not report.problems:
        console.print("no problems found")


def _abilities(report: Report) -> Table:
    """Recipes that can run and, grouped by their reasons, those that cannot."""
    table = Table(title="what can run", title_justify="left")
    for heading in ("device", "implementation", "runs", "does not run"):
        table.add_column(heading, overflow="fold")
    for device in dict.fromkeys(a.device for a in report.abilities):
        for name in dict.fromkeys(a.implementation for a in report.abilities):
            here = [a for a in report.abilities if a.device == device and a.implementation == name]
            runs = [a.recipe for a in here if not a.reasons]
            refused: dict[str, list[str]] = {}
            for a in here:
                for reason in a.reasons:
                    refused.setdefault(reason.replace(a.recipe, "…"), []).append(a.recipe)
            everyone = [a.recipe for a in here]
            why = "\n".join(f"{_names(who, everyone)}: {reason}" for reason, who in refused.items())
            table.add_row(device, name, _names(runs, everyone), why or "-")
    return table


def _names(some: list[str], everyone: list[str]) -> str:
    """The shorter of: who is among them, and who is not."""
    missing = [name for name in everyone if name not in some]
    if not missing:
        return "all"
    return "all but " + ", ".join(missing) if len(missing) < len(some) else ", ".join(some) or "none"

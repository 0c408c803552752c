"""``lowbit doctor``: what is installed here and what can run."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer
from rich.table import Table

from ..output.console import console, plain
from .diagnosis import Report, examine

NO_COMPILER = "nothing wrong was found; kernels cannot be compiled here"
"""Said in place of "no problems found" where none of the run-time compiler is installed."""


def command(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, GPUs, driver, compiler and cache, which implementation can run what, and why the others cannot."""
    report = examine()
    if json:
        typer.echo(json_module.dumps(report.as_dict(), indent=2))
        return
    screen = console()
    table = Table(title="this machine", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in _machine(report):
        table.add_row(plain(name), plain(value))
    screen.print(table)
    screen.print(_abilities(report))
    for problem in report.problems:
        screen.print(f"[yellow]problem:[/] {plain(problem)}", soft_wrap=True)  # (instructions to copy stay whole)
    if not report.problems:
        screen.print(
            "no problems found" if report.compiles else plain(f"{NO_COMPILER}: {report.compiler}"), soft_wrap=True
        )


def _machine(report: Report) -> list[tuple[str, str]]:
    """What is here, by name."""
    rows = list(report.versions.items())
    for gpu in report.gpus:
        rows.append((f"GPU {gpu.index}", f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory_gib} GiB"))
    if not report.gpus:
        rows.append(("GPU", "none that PyTorch can use"))
    driver = f"{report.driver} (supports CUDA {report.driver_cuda})" if report.driver else "no NVIDIA driver found"
    rows.append(("driver", driver))
    rows.append(("NVRTC", ", ".join(f"{n} {v}" for n, v in report.nvrtc.items()) or "not installed"))
    rows.append(("compiler", report.compiler if report.compiles else "does not work: " + report.compiler))
    rows.append(("cache", report.cache + (" (written and read back)" if report.cache_writable else " (not usable)")))
    return rows + [(f"shared kernels in {folder}", what) for folder, what in report.shared.items()]


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
            table.add_row(*map(plain, (device, name, _names(runs, everyone))), plain(why, lines=True) or "-")
    return table


def _names(some: list[str], everyone: list[str]) -> str:
    """The shorter of: who is among them, and who is not."""
    missing = [name for name in everyone if name not in some]
    if not missing:
        return "all"
    return "all but " + ", ".join(missing) if len(missing) < len(some) else ", ".join(some) or "none"

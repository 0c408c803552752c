"""The command ``lowbit``."""

from __future__ import annotations

import io
import sys
from typing import Any

import typer

from .. import __version__
from ..errors import LowbitError
from . import bench, calibrate, demo, doctor, evaluate, inspect, recipes, warmup

app = typer.Typer(
    name="lowbit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Quantised attention for inference: see what each recipe costs in accuracy, and what can run here.

    * `lowbit demo` — a real model, every recipe, layer by layer
    * `lowbit evaluate` — your own tensors, or synthetic inputs that break things
    * `lowbit calibrate` — measure a model call by call, choose a recipe for each, see it in a report
    * `lowbit bench` — how fast whole calls are here, ours and others'
    * `lowbit recipes` — what the recipes are
    * `lowbit doctor` — what is installed here and what can run
    * `lowbit warmup` — compile the kernels before they are needed
    * `lowbit inspect` — what the kernels' main loops cost, from their machine code
    """,
)
app.command("demo")(demo.command)
app.command("evaluate")(evaluate.command)
app.command("calibrate")(calibrate.command)
app.command("recipes")(recipes.command)
app.command("doctor")(doctor.command)
app.command("bench")(bench.command)
app.command("warmup")(warmup.command)
app.command("inspect")(inspect.command)

# typer carries its own copy of click since 0.25: the errors' base classes are reached through typer's public name.
_UsageError: Any = typer.BadParameter.__mro__[1]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lowbit-attention {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; wrong input gives one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console or file that has no ≤ shows a question mark, and goes on
            stream.reconfigure(errors="replace")
    try:
        code = app(args=arguments, standalone_mode=False)
    except LowbitError as error:
        _fail(" ".join(str(error).split()), 2)
    except _UsageError as error:
        if message := error.format_message().replace("\n", " "):
            _fail(message + " (see --help)", 2)
        sys.exit(2)  # no command: the help was shown
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}", 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"lowbit: {message}", file=sys.stderr)
    sys.exit(code)

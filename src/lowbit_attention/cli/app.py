"""The commands as one program, and what becomes of their errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import typer

from .._version import __version__
from ..errors import LowbitError
from . import bench, calibrate, demo, doctor, evaluate, inspect, recipes, tune, warmup
from .exit_codes import INTERRUPTED

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
    * `lowbit tune` — a minute of timing, so that `recipe="auto"` knows this GPU
    * `lowbit recipes` — what the recipes are
    * `lowbit doctor` — what is installed here and what can run
    * `lowbit warmup` — compile the kernels before they are needed
    * `lowbit inspect` — what the kernels' main loops cost, from their machine code
    """,
)


class _Interrupted(BaseException):
    """Ctrl-C on its way through typer, which would print an empty line for it."""


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def run_it(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise _Interrupted from None

    return run_it


for _module in (demo, evaluate, calibrate, recipes, doctor, bench, tune, warmup, inspect):
    app.command(_module.__name__.rpartition(".")[2])(_guarded(_module.command))

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


def run(arguments: list[str] | None) -> tuple[int, str]:
    """The exit code of a command line, and what to say on stderr, if anything."""
    try:
        code = app(args=arguments, standalone_mode=False)
    except LowbitError as error:
        lines = str(error).splitlines() or [type(error).__name__]
        # (what is an error's details, a compiler's log say, is for the library's users)
        first, *more = (line.strip() for line in (lines[:1] if getattr(error, "details", "") else lines))
        return 2, f"{first} {'; '.join(more)}"
    except _UsageError as error:
        message = error.format_message()
        return 2, f"{message} (see --help)" if message else ""  # no command: the help was shown
    except BrokenPipeError:
        raise
    except OSError as error:
        return 2, f"{error.filename or 'file'}: {error.strerror or error}"
    except (_Interrupted, typer.Abort):
        return INTERRUPTED, "interrupted"
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return 2, f"out of memory: {str(error).partition(chr(10))[0] or 'the sizes are too large for this machine'}"
    return (code if isinstance(code, int) else 0), ""


def _is_out_of_memory(error: Exception) -> bool:
    """Torch's allocator on the CPU has no error of its own."""
    kinds = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, kinds) or "allocate memory" in str(error) or "not enough memory" in str(error)

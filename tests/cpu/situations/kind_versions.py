"""Versions: what the package says of those it cannot run with, and what broke beside the lowest declared ones.

That the declared ones work is shown by installing them: `make matrix`, of which CI runs the two ends.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from situation import Situation, exits, gives, holds, refused
from typer.testing import CliRunner

import lowbit_attention
from lowbit_attention.cli.app import app

COMMANDS = ("demo", "evaluate", "calibrate", "recipes", "doctor", "bench", "warmup", "inspect")
SOURCE = Path(lowbit_attention.__file__).parents[1]


def import_beside(version: str) -> None:
    """What `import lowbit_attention` does first, beside this torch."""
    with mock.patch.object(torch, "__version__", version):
        lowbit_attention._check_torch()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def helps() -> list[str]:
    return [name for name in COMMANDS if (help_ := run(name, "--help")).exit_code or "Usage" not in help_.output]


@functools.cache
def without_numpy() -> list[str]:
    """What each step prints in a new process in which there is no numpy, and all warnings but torch's are errors."""
    steps = "from lowbit_attention import *; print(attention.__name__)", f"cli.main({list(EVALUATE)})"
    code = "; print('----'); from lowbit_attention import cli; ".join(steps)
    blocked = "import sys; sys.modules['numpy'] = None; import warnings, torch; warnings.simplefilter('error');"
    done = subprocess.run(
        [sys.executable, "-c", f"sys = __import__('sys'); sys.path.insert(0, {str(SOURCE)!r}); {blocked} {code}"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split("----\n")


EVALUATE = "evaluate", "-f", "normal", "-f", "sink", "--length", "16", "--heads", "1", "--head-dim", "16", "-r", "exact"

SITUATIONS = [
    Situation("T27", "torch 2.4.1", lambda _: import_beside("2.4.1"), refused(ImportError, "2.4.1", "torch>=2.5.1")),
    Situation("T27+", "a build of 2.4", lambda _: import_beside("2.4.0a0+git.nv24"), refused(ImportError, "2.4.0a0")),
    Situation("T27+", "torch 2.10 is not torch 2.1", lambda _: import_beside("2.10.0+cu130"), gives(None)),
    Situation("T28", "every command's help", lambda _: helps(), gives([])),
    Situation("T28+", "an option given twice", lambda _: run(*EVALUATE), exits(0, "normal", "sink")),
    Situation(
        "T29",
        "a command without numpy",
        lambda _: without_numpy()[1],
        holds(lambda text: "sink" in text),
    ),
    Situation(
        "T29+",
        "every name without numpy",
        lambda _: without_numpy()[0],
        gives("attention\n"),
    ),
    Situation("T30", "a command that there is not", lambda _: run("nope"), exits(2, "No such command")),
    Situation("T30+", "an option that there is not", lambda _: run("recipes", "--nope"), exits(2, "No such option")),
    Situation(
        "S21",
        "the marker for type checkers",
        lambda _: resources.files("lowbit_attention").joinpath("py.typed").is_file(),
        gives(True),
    ),
]  # fmt: skip

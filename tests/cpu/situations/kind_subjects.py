"""Subjects of `lowbit calibrate`: other people's code, which may do anything."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from commands import Ran, lowbit, one_line, written
from situation import Situation, holds

MODEL = "import torch\nfrom lowbit_attention.adaptive import Subject\n"


def subject(
    case: str, what: str, code: str, *words: str, name: str = "their_model:make", exit_code: int = 2
) -> Situation:
    """Calibrate with a module of this text, from the folder it lies in."""

    def act(folder: Path) -> Ran:
        written(folder, "their_model.py", code)
        with _chdir(folder):
            return lowbit("calibrate", "-s", name, "-o", folder / "out")

    return Situation(case, what, act, one_line(exit_code, *words))


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


RUNS = (
    MODEL
    + "class Net(torch.nn.Module):\n"
    + "    def forward(self, x): return torch.nn.functional.scaled_dot_product_attention(x, x, x)\n"
    + "net, x = Net(), torch.ones(1, 1, 8, 16)\n"
)
MAKE = "def make(): return Subject('s', net, [1], run)\n"
SITUATIONS = [
    subject("T25", "a module that does not parse", "def make(:\n", "importing their_model raised SyntaxError"),
    subject("T25", "a module that raises", "1 / 0\n", "raised ZeroDivisionError", "their_model.py, line 1"),
    subject("T25", "a module that calls sys.exit", "import sys\nsys.exit(0)\n", "called sys.exit(0)"),
    subject(
        "T25+",
        "one that imports what is not there",
        "import nothing_of_the_kind\n",
        "ModuleNotFoundError",
        "nothing_of_the_kind",
    ),
    subject("T25", "Ctrl-C while it is imported", "raise KeyboardInterrupt\n", "interrupted", exit_code=130),
    subject("T25", "a relative name", "", "Python's names", name=".their_model:make"),
    subject("T25+", "a path", "", "Python's names", name="./their_model.py:make"),
    subject("T25+", "a name of nothing but dots", "", "Python's names", name="..:make"),
    subject("T25", "a function that is not there", "x = 1\n", "has no attribute 'make'"),
    subject("T25", "something that is no function", "make = 3\n", "make is no function"),
    subject(
        "T25",
        "a function that raises",
        "def make():\n    raise ValueError('a\\nb\\x1b[2J')\n",
        "make() raised ValueError: a b\\x1b[2J",
        "line 2",
    ),
    subject("T25+", "one that exits", "def make():\n    raise SystemExit('no')\n", "make() called sys.exit('no')"),
    subject("T25+", "one that wants arguments", "def make(a): pass\n", "make() raised TypeError"),
    subject("T25", "one that returns something else", "def make(): return 3\n", "returned a int, not a Subject"),
    subject(
        "T25",
        "a subject that raises",
        RUNS + "def run(p): net(x); raise OSError('gone')\n" + MAKE,
        "its run raised OSError: gone",
    ),
    subject("T25+", "a subject that exits", RUNS + "def run(p): raise SystemExit(0)\n" + MAKE, "called sys.exit(0)"),
    subject(
        "T25", "Ctrl-C in its run", RUNS + "def run(p): raise KeyboardInterrupt\n" + MAKE, "interrupted", exit_code=130
    ),
    subject(
        "T25+",
        "a subject without a model",
        MODEL + "def make(): return Subject('s', None, [1], print)\n",
        "model is a NoneType",
    ),
    subject(
        "T25+", "a subject without a prompt", RUNS + "def make(): return Subject('s', net, [], net)\n", "prompts is []"
    ),
    Situation(
        "T35",
        "what was observed before the subject raised is kept",
        lambda f: _kept_observations(f),
        holds(lambda found: found == (2, 2, ["(model)"])),
    ),
]


def _kept_observations(folder: Path) -> tuple[Any, int, list[str]]:
    code = RUNS + "def run(p):\n    net(x)\n    assert p < 2\ndef make(): return Subject('s', net, [1, 2], run)\n"
    ran = subject("", "", code).act(folder)
    seen = json.loads((folder / "out" / "observations.json").read_text(encoding="utf-8"))
    return ran.exit_code, seen["calls"][0]["count"], [c["name"] for c in seen["calls"]]

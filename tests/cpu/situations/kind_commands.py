"""Command lines: what is refused, when, and in how many lines; and what reaches the terminal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from commands import Ran, lowbit, one_line, written
from situation import Situation

SMALL = ("--length", 64, "--heads", 1, "--head-dim", 16)


def command(case: str, what: str, expect: Any, *arguments: object) -> Situation:
    """``{}`` in an argument is the empty folder."""
    return Situation(case, what, lambda f: lowbit(*(str(a).replace("{}", str(f)) for a in arguments)), expect)


@contextlib.contextmanager
def unwritable() -> Iterator[None]:
    """A disk that takes no new file (the tests may run as root, whom no mode stops)."""
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *rest, **options)

    os.open = refuse
    try:
        yield
    finally:
        os.open = real


@contextlib.contextmanager
def no_work() -> Iterator[None]:
    """Whatever measures, loads or compiles fails the test: it should not have been reached."""
    from lowbit_attention.cli import bench, calibrate, demo, evaluate, inspect

    def reached(*_: Any, **__: Any) -> Any:
        raise AssertionError("the work began")

    places = [
        (evaluate, "_inputs"),
        (calibrate, "find_subject"),
        (demo, "MiniLM"),
        (bench, "run"),
        (inspect, "inspect"),
    ]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, reached)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def early(case: str, what: str, words: tuple[str, ...], *arguments: object, disk: bool = True) -> Situation:
    """Refused before the work; without ``disk`` nothing can be written."""

    def act(folder: Path) -> Ran:
        written(folder, "in.pt", b"")
        (folder / "taken" / "policy.json").mkdir(parents=True)
        with no_work(), contextlib.nullcontext() if disk else unwritable():
            return lowbit(*(str(a).replace("{}", str(folder)) for a in arguments))

    return Situation(case, what, act, one_line(2, *words))


CALIBRATE = ("calibrate", "-s", "x:y", "-o", "{}/out")
EARLY = [
    early(
        "T35",
        "calibrate by a table without the recipe",
        ("'sm_90' has no price for int8_u8",),
        *CALIBRATE,
        "-r",
        "int8_u8",
        "--cost",
        "sm_90",
    ),
    early("T35", "calibrate timed on a GPU that is not there", ("CUDA device",), *CALIBRATE, "--cost", "this"),
    early("T35", "calibrate into a folder nobody can write", ("Read-only",), *CALIBRATE, disk=False),
    early(
        "T35+",
        "calibrate where a folder has a file's name",
        ("policy.json is a folder",),
        "calibrate",
        "-s",
        "x:y",
        "-o",
        "{}/taken",
    ),
    early("T35+", "calibrate with a recipe that is exact", ("recipes that quantise",), *CALIBRATE, "-r", "exact"),
    early("T35+", "calibrate with a recipe twice", ("different recipes",), *CALIBRATE, "-r", "sage1", "-r", "sage1"),
    early("T35+", "calibrate with an unknown recipe", ("'sage9'",), *CALIBRATE, "-r", "sage9"),
    early("T35+", "calibrate by a budget that is none", ("--budget nan",), *CALIBRATE, "--budget", "nan"),
    early("T35", "evaluate on a read-only disk", ("Read-only",), "evaluate", "--json", "{}/a.json", disk=False),
    early("T35+", "demo on a read-only disk", ("Read-only",), "demo", "--csv", "{}/a.csv", disk=False),
    early(
        "T35+",
        "bench on a read-only disk",
        ("Read-only",),
        "bench",
        "--device",
        "cpu",
        "-s",
        "1x1x8x16",
        "--markdown",
        "{}/a.md",
        disk=False,
    ),
    early(
        "T35+",
        "bench adds to a file on a read-only disk",
        ("Read-only",),
        "bench",
        "--device",
        "cpu",
        "-s",
        "1x1x8x16",
        "--csv",
        "{}/a.csv",
        disk=False,
    ),
    early("T35", "inspect on a read-only disk", ("Read-only",), "inspect", "--json", "{}/a.json", disk=False),
    early(
        "T23",
        "evaluate with --csv and --json to one file",
        ("named for two results",),
        "evaluate",
        "--csv",
        "{}/a",
        "--json",
        "{}/./a",
    ),
    early(
        "T23+",
        "bench with --json and --markdown to one file",
        ("named for two results",),
        "bench",
        "--device",
        "cpu",
        "-s",
        "1x1x8x16",
        "--json",
        "{}/a",
        "--markdown",
        "{}/a",
    ),
    early(
        "T23+",
        "evaluate with --json over its own input",
        ("is read, too",),
        "evaluate",
        "{}/in.pt",
        "--json",
        "{}/in.pt",
    ),
    early("T34+", "evaluate with --json to a device", ("is a device",), "evaluate", "--json", "/dev/full"),
    command("T25", "evaluate with a length beyond memory", one_line(2, "of memory"), "evaluate", "--length", 10**12),
    command("T25", "evaluate with a length of 30 digits", one_line(2, "of memory"), "evaluate", "--length", 10**30),
    command("T25+", "evaluate with that many heads", one_line(2, "of memory"), "evaluate", "--heads", 10**15),
    command(
        "T25+",
        "bench on the CPU with a shape beyond memory",
        one_line(2, "of memory"),
        "bench",
        "--device",
        "cpu",
        "-s",
        "1x8x999999999x64",
    ),
    command(
        "T25+",
        "bench with a shape of 30 digits",
        one_line(2, "is not batch"),
        "bench",
        "--device",
        "cpu",
        "-s",
        f"1x8x{10**30}x64",
    ),
    command(
        "T25+",
        "bench for nan seconds",
        one_line(2, "--max-seconds"),
        "bench",
        "--device",
        "cpu",
        "-s",
        "1x1x8x16",
        "--max-seconds",
        "nan",
    ),
    early("T36", "inspect -r exact", ("no kernel for recipe exact", "it quantises"), "inspect", "-r", "exact"),
    early("T36", "inspect -r int8_u8", ("no kernel for recipe int8_u8", "pv_format=u8"), "inspect", "-r", "int8_u8"),
    early(
        "T37",
        "inspect -r fast_8b --arch sm_80",
        ("no kernel for recipe fast_8b on sm_80", "no FP8"),
        "inspect",
        "-r",
        "fast_8b",
        "--arch",
        "sm_80",
    ),
    early(
        "T36+",
        "inspect one that runs and one that does not",
        ("no kernel for recipe sage1:smooth_v=true",),
        "inspect",
        "-r",
        "sage2_8b",
        "-r",
        "sage1:smooth_v=true,pv_format=fp16,row_sum=rounded",
    ),
]


SITUATIONS = EARLY

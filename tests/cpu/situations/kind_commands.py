"""Command lines: what is refused, when, and in how many lines; and what reaches the terminal."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import torch
from commands import Ran, lowbit, one_line, shows, written
from situation import Situation, holds

from lowbit_attention import cli
from lowbit_attention.adaptive import choose
from lowbit_attention.cuda import inspect as cuda_inspect

T = torch.randn(1, 1, 8, 16, generator=torch.Generator().manual_seed(0))
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

# ---- what is shown


def evaluated(file: str, prefix: str, *options: object, q: torch.Tensor = T) -> Callable[[Path], Ran]:
    """`lowbit evaluate` of a file of this name, whose tensors have this prefix."""

    def act(folder: Path) -> Ran:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({f"{prefix}.{r}" if prefix else r: q if r == "q" else T for r in "qkv"}, path)
        return lowbit("evaluate", path, "-r", "sage2_8b", *(str(o).replace("{}", str(folder)) for o in options))

    return act


SHOWN = [
    Situation("T22", "a tensor named a[/red].q", evaluated("a.pt", "a[/red]"), shows("a[/red]")),
    Situation("T22", "a file x[/y].json", evaluated("a.pt", "", "--json", "{}/x[/y].json"), shows("x[/y].json")),
    Situation(
        "T22", "a folder [bold]", evaluated("[bold]/a.pt", "", "--json", "{}/[bold]/o.json"), shows("/[bold]/o.json")
    ),
    Situation(
        "T22", "escapes in a tensor's name", evaluated("a.pt", "a\x1b[2J\x07\x9b31m"), shows("a\\x1b[2J\\x07\\x9b31m")
    ),
    Situation(
        "T22+", "a link in a tensor's name", evaluated("a.pt", "\x1b]8;;http://x\x1b\\a"), shows("\\x1b]8;;http://x")
    ),
    Situation(
        "T22+",
        "line ends and turned text",
        evaluated("a.pt", "a\r\nb\u202ec"),
        shows("a\\r\\nb\\u202ec", hides=("\r", "\u202e")),
    ),
    Situation("T22+", "a backslash at the end", evaluated("a.pt", "a\\"), shows("a\\")),
    Situation("T22+", "an emoji's code", evaluated("a.pt", ":smile:"), shows(":smile:")),
    command("T22+", "markup in what is refused", one_line(2, "no file [/x]"), "evaluate", "[/x]"),
    command("T22+", "escapes in what is refused", one_line(2, "\\x1b[2J"), "evaluate", "\x1b[2J.pt"),
    command("T22+", "escapes in an option", one_line(2, "\\x1b[2J"), "evaluate", "--like", "\x1b[2J"),
    command("T22+", "line ends in a command", one_line(2, "No such command"), "a\nb"),
    Situation(
        "T23", "evaluate on NaN says so, and its JSON is JSON", lambda f: _nan(f), holds(lambda found: found == [None])
    ),
    Situation(
        "T23+",
        "a file whose second set cannot be run keeps the first",
        lambda f: _second(f),
        holds(lambda found: found == (2, ["a"])),
    ),
    Situation(
        "S16",
        "a table on a console of cp1251",
        lambda f: _on_console("cp1251", "evaluate", "-f", "normal", "-r", "sage2_8b", *SMALL),
        holds(lambda text: "relative L1" in text and "?" not in text),
    ),
    Situation(
        "S16+",
        "a choice printed on cp1251, with an escape in a name",
        lambda _: _printed("cp1251", replace(choose(cases.made_up(), budget=0.05), notes=("a\x1b[2J",))),
        holds(lambda text: "x) by sm_89" in text and "note: a\\x1b[2J" in text),
    ),
    Situation("T36", "inspect at 80 columns", lambda _: _inspected(80), holds(lambda lines: _readable(lines, 80, 3))),
    Situation(
        "T36+", "inspect at 200 columns", lambda _: _inspected(200), holds(lambda lines: _readable(lines, 200, 1))
    ),
]


def _on_console(encoding: str, *arguments: object) -> str:
    """What a console of this encoding gets on stdout."""
    raw = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding=encoding)) as out:
        with contextlib.suppress(SystemExit):
            cli.main([str(a) for a in arguments])
        out.flush()
    return raw.getvalue().decode(encoding)


def _printed(encoding: str, thing: Any) -> str:
    raw = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding=encoding)) as out:
        print(thing)
        out.flush()
    return raw.getvalue().decode(encoding)


def _strict(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def _nan(folder: Path) -> list[Any]:
    ran = evaluated("a.pt", "", "--json", "{}/o.json", q=T.where(T < 1, math.nan))(folder)
    assert ran.exit_code == 0, ran.output
    assert re.search(r"note: a: \d+ of q are NaN or infinite", ran.out), ran.out
    return [row["l1"] for row in _strict(folder / "o.json")["rows"]]


def _second(folder: Path) -> tuple[int, list[str]]:
    sets = {f"a.{r}": T for r in "qkv"} | {f"b.{r}": T for r in "qk"} | {"b.v": T[:, :, :4]}
    torch.save(sets, folder / "in.pt")
    ran = lowbit("evaluate", folder / "in.pt", "-r", "sage2_8b", "--json", folder / "o.json")
    assert "different lengths" in ran.err, ran.err
    assert ran.err.count("\n") == 1
    return ran.exit_code, [row["input"] for row in _strict(folder / "o.json")["rows"]]


def _row(recipe: Any, head_dim: int, arch: str) -> cuda_inspect.Row:
    return cuda_inspect.Row(
        recipe.name,
        arch,
        head_dim,
        "128×64",
        recipe.smooth_q,
        False,
        255,
        0,
        49152,
        132,
        598,
        64,
        528.0,
        182.0,
        136.0,
        641.0,
        "RTX 4090",
    )


def _inspected(width: int) -> list[str]:
    """What `lowbit inspect` prints in a console of this width; nothing is compiled."""
    from lowbit_attention.cli import inspect

    real, before = (inspect.inspect, inspect.nvdisasm), os.environ.get("COLUMNS")
    inspect.inspect, inspect.nvdisasm = _row, lambda: ""  # type: ignore[assignment]
    os.environ["COLUMNS"] = str(width)
    try:
        ran = lowbit("inspect", "-r", "sage2pp_8b", "-r", "sage2_4b:q_granularity=per_warp,k_granularity=per_block")
    finally:
        inspect.inspect, inspect.nvdisasm = real
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    assert ran.exit_code == 0, ran.output
    return ran.out.splitlines()


def _readable(lines: list[str], width: int, tables: int) -> bool:
    """No line is too long, no heading or number is cut, and every table says which kernel a row is of."""
    from lowbit_attention.cli.inspect import _HEAD

    text = "\n".join(lines)
    cut = [heading for heading in _HEAD if heading not in text]
    return (
        max(map(len, lines)) <= width
        and not cut
        and "…" not in text
        and "641 (RTX 4090)" in text
        and len(re.findall(r"sage2pp_8b +sm_89 +128", text)) == tables
    )


SITUATIONS = [*EARLY, *SHOWN]

"""What commands show: names of files and tensors as they are, on any console; numbers that are none."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import cases
import torch
from commands import Ran, lowbit, one_line, shows
from kind_commands import SMALL, command
from situation import Situation, exits, holds

from lowbit_attention import cli
from lowbit_attention.adaptive import choose
from lowbit_attention.backends.cuda.inspect import kernels as cuda_inspect
from lowbit_attention.bench.run import Note

T = torch.randn(1, 1, 8, 16, generator=torch.Generator().manual_seed(0))


def evaluated(file: str, prefix: str, *options: object, q: torch.Tensor = T) -> Callable[[Path], Ran]:
    """`lowbit evaluate` of a file of this name, whose tensors have this prefix."""

    def act(folder: Path) -> Ran:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({f"{prefix}.{r}" if prefix else r: q if r == "q" else T for r in "qkv"}, path)
        return lowbit("evaluate", path, "-r", "sage2_8b", *(str(o).replace("{}", str(folder)) for o in options))

    return act


SITUATIONS = [
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
        "T31",
        "what to install, in bench",
        lambda _: _advised('not installed: pip install "lowbit-attention[cuda13]"'),
        holds(lambda text: 'pip install "lowbit-attention[cuda13]"' in text),
    ),
    command(
        "T31+",
        "what to install, where that is the error",
        one_line(2, '"lowbit-attention[plot]"') if importlib.util.find_spec("matplotlib") is None else exits(0),
        *("evaluate", "-f", "normal", "-r", "sage1", *SMALL, "--plot", "{}/a.png"),
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


def _advised(reason: str) -> str:
    """What `lowbit bench` prints where a provider cannot be timed for this reason."""
    from lowbit_attention.cli import bench

    with mock.patch.object(bench, "split_available", return_value=([], [Note("torch_default", "", reason)])):
        ran = lowbit("bench", "--device", "cpu", "-s", "1x1x8x16", "-p", "torch_default")
    assert ran.exit_code == 1, ran.output
    return " ".join(ran.out.split())


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


def _row(recipe: Any, head_dim: int, arch: str) -> cuda_inspect.KernelCost:
    return cuda_inspect.KernelCost(
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

    real, before = (inspect.inspect, inspect.nvdisasm), inspect.console._width
    inspect.inspect, inspect.nvdisasm = _row, lambda: ""  # type: ignore[assignment]
    inspect.console.width = width
    try:
        ran = lowbit("inspect", "-r", "sage2pp_8b", "-r", "sage2_4b:q_granularity=per_warp,k_granularity=per_block")
    finally:
        inspect.inspect, inspect.nvdisasm = real
        inspect.console._width = before
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

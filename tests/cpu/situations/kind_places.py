"""Where files are written to: links, devices, pipes, folders, modes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import written
from kind_policies import _pipe as pipe
from kind_policies import observations, policy
from situation import Situation, gives, holds, refused

from lowbit_attention.adaptive import Policy
from lowbit_attention.bench.results import append_csv
from lowbit_attention.errors import LowbitError, SaveError
from lowbit_attention.output.files import write_csv, write_json
from lowbit_attention.output.saving import replacing


def _kept(path: Path, act: Callable[[], Any]) -> tuple[int, str]:
    """The kind of what a path names after something was refused there, and why."""
    try:
        act()
    except LowbitError as error:
        return stat.S_IFMT(path.lstat().st_mode), str(error)
    raise AssertionError("was not refused")


def still(kind: int, *words: str) -> Callable[[Callable[[], Any]], None]:
    return holds(lambda found: found[0] == kind and all(w in found[1] for w in words) and "\n" not in found[1])


def _planted(folder: Path) -> tuple[str, list[str]]:
    """Save where links to a victim lie under every name that the old way took; the victim, and what is there after."""
    victim = written(folder, "victim", "mine")
    for name in ("p.json.part", "p.json.tmp", ".p.json.part"):
        (folder / name).symlink_to(victim)
    policy().save(folder / "p.json")
    Policy.load(folder / "p.json")
    return victim.read_text(), sorted(p.name for p in folder.iterdir() if not p.is_symlink())


def _by_link(folder: Path) -> tuple[bool, str]:
    (folder / "run").mkdir()
    (folder / "latest.json").symlink_to("run/p.json")
    policy().save(folder / "latest.json")
    return (folder / "latest.json").is_symlink(), Policy.load(folder / "run" / "p.json").default


def _mode(folder: Path) -> tuple[str, str]:
    old = os.umask(0o027)
    try:
        policy().save(folder / "new.json")
        written(folder, "old.json", "").chmod(0o600)
        policy().save(folder / "old.json")
    finally:
        os.umask(old)
    return oct((folder / "new.json").stat().st_mode & 0o777), oct((folder / "old.json").stat().st_mode & 0o777)


SITUATIONS = [
    Situation("T21", "links planted beside the file are not followed", _planted, gives(("mine", ["p.json", "victim"]))),
    Situation(
        "T21", "saving into a folder", lambda f: _kept(f, lambda: policy().save(f)), still(stat.S_IFDIR, "is a folder")
    ),
    Situation(
        "T21",
        "saving into a file's child",
        lambda f: _kept(written(f, "a", "x"), lambda: policy().save(f / "a" / "p.json")),
        still(stat.S_IFREG, "cannot be written", "Not a directory"),
    ),
    Situation(
        "T34",
        "/dev/full",
        lambda _: _kept(Path("/dev/full"), lambda: policy().save("/dev/full")),
        still(stat.S_IFCHR, "is a device"),
    ),
    Situation(
        "T34+",
        "/dev/null",
        lambda _: _kept(Path("/dev/null"), lambda: write_json(Path("/dev/null"), 1)),
        still(stat.S_IFCHR, "is a device"),
    ),
    Situation(
        "T34+",
        "a pipe",
        lambda f: _kept(pipe(f / "p"), lambda: observations().save(f / "p")),
        still(stat.S_IFIFO, "is a pipe"),
    ),
    Situation(
        "T34+",
        "a pipe for rows",
        lambda f: _kept(pipe(f / "p"), lambda: write_csv(f / "p", [{"a": 1}])),
        still(stat.S_IFIFO, "is a pipe"),
    ),
    Situation(
        "T34+",
        "a pipe for rows that are added",
        lambda f: _kept(pipe(f / "p"), lambda: append_csv(f / "p", [])),
        still(stat.S_IFIFO, "is a pipe"),
    ),
    Situation("T34+", "a link to a device", lambda f: _link_to_device(f / "p"), still(stat.S_IFLNK, "is a device")),
    Situation("T21+", "a symbolic link is written at its target", _by_link, gives((True, "exact"))),
    Situation("T21+", "the mode is the umask's, or the old file's", _mode, gives(("0o640", "0o600"))),
    Situation("T21+", "a name of 255 bytes", lambda f: policy().save(f / ("n" * 250 + ".json")), gives(None)),
    Situation(
        "T21+", "a name that is too long", lambda f: policy().save(f / ("n" * 300)), refused(SaveError, "too long")
    ),
    Situation("T21+", "what cannot be written leaves nothing behind", lambda f: _failed_write(f), gives([])),
]


def _link_to_device(path: Path) -> tuple[int, str]:
    path.symlink_to("/dev/null")
    return _kept(path, lambda: policy().save(path))


def _failed_write(folder: Path) -> list[str]:
    try:
        with replacing(folder / "a"):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return [p.name for p in folder.iterdir()]

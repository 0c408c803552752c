"""Kernels on disk: whatever lies in the cache folder, and wherever it is, a call gets its kernel or a clear line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from situation import Situation, gives, holds, refused
from typer.testing import CliRunner

from lowbit_attention.backends.cuda.instances import MANIFEST
from lowbit_attention.backends.cuda.jit.cache import KernelCache
from lowbit_attention.backends.cuda.jit.compiled import Compiled, Resources
from lowbit_attention.backends.cuda.jit.compiler import cache_key
from lowbit_attention.backends.cuda.jit.export import ExportFolder
from lowbit_attention.backends.cuda.jit.probe import Trial
from lowbit_attention.backends.cuda.jit.store import OwnStore, find_shared, write
from lowbit_attention.cli import diagnosis as doctor
from lowbit_attention.cli.app import app
from lowbit_attention.env import readonly_cache_dirs
from lowbit_attention.errors import LowbitError

KEY, OTHER_KEY = "ab" * 32, "cd" * 32
KERNEL = Compiled(b"\x7fELF machine code\n\x00", {"f": Resources(7, 0, 0, 0, 16)}, ("a remark",))
POSIX = hasattr(os, "geteuid")
Act = Callable[[Path], Any]


def entry_after(damage: Callable[[Path], object]) -> Act:
    """What the cache finds for a key whose entry was written, and then this happened to it."""

    def act(folder: Path) -> Compiled | None:
        own = OwnStore(folder / "kernels")
        own.keep(KEY, {}, KERNEL)
        assert own.find(KEY) == KERNEL
        damage(folder / "kernels" / f"{KEY}.bin")
        return OwnStore(folder / "kernels").find(KEY)

    return act


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """The entry is removed, and something else made in its place."""

    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def forged(header: Any, key: str = KEY) -> Callable[[Path], object]:
    """An entry whose digest is right and whose header is this (changes to a right one, or JSON text)."""

    def damage(path: Path) -> None:
        right = {"key": key, "made_of": {}, "resources": {}, "remarks": []}
        text = header if isinstance(header, str) else json.dumps({**right, **header})
        body = text.encode() + b"\ncode"
        path.write_bytes(b"lowbit-kernel 2\n" + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)

    return damage


def lock_that_is(make: Callable[[Path], object]) -> Act:
    """Whether a kernel is compiled and kept at once where this lies in place of its lock; and what else changed."""

    def act(folder: Path) -> tuple[bool, str]:
        precious = folder / "precious"
        precious.write_text("stays")
        own = OwnStore(folder / "kernels", lock_seconds=20)
        own.keep(OTHER_KEY, {}, KERNEL)
        make(folder / "kernels" / f"{KEY}.lock")
        began = time.monotonic()
        with own.one_process_at_a_time(KEY, "f.cu"):
            own.keep(KEY, {}, KERNEL)
        return own.find(KEY) == KERNEL and time.monotonic() - began < 10, precious.read_text()

    return act


def another_key(path: Path) -> None:
    """A whole entry of another key, copied under this one's name."""
    write(path.parent, OTHER_KEY, {}, KERNEL)
    os.replace(path.with_name(f"{OTHER_KEY}.bin"), path)


def flipped(at: int) -> Callable[[Path], object]:
    """One bit is another."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    return damage


def huge(path: Path) -> None:
    """A sparse file of a terabyte."""
    with path.open("r+b") as file:
        file.truncate(2**40)


ONE = {"registers": 1, "stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 0}
DAMAGE: list[tuple[str, str, Callable[[Path], object]]] = [
    ("T14", "an entry of another key, copied under this name", another_key),
    ("T14+", "a forged entry that names another key", forged({}, OTHER_KEY)),
    ("T15", "a link to /dev/zero", replaced(lambda p: p.symlink_to("/dev/zero"))),
    ("T15+", "a link to a good entry", lambda p: (p.rename(p.with_name("x")), p.symlink_to(p.with_name("x")))),
    ("T15+", "a folder", replaced(Path.mkdir)),
    ("T15+", "a terabyte", huge),
    ("T15+", "nothing in it", lambda p: p.write_bytes(b"")),
    ("T15+", "one bit of the header flipped", flipped(100)),
    ("T15+", "one bit of the code flipped", flipped(-1)),
    ("T15", "a header of deep nesting", forged("[" * 100_000 + "]" * 100_000)),
    ("T15", "a header that is a list", forged("[1]")),
    ("T15", "resources of the wrong types", forged({"resources": {"f": {**ONE, "registers": "many"}}})),
    ("T15+", "resources that are none", forged({"resources": {"f": {**ONE, "registers": True}}})),
    ("T15+", "resources with a number beyond all", forged({"resources": {"f": {**ONE, "shared": 10**40}}})),
    ("T15+", "resources of another form", forged({"resources": {"f": {}}})),
    ("T15+", "resources in a list", forged({"resources": ["f"]})),
    ("T15+", "remarks that are no texts", forged({"remarks": [1]})),
    ("T15+", "remarks in a text", forged({"remarks": "abc"})),
    ("T15+", "a header without end", lambda p: p.write_bytes(b"lowbit-kernel 2\n" + b"0" * 2**21)),
    ("T15+", "a number of 10,000 digits", forged('{"key": ' + "9" * 10_000 + "}")),
    ("T15+", "a header that is no text", forged('"\\ud800"')),
    ("T19+", "an entry of the form before this one", lambda p: p.write_bytes(b"lowbit-kernel\n{}\ncode")),
]
if POSIX:
    DAMAGE += [
        ("T15", "a FIFO", replaced(os.mkfifo)),
        ("T15+", "others can write it", lambda p: p.chmod(0o666)),
    ]


@contextlib.contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """These variables set (``None``: not there)."""
    with mock.patch.dict(os.environ, {k: v for k, v in variables.items() if v is not None}):
        for name in (name for name, value in variables.items() if value is None):
            os.environ.pop(name, None)
        yield


def own_store(chosen: str | None, **more: str | None) -> tuple[OwnStore, list[str]]:
    """The user's cache where the environment says, used three times; and the warnings."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lowbit_attention")
    logger.addHandler(handler)
    try:
        with environment(LOWBIT_CACHE_DIR=chosen, **more):
            store = OwnStore()
            store.keep(KEY, {}, KERNEL)
            store.keep(OTHER_KEY, {}, KERNEL)
            assert store.find(KEY) in (None, KERNEL)
    finally:
        logger.removeHandler(handler)
    return store, lines


def memory_only(*words: str) -> Callable[[tuple[OwnStore, list[str]]], bool]:
    """Nothing is kept, and one line says why and what to do."""

    def check(outcome: tuple[OwnStore, list[str]]) -> bool:
        store, lines = outcome
        (line,) = lines
        assert "\n" not in line
        assert len(line) < 500
        return store.usable() is None and all(word in line for word in ("memory only", "LOWBIT_CACHE_DIR", *words))

    return check


def kept(outcome: tuple[OwnStore, list[str]]) -> bool:
    """It is kept without a word."""
    return outcome[0].find(KEY) == KERNEL and outcome[1] == []


def a_file(folder: Path) -> str:
    """A file where the folder should be."""
    (folder / "file").write_text("in the way")
    return str(folder / "file")


def open_to_others(folder: Path, mode: int, below: str = "") -> str:
    """A folder with this mode, and a path in it."""
    (folder / "open").mkdir()
    (folder / "open").chmod(mode)
    return str(folder / "open" / below)


def new(folder: Path) -> Path:
    """The folder, made."""
    folder.mkdir()
    return folder


def link(folder: Path, to: str | Path) -> str:
    """A link to there."""
    (folder / "link").symlink_to(to)
    return str(folder / "link")


def own_modes(folder: Path) -> list[str]:
    """Modes of the folders that a cache makes, under a umask that gives others everything."""
    old = os.umask(0)
    try:
        own_store(str(folder / "a" / "b"))
    finally:
        os.umask(old)
    return [f"{p.stat().st_mode & 0o777:o}" for p in sorted((folder / "a").parent.rglob("*")) if p.is_dir()]


def nobodys(folder: Path) -> tuple[Path, ...]:
    """The shared folders of a cache, where the variable names the home folder of nobody."""
    with environment(LOWBIT_CACHE_READONLY="~nosuchuser/x"):
        return KernelCache(folder).shared


def relative(folder: Path) -> bool:
    """A relative folder, and the process moves on: the place stays, for those who ask again, too."""
    before = Path.cwd()
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    name = f"kept-{folder.name}"
    try:
        os.chdir(folder / "a")
        with environment(LOWBIT_CACHE_DIR=name):
            first = OwnStore()
            os.chdir(folder / "b")
            first.keep(KEY, {}, KERNEL)
            return OwnStore().find(KEY) == KERNEL and sorted(p.name for p in folder.glob("*/*")) == [name]
    finally:
        os.chdir(before)


def run_doctor(chosen: str, trial: Trial, nvrtc: dict[str, str] | None = None, *arguments: str, **more: str) -> str:
    """What ``lowbit doctor`` prints, with an outcome of compiling that is played."""
    with (
        environment(LOWBIT_CACHE_DIR=chosen, COLUMNS="200", **more),
        mock.patch.object(doctor, "try_compiler", return_value=trial),
        mock.patch.object(doctor, "installed_nvrtc", return_value=nvrtc or {}),
        mock.patch.object(doctor, "_abilities", return_value=[]),
    ):
        result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 0, result.output
    assert result.exception is None
    return " ".join(result.output.split())


WORKS = Trial(True, False, "compiled four lines")
BROKEN = Trial(False, False, 'NVRTC\'s library cannot be loaded: pip install "lowbit-attention[cuda13]"')
MISSING = Trial(False, True, 'not installed: pip install "lowbit-attention[cuda13]"')
PACKAGES = {"nvidia-cuda-nvrtc": "13.0.48"}


def says(*words: str, never: str = "\0") -> Callable[[str], bool]:
    """All the words, and not this."""
    return lambda text: all(word in text for word in words) and never not in text


def shared(make: Callable[[Path], object]) -> Act:
    """What is found in a folder that another user made by ``warmup --to``, after this."""

    def act(folder: Path) -> Compiled | None:
        exported = ExportFolder(folder / "shared")
        write(exported.folder / "kernels-2", KEY, {}, KERNEL, 0o644)
        make(exported.folder / "kernels-2" / f"{KEY}.bin")
        before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
        found = find_shared([folder / "missing", exported.folder], KEY)
        assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before  # never written
        return found

    return act


def modes(folder: Path) -> set[str]:
    """Of what ``warmup --to`` makes, under a umask that gives others nothing."""
    old = os.umask(0o077)
    try:
        exported = ExportFolder(folder / "shared" / "kernels")
        with mock.patch("lowbit_attention.backends.cuda.jit.cache.compile_source", return_value=KERNEL):
            exported.add(MANIFEST[0].source(), MANIFEST[0].options())
    finally:
        os.umask(old)
    return {f"{'d' if p.is_dir() else '-'}{p.stat().st_mode & 0o777:o}" for p in (folder / "shared").rglob("*")}


def run_warmup(chosen: str, *arguments: str) -> str:
    """What ``lowbit warmup`` prints for one kernel, compiled in play, with this cache folder."""
    one = ["--arch", "sm_90a", "--recipe", "pack sm_90a HEAD_DIM=64 INPUT_DTYPE=2"]
    with (
        environment(LOWBIT_CACHE_DIR=chosen),
        mock.patch("lowbit_attention.backends.cuda.jit.cache.compile_source", return_value=KERNEL),
        mock.patch("lowbit_attention.cli.warmup.cache", KernelCache),
    ):
        result = CliRunner().invoke(app, ["warmup", *one, *arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def shared_by_command(folder: Path) -> tuple[bool, bool, list[str]]:
    """``warmup --to`` a folder whose name is markup: what it prints, whether it is found, what the own cache has."""
    output = run_warmup(str(folder / "own"), "--to", str(folder / "[/z] y"))
    instance = next(i for i in MANIFEST if str(i).startswith("pack sm_90a HEAD_DIM=64 INPUT_DTYPE=2"))
    key = cache_key(instance.source(), instance.options())
    said = f"use them with: export LOWBIT_CACHE_READONLY='{folder}/[/z] y'" in output.splitlines()
    found = find_shared([folder / "[/z] y"], key) == KERNEL
    return said, found, [path.name for path in (folder / "own").rglob("*.bin")]


def readonly_names(folder: Path, *names: str) -> list[str]:
    """The folders that LOWBIT_CACHE_READONLY names, below ``folder``."""
    with environment(LOWBIT_CACHE_READONLY=os.pathsep.join(str(folder / n) if n else "" for n in names)):
        return [path.name for path in readonly_cache_dirs()]


SITUATIONS = [
    *(Situation(case, what, entry_after(damage), gives(None)) for case, what, damage in DAMAGE),
    Situation("T15+", "a lock that is a folder", lock_that_is(Path.mkdir), gives((True, "stays"))),
    Situation("T15+", "a lock that is a link", lock_that_is(lambda p: p.symlink_to(p.parent.parent / "precious")),
              gives((True, "stays"))),
    Situation("T15+", "an entry that nothing happened to", entry_after(lambda p: None), gives(KERNEL)),
    Situation("T17", "~nosuchuser", lambda f: own_store("~nosuchuser/x"), holds(memory_only("~nosuchuser"))),
    Situation("T17", "a file as folder", lambda f: own_store(a_file(f)), holds(memory_only("is not a folder"))),
    Situation("T17", "a path of 10,000 characters", lambda f: own_store(f"{f}/" + ("x" * 200 + "/") * 50),
              holds(memory_only("characters)"))),
    Situation("T17+", "a name of 10,000 characters", lambda f: own_store(str(f / ("x" * 10_000))),
              holds(memory_only("characters)"))),
    Situation("T17", "[/x] in the path", lambda f: own_store(str(f / "[/x]" / "[bold]")), holds(kept)),
    Situation("T17+", "an escape sequence in a path that cannot be", lambda f: own_store(a_file(f) + "/\x1b[2J"),
              holds(lambda o: memory_only()(o) and "\x1b" not in o[1][0])),
    Situation("T17", "a relative path, then chdir", relative, gives(True)),
    Situation("T17+", "a link to a folder of one's own", lambda f: own_store(link(f, new(f / "real"))), holds(kept)),
    Situation("T17+", "a link in a circle", lambda f: own_store(link(f, f / "link") + "/x"),
              holds(memory_only("link"))),
    Situation("T17", "doctor with [/x] in the path", lambda f: run_doctor(str(f / "[/x]"), WORKS),
              holds(says("[/x]/kernels-2 (written and read back)", "no problems found"))),
    Situation("T17", "doctor with a file as folder", lambda f: run_doctor(a_file(f), WORKS),
              holds(says("(not usable)", "problem: compiled kernels cannot be kept", "LOWBIT_CACHE_DIR",
                         never="no problems found"))),
    Situation("T18", "doctor where NVRTC does not load", lambda f: run_doctor(str(f), BROKEN, PACKAGES),
              holds(says("problem: NVRTC's library cannot be loaded", "[cuda13]", never="no problems found"))),
    Situation("T18+", "doctor where NVRTC is there and cuda-core is not",
              lambda f: run_doctor(str(f), MISSING, PACKAGES),
              holds(says("problem: not installed", "[cuda13]", never="no problems found"))),
    Situation("T31", "doctor where nothing is installed", lambda f: run_doctor(str(f), MISSING),
              holds(says('pip install "lowbit-attention[cuda13]"', never="no problems found"))),
    Situation("T31+", "doctor's JSON", lambda f: json.loads(run_doctor(str(f), BROKEN, PACKAGES, "--json"))["problems"],
              gives([BROKEN.text])),
    Situation("T16+", "doctor with a shared folder that is not there",
              lambda f: run_doctor(str(f), WORKS, None, LOWBIT_CACHE_READONLY=str(f / "[/y]")),
              holds(says("[/y]", "lowbit warmup --to", never="no problems found"))),
    Situation("T16", "a shared entry", shared(lambda p: None), gives(KERNEL)),
    Situation("T16+", "a shared entry of another key", shared(another_key), gives(None)),
    Situation("T16+", "a shared entry that is a folder", shared(replaced(Path.mkdir)), gives(None)),
    Situation("T16+", "several shared folders, and empty names", lambda f: readonly_names(f, "a", "", "b"),
              gives(["a", "b"])),
    Situation("T16+", "a shared folder of nobody", nobodys, gives(())),
    Situation("T16", "warmup --to, and what it prints", shared_by_command, gives((True, True, []))),
    Situation("T16+", "warmup where nothing can be kept", lambda f: run_warmup(a_file(f)),
              refused(LowbitError, "cannot be kept", "is not a folder", "LOWBIT_CACHE_DIR")),
    Situation("T16+", "warmup --to a file", lambda f: ExportFolder(Path(a_file(f))),
              refused(LowbitError, "cannot be written", "choose another folder")),
]  # fmt: skip
if POSIX:
    SITUATIONS += [
        Situation("T15+", "a lock that is a FIFO", lock_that_is(os.mkfifo), gives((True, "stays"))),
        Situation("T14", "a cache folder that everybody can write", lambda f: own_store(open_to_others(f, 0o777)),
                  holds(memory_only("can be written by other users (mode 777)", "chmod go-w"))),
        Situation("T14+", "a folder above it that a group can write",
                  lambda f: own_store(open_to_others(f, 0o770, "a/b")), holds(memory_only("(mode 770)"))),
        Situation("T14+", "entries in a sticky folder that everybody can write", lambda f: (
            OwnStore(Path(open_to_others(f, 0o1777))).usable()), gives(None)),
        Situation("T14+", "a folder of one's own in a sticky folder", lambda f: own_store(
            open_to_others(f, 0o1777, "mine")), holds(kept)),
        Situation("T14+", "a link to a folder that everybody can write", lambda f: own_store(
            link(f, open_to_others(f, 0o777))), holds(memory_only("open", "(mode 777)"))),
        Situation("T14+", "what is made is for this user alone", own_modes,
                  gives(["700", "700", "700"])),
        Situation("T16", "warmup --to makes what others can read", modes, gives({"d755", "-644"})),
    ]  # fmt: skip

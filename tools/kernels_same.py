"""Which kernel instances have other machine code than at another commit; needs no GPU.

``make kernels-same REF=main`` compares the working tree with a commit: every instance of both manifests is compiled
where its source or options differ, and those whose machine code does are named. A change that must cost the named
recipes nothing (a mend beside them, a tidied file) ends with none.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]


Ask = Callable[[list[str] | None], dict[str, Any]]


@contextlib.contextmanager
def package_in(tree: Path) -> Iterator[Ask]:
    """`answer` of the package below ``tree``, in a process of its own."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--answer", str(tree)],
        env=os.environ | {"PYTHONPATH": str(tree / "src")}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def ask(wanted: list[str] | None) -> dict[str, Any]:
            print(json.dumps(wanted), file=questions, flush=True)
            if not (line := answers.readline()):
                raise RuntimeError(f"the package below {tree} does not answer; it has said why")
            found: dict[str, Any] = json.loads(line)
            return found

        yield ask


_OLD = "lowbit_attention.cuda"
"""Where commits before the rooms have the kernels."""


def code_of(cubin: bytes) -> bytes:
    """What of a cubin (an ELF file) runs: kernels with their registers, constants and shared memory.

    Left out is what moves with the sources' text alone: symbols, constants of headers that no instruction reads, and
    the addresses of tables in global memory (constant bank 4, filled in when the code is loaded). What those tables
    hold is not compared.
    """
    sections, (size, count, names) = struct.unpack_from("<Q", cubin, 0x28)[0], struct.unpack_from("<HHH", cubin, 0x3A)
    table = [struct.unpack_from("<IIQQQQIIQQ", cubin, sections + i * size) for i in range(count)]
    found = []
    for name, kind, _, _, offset, length, _, info, _, _ in table:
        first = table[names][4] + name
        title = cubin[first : cubin.index(b"\0", first)]
        if title.startswith((b".text.", b".nv.constant", b".nv.shared.")) and title != b".nv.constant4":
            content = b"" if kind == _NOBITS else cubin[offset : offset + length]
            found.append((title, length, info >> 24, content))  # (of code: the registers)
    return repr(sorted(found)).encode()


_NOBITS = 8
"""A section that takes memory and no place in the file."""


def answer(tree: Path, wanted: list[str] | None) -> dict[str, Any]:
    """By instance: without ``wanted`` the key of its source and options; else, of those, hash and instructions."""
    import lowbit_attention

    cuda = "lowbit_attention.backends.cuda" if (tree / "src/lowbit_attention/backends").exists() else _OLD
    jit = f"{cuda}.jit" if cuda != _OLD else "lowbit_attention.jit"
    code = f"{cuda}.inspect.machine_code" if cuda != _OLD else f"{_OLD}.machine_code"
    instructions: Any = importlib.import_module(code).instructions
    manifest: Any = importlib.import_module(f"{cuda}.instances").MANIFEST
    compiler: Any = importlib.import_module(f"{jit}.compiler")

    if not Path(lowbit_attention.__file__).is_relative_to(tree):
        raise ImportError(f"the package was read from {lowbit_attention.__file__}, not from {tree}")
    instances = {str(instance): instance for instance in manifest}
    if wanted is None:
        return {name: compiler.cache_key(i.source(), i.options()) for name, i in instances.items()}

    def compiled(instance: Any) -> tuple[str, int]:
        cubin = compiler.compile_source(instance.source(), instance.options()).cubin
        return hashlib.sha256(code_of(cubin)).hexdigest(), len(instructions(cubin))

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(wanted, pool.map(compiled, (instances[name] for name in wanted)), strict=True))


def checked_out(commit: str, folder: Path) -> Path:
    """The package's source at a commit, below ``folder``."""
    archive = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise typer.BadParameter(f"{commit!r}: git says {archive.stderr.decode().strip()!r}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def compare(before: Path, after: Path, only: str = "") -> tuple[list[str], int]:
    """What differs, a line an instance; and how many instances there are."""
    with package_in(before) as of_old, package_in(after) as of_new, ThreadPoolExecutor(2) as pool:

        def both(wanted: list[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
            old, new = pool.map(lambda ask: ask(wanted), (of_old, of_new))
            return old, new

        return differences(both, only)


def differences(
    both: Callable[[list[str] | None], tuple[dict[str, Any], dict[str, Any]]], only: str
) -> tuple[list[str], int]:
    """As `compare`; ``both`` gives the two packages' `answer`."""
    old, new = both(None)
    names = sorted(name for name in old.keys() | new.keys() if only in name)
    lines = [f"{name}: only before" for name in names if name not in new]
    lines += [f"{name}: only after" for name in names if name not in old]
    changed = [name for name in names if name in old and name in new and old[name] != new[name]]
    if changed:
        old, new = both(changed)
        lines += [f"{n}: {old[n][1]} instructions, then {new[n][1]}" for n in changed if old[n][0] != new[n][0]]
    return lines, len(names)


def main(
    before: Annotated[str, typer.Argument(help="The commit to compare with.")],
    after: Annotated[str | None, typer.Argument(help="Another commit, instead of the working tree.")] = None,
    only: Annotated[str, typer.Option(help="Instances whose description holds this text.")] = "",
) -> None:
    """Compile and compare; exit code 1 if anything differs."""
    with tempfile.TemporaryDirectory() as folder:
        places = Path(folder).resolve() / "before", Path(folder).resolve() / "after"
        new = ROOT if after is None else checked_out(after, places[1])
        lines, count = compare(checked_out(before, places[0]), new, only)
    for line in lines:
        print(line)
    print(f"{count} instances, {len(lines)} with other machine code than at {before}")
    raise typer.Exit(1 if lines else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        for question in sys.stdin:
            print(json.dumps(answer(Path(sys.argv[2]), json.loads(question))), flush=True)
    else:
        typer.run(main)

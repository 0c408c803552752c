"""Which kernel instances have other machine code than at another commit; needs no GPU.

``make kernels-same REF=main`` compares the working tree with a commit: every instance of both manifests is compiled
where its source or options differ, and those whose machine code does are named. A change that must cost the named
recipes nothing (a mend beside them, a tidied file) ends with none.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]


def in_tree(tree: Path, wanted: list[str] | None) -> dict[str, Any]:
    """`answer` of the package below ``tree``, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    process = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--answer"],
        input=json.dumps({"tree": str(tree), "wanted": wanted}),
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(process.stdout)
    return found


def answer(tree: str, wanted: list[str] | None) -> dict[str, Any]:
    """By instance: without ``wanted`` the key of its source and options; else, of those, hash and instructions."""
    import lowbit_attention
    from lowbit_attention.cuda.instances import MANIFEST, Instance
    from lowbit_attention.cuda.machine_code import instructions
    from lowbit_attention.jit.compiler import cache_key, compile_source

    if not Path(lowbit_attention.__file__).is_relative_to(tree):
        raise ImportError(f"the package was read from {lowbit_attention.__file__}, not from {tree}")
    instances = {str(instance): instance for instance in MANIFEST}
    if wanted is None:
        return {name: cache_key(i.source(), i.options()) for name, i in instances.items()}

    def compiled(instance: Instance) -> tuple[str, int]:
        cubin = compile_source(instance.source(), instance.options()).cubin
        return hashlib.sha256(cubin).hexdigest(), len(instructions(cubin))

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(wanted, pool.map(compiled, (instances[name] for name in wanted)), strict=True))


def checked_out(commit: str, folder: Path) -> Path:
    """The package's source at a commit, below ``folder``."""
    archive = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def compare(before: Path, after: Path, only: str = "") -> tuple[list[str], int]:
    """What differs, a line an instance; and how many instances there are."""
    old, new = in_tree(before, None), in_tree(after, None)
    names = sorted(name for name in old.keys() | new.keys() if only in name)
    lines = [f"{name}: only before" for name in names if name not in new]
    lines += [f"{name}: only after" for name in names if name not in old]
    changed = [name for name in names if name in old and name in new and old[name] != new[name]]
    if changed:
        old, new = in_tree(before, changed), in_tree(after, changed)
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
    if sys.argv[1:] == ["--answer"]:
        print(json.dumps(answer(**json.load(sys.stdin))))
    else:
        typer.run(main)

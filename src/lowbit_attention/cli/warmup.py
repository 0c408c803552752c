"""``lowbit warmup``: compile kernels before they are needed."""

from __future__ import annotations

import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..backends.cuda.instances import MANIFEST
from ..backends.cuda.jit.export import ExportFolder
from ..backends.cuda.launch import cache
from ..backends.cuda.mma import ARCH_OF
from ..env import CACHE_READONLY_VARIABLE
from ..errors import InvalidArgumentError
from ..output.console import console, plain
from .common import progress


def command(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Compile for this architecture, repeatable: {', '.join(sorted({i.arch for i in MANIFEST}))}."
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Only kernels whose name or options hold this text.")] = "",
    to: Annotated[
        Path | None,
        typer.Option(help="Put them into this folder, for other users to read, instead of your own cache."),
    ] = None,
) -> None:
    """Compile the kernels into the cache folder, without a GPU if need be, so that no first call waits.

    * `lowbit warmup` — for this machine's GPUs
    * `lowbit warmup --arch sm_90a` — for a Hopper GPU, on any machine (an image built elsewhere, say)
    * `lowbit warmup --arch sm_90a --to /opt/kernels` — for whoever sets `LOWBIT_CACHE_READONLY=/opt/kernels`: the users
      of an image, a team

    The folder is `LOWBIT_CACHE_DIR`, or the user's cache folder (`lowbit doctor` shows it).
    """
    known = sorted({instance.arch for instance in MANIFEST})
    wanted = arch or _present()
    if unknown := [a for a in wanted if a not in known]:
        raise InvalidArgumentError(f"no kernels for {', '.join(unknown)}; there are kernels for {', '.join(known)}")
    instances = [i for i in MANIFEST if i.arch in wanted and recipe in str(i)]
    if not instances:
        raise InvalidArgumentError(f"no kernel's name or options hold {recipe!r}")
    exported = None if to is None else ExportFolder(to)
    kernels = cache()
    if exported is None and (problem := kernels.own.try_to_write()):  # (known before the work)
        raise InvalidArgumentError(f"compiled kernels cannot be kept: {problem}")
    keep = kernels.get if exported is None else exported.add
    where = str(kernels.folder if exported is None else exported.folder)
    began = time.perf_counter()
    with progress() as bar, ThreadPoolExecutor(max_workers=None) as pool:
        task = bar.add_task("compiling", total=len(instances))
        for _ in pool.map(lambda i: keep(i.source(), i.options()), instances):
            bar.advance(task)
    seconds = time.perf_counter() - began
    lines = [f"{len(instances)} kernels for {', '.join(wanted)} ready in {seconds:.1f} s, in {where}"]
    if exported is not None:
        lines.append(f"use them with: export {CACHE_READONLY_VARIABLE}={shlex.quote(where)}")
        lines += exported.remarks()
    for line in lines:
        console().print(plain(line), soft_wrap=True)  # (lines to copy stay whole)


def _present() -> list[str]:
    """Architectures of this machine's GPUs that there are kernels for."""
    known = {instance.arch for instance in MANIFEST}
    found = set()
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capability = torch.cuda.get_device_capability(device)
        # Hopper's own kernels; those of other cards run there, too, but few calls want them
        found |= {"sm_90a"} if capability == (9, 0) else {ARCH_OF.get(capability, "")} & known
    if not found:
        raise InvalidArgumentError(
            f"no GPU here that there are kernels for; say which with --arch ({', '.join(sorted(known))})"
        )
    return sorted(found)

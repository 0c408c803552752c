"""Machine code kept on disk, by the content of what made it.

An entry is written to a temporary file and renamed, so it is there whole or not at all; a damaged one counts as
missing. Processes that want the same entry wait for the one that makes it. A folder that cannot be written costs a
compilation a process, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock

from ..env import cache_dir
from ..errors import LowbitError
from .compiler import SCHEMA, Compiled, Options, Resources, cache_key, compile_source
from .source import Source

_log = logging.getLogger("lowbit_attention")
_MAGIC = b"lowbit-kernel\n"


class CaptureError(LowbitError):
    """A kernel would have to be compiled or loaded from disk while a CUDA graph is being captured."""


class KernelCache:
    """Compiled sources, in memory and below ``folder`` (the user's cache folder if ``None``)."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else cache_dir() / f"kernels-{SCHEMA}"
        self._memory: dict[str, Compiled] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def get(self, source: Source, options: Options) -> Compiled:
        """The compiled source: from memory, from disk, or made now (one log line).

        Raises:
            CaptureError: while a CUDA graph is being captured, if it is not in memory.
            CompileError, MissingExtraError: as `compile_source`.
        """
        made: list[Source] = []
        began = time.perf_counter()
        found = self._get(source, options, made)
        _say(made, time.perf_counter() - began)
        return found

    def _get(self, source: Source, options: Options, made: list[Source]) -> Compiled:
        """`get` without its log line; what had to be compiled is appended to ``made``."""
        key = cache_key(source, options)
        if found := self._memory.get(key):
            return found
        _refuse_during_capture(source, options)
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._memory:
                self._memory[key] = self._from_disk_or_made(key, source, options, made)
        return self._memory[key]

    def get_all(self, jobs: Iterable[tuple[Source, Options]], workers: int | None = None) -> list[Compiled]:
        """`get` for several, side by side (NVRTC runs outside Python's lock); as many at once as there are cores."""
        jobs = list(jobs)
        for source, options in jobs:  # (here: in the threads no stream is being captured)
            if cache_key(source, options) not in self._memory:
                _refuse_during_capture(source, options)
        made: list[Source] = []
        began = time.perf_counter()
        with ThreadPoolExecutor(max_workers=workers or os.cpu_count()) as pool:
            found = list(pool.map(lambda job: self._get(job[0], job[1], made), jobs))
        _say(made, time.perf_counter() - began)
        return found

    def _from_disk_or_made(self, key: str, source: Source, options: Options, made: list[Source]) -> Compiled:
        path = self.folder / key[:2] / f"{key}.bin"
        if found := _read(path):
            return found
        with _one_process_at_a_time(path):
            if found := _read(path):  # another process has made it meanwhile
                return found
            compiled = compile_source(source, options)
            made.append(source)
            try:
                _write(path, compiled)
            except OSError as error:
                _log.warning("kernels are kept in memory only: %s", error)
            return compiled


def _say(made: list[Source], seconds: float) -> None:
    """One log line, however many were compiled."""
    if made:
        _log.info("compiled %s in %.1f s", ", ".join(sorted(source.name for source in made)), seconds)


def _refuse_during_capture(source: Source, options: Options) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            f"{source.name} for {options.arch} is not loaded yet and a CUDA graph is being captured: "
            "run the call once before the capture"
        )


@contextlib.contextmanager
def _one_process_at_a_time(path: Path) -> Iterator[None]:
    """A lock beside the entry; none where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _write(path: Path, compiled: Compiled) -> None:
    """Whole or not at all, also if the machine stops in between."""
    about = {
        "sha256": hashlib.sha256(compiled.cubin).hexdigest(),
        "resources": {name: asdict(r) for name, r in compiled.resources.items()},
        "remarks": compiled.remarks,
    }
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_MAGIC + json.dumps(about).encode() + b"\n" + compiled.cubin)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _read(path: Path) -> Compiled | None:
    """The entry, ``None`` if it is not there or damaged."""
    try:
        content = path.read_bytes()
        if not content.startswith(_MAGIC):
            return None
        header, cubin = content[len(_MAGIC) :].split(b"\n", 1)
        about = json.loads(header)
        if hashlib.sha256(cubin).hexdigest() != about["sha256"]:
            return None
        resources = {name: Resources(**values) for name, values in about["resources"].items()}
        return Compiled(cubin, resources, tuple(about["remarks"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None

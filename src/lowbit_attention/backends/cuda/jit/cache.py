"""Compiled kernels: in memory, in folders that others have filled, in this user's own, or made now.

An entry on disk is there whole or not at all; anything else counts as missing. Processes that want the same entry wait
for the one that makes it, for a while. A folder that cannot be used costs a compilation a process, and nothing else.
Who may put entries where: docs/cache.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ....env import readonly_cache_dirs
from ....errors import InvalidArgumentError, LowbitError
from .compiled import Compiled, Options
from .compiler import cache_key, compile_source, made_of
from .source import Source
from .store import LOCK_SECONDS, OwnStore, find_shared

_log = logging.getLogger("lowbit_attention")


class CaptureError(LowbitError):
    """A kernel would have to be compiled or loaded from disk while a CUDA graph is being captured."""


class KernelCache:
    """Compiled sources, in memory and below ``folder`` (the user's cache folder if ``None``).

    ``shared``: folders to look into first, which are never written (those of ``LOWBIT_CACHE_READONLY`` if ``None``).
    ``keeps``: whether what is compiled is written to ``folder``. ``lock_seconds``: how long to wait for another process
    that compiles the same.
    """

    def __init__(
        self,
        folder: Path | None = None,
        shared: Sequence[Path] | None = None,
        keeps: bool = True,
        lock_seconds: float = LOCK_SECONDS,
    ) -> None:
        self.own = OwnStore(folder, lock_seconds, tells=keeps)
        self.shared: tuple[Path, ...] = ()
        try:
            self.shared = readonly_cache_dirs() if shared is None else tuple(shared)
        except InvalidArgumentError as error:
            _log.warning("no shared kernels are read: %s", error)
        self._keeps = keeps
        self._memory: dict[str, Compiled] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        _caches.add(self)

    @property
    def folder(self) -> Path | None:
        """This user's own folder, ``None`` if there is none; `OwnStore.usable` says whether it can be used."""
        return self.own.folder

    def get(self, source: Source, options: Options) -> Compiled:
        """The compiled source: from memory, from disk, or made now (one log line).

        Raises:
            CaptureError: while a CUDA graph is being captured, if it is not in memory.
            KernelUnavailableError: it can neither be read nor compiled (`compile_source`).
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
        missing = [job for job in jobs if cache_key(job[0], job[1]) not in self._memory]
        for source, options in missing:  # (here: in the threads no stream is being captured)
            _refuse_during_capture(source, options)
        made: list[Source] = []
        began = time.perf_counter()
        if len(missing) > 1:
            # RuntimeError: no thread can be started, at the interpreter's exit say; then one after the other
            with contextlib.suppress(RuntimeError), ThreadPoolExecutor(max_workers=workers or os.cpu_count()) as pool:
                list(pool.map(lambda job: self._get(job[0], job[1], made), missing))
        found = [self._get(source, options, made) for source, options in jobs]
        _say(made, time.perf_counter() - began)
        return found

    def _from_disk_or_made(self, key: str, source: Source, options: Options, made: list[Source]) -> Compiled:
        if found := find_shared(self.shared, key) or self.own.find(key):
            return found
        if not self._keeps:
            made.append(source)
            return compile_source(source, options)
        with self.own.one_process_at_a_time(key, source.name):
            if found := self.own.find(key):  # another process has made it meanwhile
                return found
            compiled = compile_source(source, options)
            made.append(source)
            self.own.keep(key, made_of(source, options), compiled)
            return compiled

    def _renew_locks(self) -> None:
        """In the child of a fork: threads that are not there any more may have held some."""
        self._guard, self._locks = threading.Lock(), {}
        self.own.renew_locks()


_caches: weakref.WeakSet[KernelCache] = weakref.WeakSet()


def _renew_all_locks() -> None:
    for cache in list(_caches):
        cache._renew_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all_locks)


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

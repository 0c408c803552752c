"""Compiled kernels on disk: this user's own folder, and folders of others that the user trusts by naming them."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ....env import cache_dir
from ....errors import InvalidArgumentError
from ....output.console import visible
from . import entry
from .compiled import Compiled
from .compiler import SCHEMA
from .folder import WAY_OUT, UnusableFolderError, is_own_alone, own_folder
from .sweep import sweep

_log = logging.getLogger("lowbit_attention")
LOCK_SECONDS = 60.0
"""How long to wait for a process that compiles the same kernel: several times what the slowest takes on a busy core."""
GENERATION = f"kernels-{SCHEMA}"
"""The folder of entries of this form, below a cache folder."""


class OwnStore:
    """Entries below ``folder`` (the user's cache folder if ``None``), made for this user alone.

    The folder is made and looked at when it is first needed. Where it cannot be used nothing is kept, and one line of
    the log says why.
    """

    def __init__(self, folder: Path | None = None, lock_seconds: float = LOCK_SECONDS, tells: bool = True) -> None:
        self._patience = lock_seconds
        self._guard = threading.Lock()
        self._swept = False
        self._told = not tells
        self._real: Path | None = None
        self.problem: str | None = None
        """Why nothing is kept, as far as known."""
        self.folder: Path | None = None
        try:
            self.folder = Path(os.path.abspath(folder)) if folder is not None else cache_dir() / GENERATION
        except (InvalidArgumentError, OSError) as error:
            self.problem = str(error)

    def usable(self) -> Path | None:
        """The folder, made and found safe; ``None`` (and a line in the log, once) where it cannot be used."""
        self._look()
        if self.problem is not None:
            self._tell(self.problem)
        return self._real

    def _look(self) -> None:
        with self._guard:
            if self._real is not None and is_own_alone(self._real):
                return  # (it may be gone meanwhile, and made anew by whoever wanted a lock in it)
            if self.problem is None and self.folder is not None:
                self._real = None
                try:
                    self._real = own_folder(self.folder)
                except UnusableFolderError as error:
                    self.problem = str(error)

    def find(self, key: str) -> Compiled | None:
        """The entry of this key, if there is one."""
        folder = self.usable()
        return entry.read(folder / f"{key}.bin", key, is_own=True) if folder else None

    def keep(self, key: str, made_of: dict[str, Any], compiled: Compiled) -> None:
        """Write an entry; where that fails a line of the log says so, once."""
        folder = self.usable()
        if folder is None:
            return
        try:
            write(folder, key, made_of, compiled)
        except OSError as error:
            self._tell(f"{folder}: {error.strerror or error}")
            return
        with self._guard:
            due, self._swept = not self._swept, True
        if due:
            sweep(folder)

    def try_to_write(self) -> str | None:
        """Write an entry, read it back and remove it; what is wrong if that fails."""
        self._look()
        if self._real is None:
            return self.problem
        key, probe = secrets.token_hex(32), Compiled(b"probe", {}, ())
        path = self._real / f"{key}.bin"
        try:
            write(self._real, key, {}, probe)
            read_back = entry.read(path, key, is_own=True)
            os.unlink(path)
        except OSError as error:
            return f"{self._real} cannot be written ({error.strerror or error}): {WAY_OUT}"
        return None if read_back == probe else f"{self._real} does not give back what is written to it: {WAY_OUT}"

    @contextlib.contextmanager
    def one_process_at_a_time(self, key: str, name: str) -> Iterator[None]:
        """A lock beside the entry; none where there is no folder, or another process holds it for too long."""
        lock = self._acquired(key, name)
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def _acquired(self, key: str, name: str) -> FileLock | None:
        folder = self.usable()
        if folder is None:
            return None
        try:
            path = folder / f"{key}.lock"
            if path.is_symlink():  # (older filelocks follow it, and empty what it leads to)
                path.unlink()
            lock = FileLock(path)
            lock.acquire(timeout=self._patience)
            return lock
        except Timeout:
            with self._guard:
                waited, self._patience = self._patience, 0.0  # (it is stopped, or hangs: the others it holds, too)
            if waited:
                _log.warning(
                    "another process has been compiling %s for more than %g s, or was stopped while it did: "
                    "compiling it here, too (its lock: %s)",
                    visible(name), waited, visible(folder / f"{key}.lock"),
                )  # fmt: skip
        except (OSError, ValueError, NotImplementedError):  # no locks on this file system
            pass
        return None

    def renew_locks(self) -> None:
        """In the child of a fork: a thread that is not there any more may have held one."""
        self._guard = threading.Lock()

    def _tell(self, why: str) -> None:
        with self._guard:
            told, self._told = self._told, True
        if not told:
            _log.warning("kernels are kept in memory only: %s", visible(why))


def find_shared(folders: Sequence[Path], key: str) -> Compiled | None:
    """The entry of this key in folders that the user names and thereby trusts: whose files they are does not matter."""
    for folder in folders:
        if found := entry.read(folder / GENERATION / f"{key}.bin", key, is_own=False):
            return found
    return None


def write(folder: Path, key: str, made_of: dict[str, Any], compiled: Compiled, mode: int = 0o600) -> None:
    """Write an entry whole or not at all, also if the machine stops in between.

    Raises:
        OSError: it cannot be written.
    """
    content = entry.encode(key, made_of, compiled)
    if len(content) > entry.LARGEST:
        raise OSError(f"an entry of {len(content)} bytes is above {entry.LARGEST}")
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f"{key[:8]}-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            if mode != 0o600 and hasattr(os, "fchmod"):  # (it is made with 600)
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, folder / f"{key}.bin")
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise

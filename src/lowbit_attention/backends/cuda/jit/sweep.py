"""What nobody needs any more leaves the cache folder: writes that were killed, and entries that nobody uses.

Entries of older versions of this library and of older compilers are never asked for again, so they are among those that
nobody uses. Another process may be at work meanwhile: only what is old goes, and every step may find it gone already.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from pathlib import Path

from .folder import is_own_alone

UNUSED_DAYS = 60
"""After so many days without a use an entry goes: compiled again it costs seconds."""
LEFTOVER_DAYS = 1
"""A write takes seconds: a temporary file of yesterday is of a process that was killed."""
_STAMP = "swept"
_GENERATION = re.compile(r"kernels-\d{1,9}")
_ENTRY = re.compile(r"[0-9a-f]{64}\.(bin|lock)")
_LEFTOVER = re.compile(r"[\w-]{1,80}\.tmp")
_SUBFOLDER = re.compile(r"[0-9a-f]{2}")


def sweep(folder: Path) -> None:
    """Sweep ``folder``, which is this user's alone, and its siblings of older schemas; at most once a day."""
    with contextlib.suppress(OSError):
        stamp = folder / _STAMP
        now = time.time()
        with contextlib.suppress(FileNotFoundError):
            if now - os.lstat(stamp).st_mtime < 86400:
                return
        _touch(stamp)
        for generation in _scan(folder.parent):
            # (the parent may be shared, /tmp say: the siblings in it may be another user's)
            if _GENERATION.fullmatch(generation.name) and is_own_alone(Path(generation.path)):
                _sweep(Path(generation.path), now, depth=1)
                if generation.name != folder.name:
                    _remove_if_empty(generation.path)


def _sweep(folder: Path, now: float, depth: int) -> None:
    for item in _scan(folder):
        with contextlib.suppress(OSError):
            status = item.stat(follow_symlinks=False)
            if depth and _SUBFOLDER.fullmatch(item.name) and stat.S_ISDIR(status.st_mode):  # (of schema 1)
                _sweep(Path(item.path), now, depth - 1)
                _remove_if_empty(item.path)
                continue
            days = (now - status.st_mtime) / 86400  # (reading an entry notes its use there)
            patience = (LEFTOVER_DAYS, _LEFTOVER), (UNUSED_DAYS, _ENTRY)
            if any(days > most and pattern.fullmatch(item.name) for most, pattern in patience):
                os.unlink(item.path)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(folder) as items:
        return list(items)
    return []


def _remove_if_empty(folder: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _touch(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        os.utime(path)
    finally:
        os.close(descriptor)

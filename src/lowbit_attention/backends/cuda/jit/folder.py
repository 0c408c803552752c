"""Whether a folder is this user's alone: machine code from it is run, so nobody else may put any there.

Where there are POSIX owners and modes: the folder is this user's, nobody else can write it, and nobody else can replace
it or a folder above it. Root is a user like any other. On Windows nothing of this is checked: the default folder lies
in the user's profile, which other users cannot write.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from ....env import CACHE_DIR_VARIABLE
from ....errors import LowbitError

HAS_OWNERS = hasattr(os, "geteuid")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
WAY_OUT = f"set {CACHE_DIR_VARIABLE} to a folder that only you can write"


class UnusableFolderError(LowbitError):
    """Kernels cannot be kept in a folder: it cannot be made or read, or others could put files there."""


def own_folder(folder: Path) -> Path:
    """The real path of the folder, made for this user alone if it is not there, and found safe.

    Raises:
        UnusableFolderError: in one line, with the way out.
    """
    try:
        real = Path(os.path.realpath(folder))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(real)  # a name that is too long shows before half of it is made
        missing = []
        there = real
        while not os.path.lexists(there):
            missing.append(there)
            there = there.parent
        for ancestor in (there, *there.parents):
            _check(ancestor, is_own=ancestor == real)
        for new in reversed(missing):
            _make(new)
        _check(real, is_own=True)
        if not os.access(real, os.R_OK | os.W_OK | os.X_OK):
            raise UnusableFolderError(f"{real} is not writable: {WAY_OUT}")
    except (OSError, ValueError) as error:  # (ValueError: a path that no system takes)
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnusableFolderError(f"{shown(folder)} cannot be used ({why}): {WAY_OUT}") from None
    return real


def is_own_alone(folder: Path) -> bool:
    """Whether it is a folder (no link to one) of this user that nobody else can write, whatever those above it are."""
    try:
        _check(folder, is_own=True)
    except (OSError, UnusableFolderError):
        return False
    return True


def _make(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):  # another process was faster; what it is is checked next
        folder.mkdir(mode=0o700)


def _check(folder: Path, is_own: bool) -> None:
    """Raise unless nobody else can write the folder (``is_own``), or replace what is in it (one above it)."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise UnusableFolderError(f"{folder} is not a folder: {WAY_OUT}")
    if not HAS_OWNERS:
        return
    me = os.geteuid()
    if status.st_uid != me and (is_own or not (status.st_uid == 0 or _is_outside(status.st_uid))):
        raise UnusableFolderError(f"{folder} belongs to another user (uid {status.st_uid}, not {me}): {WAY_OUT}")
    # in a sticky folder, /tmp say, only its owner can replace a file
    if status.st_mode & _OTHERS_WRITE and (is_own or not status.st_mode & stat.S_ISVTX):
        mode = stat.S_IMODE(status.st_mode)
        raise UnusableFolderError(
            f"{folder} can be written by other users (mode {mode:o}): chmod go-w {folder}, or {WAY_OUT}"
        )


def _is_outside(uid: int) -> bool:
    """Whether the uid stands for all users that a rootless container does not know, the machine's root among them."""
    try:
        unknown = int(Path("/proc/sys/kernel/overflowuid").read_text())
        known = Path("/proc/self/uid_map").read_text().split()
    except (OSError, ValueError):
        return False
    return uid == unknown and known != ["0", "0", "4294967295"]  # (the machine itself knows all)


def shown(folder: Path, most: int = 200) -> str:
    """The path, or of a very long one its beginning."""
    text = str(folder)
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"

"""How every file of this package is written: whole or not at all, whoever else writes it.

A file is written under a name that nobody can guess, made anew in the same folder, brought to the disk, and then
takes the place of the old one. So no reader sees half a file, of several writers the last one wins, and a link that
was laid in wait is neither followed nor written through.

A path that is a symbolic link is written at its target, if the link is this user's or root's; another user's link is
refused. Only a regular file is ever replaced: a folder, a device (``/dev/null``) and a pipe are refused, and so is a
file that this user may not write, though its folder would let it be replaced.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InvalidArgumentError, SaveError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def as_path(path: Any) -> Path:
    """A path from what a caller gave.

    Raises:
        InvalidArgumentError: neither text nor a path, or nothing that can name a file.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str):
        raise InvalidArgumentError(f"a file's path is text or a pathlib.Path, got {type(path).__name__}")
    if not text or "\0" in text:
        raise InvalidArgumentError(f"{text!r} names no file")
    return Path(text)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file; text is UTF-8, and what UTF-8 cannot hold (a lone surrogate) is escaped as in JSON: ``\\ud800``.

    Raises:
        InvalidArgumentError: the path is no regular file's. SaveError: it cannot be written.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with replacing(path) as half:
        half.write_bytes(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Within the block, an empty file to write instead; after it, that file takes the path's place.

    Raises:
        InvalidArgumentError: the path is no regular file's. SaveError: it cannot be written.
    """
    named = as_path(path)
    with _one_line(named):
        target = place_of(named)
        target.parent.mkdir(parents=True, exist_ok=True)
        half = _new_file(target)
        try:
            yield half
            _to_disk(half)
            half.replace(target)
        except BaseException:
            half.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def appending(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Within the block, a file open at its end, which no other process appends to meanwhile.

    Raises:
        InvalidArgumentError: the path is no regular file's. SaveError: it cannot be written.
    """
    named = as_path(path)
    with _one_line(named):
        target = place_of(named)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)  # (ends with the file, however the process ends)
                file.seek(0, os.SEEK_END)
            yield file


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before the work, not after it, that a file cannot be written. Its folder is made if it is not there.

    Raises:
        InvalidArgumentError: the path is no regular file's. SaveError: it cannot be written.
    """
    named = as_path(path)
    with _one_line(named):
        target = place_of(named)
        target.parent.mkdir(parents=True, exist_ok=True)
        _new_file(target).unlink()


def place_of(path: Path) -> Path:
    """The file that a path names, behind a symbolic link if it is one; there may be nothing there yet.

    Raises:
        InvalidArgumentError: it is no regular file. OSError: it must not be written.
    """
    if path.is_symlink():
        _check_link(path)
        path = Path(os.path.realpath(path))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    if not stat.S_ISREG(mode):
        what = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
        raise InvalidArgumentError(f"{path} is {what}, not a file to write")
    if not os.access(path, os.W_OK):
        raise PermissionError(13, "it is read-only")
    return path


def _check_link(path: Path) -> None:
    if os.name == "posix" and path.lstat().st_uid not in (os.geteuid(), 0):
        raise InvalidArgumentError(
            f"{path} is a symbolic link of another user to {os.readlink(path)}, which is not followed: name the file "
            "itself"
        )


def _new_file(target: Path) -> Path:
    """An empty file beside the target that was not there before, with the mode the target has or would get."""
    half = target.with_name(
        f".{secrets.token_hex(8)}.part"
    )  # (not the target's name: that may be as long as names get)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(half, flags, 0o666)
    try:
        if os.name == "posix" and target.exists():
            os.fchmod(handle, stat.S_IMODE(target.stat().st_mode))
    finally:
        os.close(handle)
    return half


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """An operating system's error as one line that names the file asked for, not the one beside it."""
    try:
        yield
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error.strerror or error}") from error

"""A cache entry's form, and how one is read: whatever lies there, it is an entry of this key or a miss.

``magic, digest, header, machine code``: the header is a line of JSON that names the key; the digest is that of all the
rest. It finds damage and entries under another's name. It does not find forgeries, since whoever writes the file writes
the digest: against those stands the folder (`jit.folder`).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .compiled import Compiled, Resources
from .folder import HAS_OWNERS

_MAGIC = b"lowbit-kernel 2\n"
LARGEST = 64 * 2**20
"""Bytes of an entry; the largest kernel has 0.4 MB."""
_LARGEST_HEADER = 2**20
_A_DAY = 86400.0
_READ = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)  # a FIFO without a writer would wait for one
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)  # (Windows)
)


def encode(key: str, made_of: dict[str, Any], compiled: Compiled) -> bytes:
    """The file's content. ``made_of`` says to people what the key stands for."""
    header = {
        "key": key,
        "made_of": made_of,
        "resources": {name: asdict(r) for name, r in compiled.resources.items()},
        "remarks": compiled.remarks,
    }
    body = json.dumps(header).encode() + b"\n" + compiled.cubin
    return _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def decode(key: str, content: bytes) -> Compiled | None:
    """What `encode` wrote for this key; ``None`` for anything else."""
    digest, end, body = content[len(_MAGIC) :].partition(b"\n")
    if not content.startswith(_MAGIC) or not end or hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    length = body.find(b"\n", 0, _LARGEST_HEADER)
    if length < 0:
        return None
    try:
        header = json.loads(body[:length])
    except (ValueError, RecursionError):
        return None
    if not isinstance(header, dict) or header.get("key") != key:
        return None
    resources = _resources(header.get("resources"))
    remarks = header.get("remarks")
    if resources is None or not isinstance(remarks, list) or not all(isinstance(r, str) for r in remarks):
        return None
    return Compiled(body[length + 1 :], resources, tuple(remarks))


def read(path: Path, key: str, is_own: bool) -> Compiled | None:
    """The entry at ``path`` if there is one of this key: a regular file of bounded size, and no link to one.

    ``is_own``: of this user's own cache, so nobody else's file counts, nor one that others can write; and a use is
    noted, once a day, for those who sweep.
    """
    try:
        if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():  # (Windows)
            return None
        descriptor = os.open(path, _READ)
    except (OSError, ValueError):
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= LARGEST:
            return None
        if is_own and HAS_OWNERS and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
            return None
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(status.st_size)
        found = decode(key, content)
        if found and is_own and time.time() - status.st_mtime > _A_DAY and os.utime in os.supports_fd:
            os.utime(descriptor)
        return found
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _resources(said: object) -> dict[str, Resources] | None:
    """Resources by kernel, if that is what it says."""
    if not isinstance(said, dict):
        return None
    names = {field.name for field in fields(Resources)}
    found = {}
    for kernel, values in said.items():
        if not isinstance(values, dict) or set(values) != names:
            return None
        if not all(type(value) is int and 0 <= value < 2**31 for value in values.values()):
            return None
        found[kernel] = Resources(**values)
    return found

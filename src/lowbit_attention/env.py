"""Every environment variable this library reads, in one place."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import platformdirs

from .errors import InvalidArgumentError

CACHE_DIR_VARIABLE = "LOWBIT_CACHE_DIR"
CACHE_READONLY_VARIABLE = "LOWBIT_CACHE_READONLY"
DIFFUSERS_VARIABLE = "DIFFUSERS_ATTN_BACKEND"


def diffusers_backend() -> str:
    """The attention backend that diffusers is told to begin with: its own ``DIFFUSERS_ATTN_BACKEND``, or empty."""
    return os.environ.get(DIFFUSERS_VARIABLE, "")


def cache_dir() -> Path:
    """Where compiled kernels may be kept: ``LOWBIT_CACHE_DIR``, or the user's cache folder of this system.

    An absolute path, and the same one after the process has changed its working folder.

    Raises:
        InvalidArgumentError: there is none, for want of a home folder, say.
    """
    chosen = os.environ.get(CACHE_DIR_VARIABLE)
    if chosen:
        return _absolute(chosen, CACHE_DIR_VARIABLE)
    try:
        default = platformdirs.user_cache_dir("lowbit-attention", appauthor=False)
    except RuntimeError:  # newer versions say so, older ones leave the ~
        default = "~"
    return _absolute(default, "the user's cache folder")


def readonly_cache_dirs() -> tuple[Path, ...]:
    """Folders of kernels that others have compiled: ``LOWBIT_CACHE_READONLY``, separated as in ``PATH``.

    Raises:
        InvalidArgumentError: one of them begins with the home folder of nobody.
    """
    named = os.environ.get(CACHE_READONLY_VARIABLE, "").split(os.pathsep)
    return tuple(_absolute(text, CACHE_READONLY_VARIABLE) for text in named if text)


def _absolute(text: str, said_by: str) -> Path:
    return _resolved(text, said_by, os.environ.get("HOME"))


@lru_cache(maxsize=64)  # (not to save time: a relative path stays what it was at the first use)
def _resolved(text: str, said_by: str, home: str | None) -> Path:
    del home  # what ~ stands for
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise InvalidArgumentError(
            f"{said_by} is below {text}, and there is no such home folder: "
            f"set {CACHE_DIR_VARIABLE} to a folder of this user"
        )
    try:
        return Path(os.path.abspath(expanded))
    except OSError as error:  # the working folder is gone
        raise InvalidArgumentError(f"{said_by} is {text}, below a working folder that is gone ({error})") from None

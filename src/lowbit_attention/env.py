"""Every environment variable this library reads, in one place."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

CACHE_DIR_VARIABLE = "LOWBIT_CACHE_DIR"


def cache_dir() -> Path:
    """Where compiled kernels may be kept: ``LOWBIT_CACHE_DIR``, or the user's cache folder of this system."""
    if chosen := os.environ.get(CACHE_DIR_VARIABLE):
        return Path(chosen).expanduser()
    return Path(platformdirs.user_cache_dir("lowbit-attention", appauthor=False))

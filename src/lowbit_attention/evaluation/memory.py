"""How much memory there is, so that what cannot fit is refused before it is allocated."""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache
from pathlib import Path

from ..errors import InvalidArgumentError

_CGROUP = Path("/sys/fs/cgroup/memory.max")
"""A container's own limit, where there is one."""
_UNKNOWN = 1 << 42
"""Where a system does not tell, what none of today's has: 4 TiB."""


@lru_cache(maxsize=1)
def host_bytes() -> int:
    """Bytes of main memory that this process may have at most."""
    try:
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        most = 0
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        most = min(most or _UNKNOWN, int(_CGROUP.read_text(encoding="ascii")))
    return most if most > 0 else _UNKNOWN


def check_fits(what: str, needed: int) -> None:
    """Refuse what takes more memory than the machine has.

    Raises:
        InvalidArgumentError: it does.
    """
    if needed > host_bytes():
        raise InvalidArgumentError(f"{what} takes {_gib(needed)}, and this machine has {_gib(host_bytes())} of memory")


def _gib(size: int) -> str:
    gib = size >> 30
    return f"{size / 2**30:.2g} GiB" if gib < 10 else f"{gib} GiB" if gib < 10**9 else "more than 10⁹ GiB"

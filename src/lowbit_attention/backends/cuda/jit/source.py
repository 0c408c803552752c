"""A translation unit with everything it includes, so that a cache key can hold all of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ....errors import InvalidArgumentError, KernelUnavailableError

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


class SourceError(KernelUnavailableError, InvalidArgumentError):
    """A source file is missing or cannot be read."""


@dataclass(frozen=True)
class Source:
    """CUDA source text.

    ``name`` is shown in diagnostics. ``headers`` are the files that ``text`` includes, directly and indirectly, as
    (path below ``root``, text); ``root`` is where NVRTC looks for them.
    """

    name: str
    text: str
    headers: tuple[tuple[str, str], ...] = ()
    root: Path | None = None


def read_source(root: Path, entry: str) -> Source:
    """The file ``entry`` below ``root`` and the headers it includes; ``#include "…"`` paths are relative to ``root``.

    Raises:
        SourceError: a file that is missing, with the line that asks for it.
    """
    headers: dict[str, str] = {}
    text = _read(root, entry, None)
    waiting = [(entry, text)]
    while waiting:
        includer, content = waiting.pop()
        for match in _INCLUDE.finditer(content):
            name = match[1]
            if name not in headers:
                line = content.count("\n", 0, match.start()) + 1
                headers[name] = _read(root, name, f"{includer}:{line}")
                waiting.append((name, headers[name]))
    return Source(entry, text, tuple(sorted(headers.items())), root)


def _read(root: Path, name: str, asked_by: str | None) -> str:
    try:
        return (root / name).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        where = f" (included at {asked_by})" if asked_by else ""
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SourceError(f"cannot read {root / name}{where}: {why}") from None

"""Writes the texts again: `python -m lowbit_studies.smollm2.write_texts FOLDER`, with CPython 3.11 and fonttools.

The files in the repository are what is measured. This says how they came about; another Python's differ a little.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from pydoc_data import topics

LARGEST = 46_000
"""Bytes of a text: enough for 8192 tokens and some."""


def cut(text: str) -> str:
    """The text up to the last whole line within `LARGEST` bytes."""
    head = text.encode()[:LARGEST].decode(errors="ignore")
    return head if len(head) == len(text) else head[: head.rindex("\n") + 1]


def prose(first: str, last: str) -> str:
    """Topics of the language reference from one name to another, in the order of their names."""
    return "\n".join(topics.topics[name] for name in sorted(topics.topics) if first <= name < last)


def code(*names: str) -> str:
    """Modules of the standard library, one after the other."""
    return "\n".join((_stdlib() / name).read_text(encoding="utf-8") for name in names)


def headers() -> str:
    """CPython's own headers, in the order of their names; not those that are tables."""
    folder = Path(sysconfig.get_path("include"))
    chosen = [path for path in sorted(folder.glob("*.h")) if path.name not in ("pyconfig.h", "opcode.h")]
    return "\n".join(path.read_text(encoding="utf-8") for path in chosen)


def licences() -> str:
    """Apache-2.0, the PSF licence and MPL-2.0, each whole, as packages carry them."""
    found = [
        _of("packaging", "LICENSE.APACHE"),
        (_stdlib() / "LICENSE.txt").read_text(encoding="utf-8"),
        _of("hypothesis", "LICENSE.txt"),
    ]
    return "\n".join(found)


def changelog() -> str:
    """What fonttools says of its releases."""
    text = (metadata.distribution("fonttools").read_text("METADATA") or "").partition("\n\n")[2]
    return text[text.index("Changelog\n") :]


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _of(package: str, ending: str) -> str:
    files = metadata.files(package) or []
    return next(str(file.locate().read_text()) for file in files if str(file).endswith(ending))  # type: ignore[attr-defined]


def texts() -> Iterator[tuple[str, str]]:
    """Every text by its name."""
    yield "prose", prose("c", "z")
    yield "code", code("argparse.py")
    yield "licences", licences()
    yield "changelog", changelog()
    yield "headers", headers()
    yield "calibration", prose("a", "c")[: LARGEST // 2] + code("tarfile.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts():
        (folder / f"{name}.txt").write_text(cut(text), encoding="utf-8")
        print(f"{name}: {len(cut(text).encode())} bytes")


if __name__ == "__main__":
    main()

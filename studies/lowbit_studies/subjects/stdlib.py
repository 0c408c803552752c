"""Text that every machine with CPython has: the sources of the standard library, split by file."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lowbit_attention import InvalidArgumentError

from .language import SEPARATOR

Split = Literal["train", "held_out"]

_HELD_OUT_OF = 16
_LEFT_OUT = frozenset(
    {
        "site-packages", "dist-packages", "__pycache__",  # not the standard library
        "encodings",  # a hundred tables that are nearly the same
        "lib2to3", "distutils", "config",  # gone, or made by the build
    }
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Files of one split, one after the other, each after a `SEPARATOR`; ``text`` is uint8."""

    names: tuple[str, ...]
    text: Tensor


def split_of(name: str) -> Split:
    """Which split a file belongs to: by a hash of its path in the library, so it stays there in every version.

    >>> split_of("argparse.py"), split_of("ast.py")
    ('train', 'train')
    """
    digest = hashlib.sha256(name.encode()).digest()
    return "held_out" if digest[0] % _HELD_OUT_OF == 0 else "train"


def files(folder: Path | None = None) -> list[tuple[str, Path]]:
    """Every source file with its path in the library (``/`` between the parts), sorted by it."""
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not any(part in _LEFT_OUT or part.startswith(("config-", "_sysconfigdata")) for part in parts):
            found.append(("/".join(parts), path))
    return sorted(found)


def load(split: Split, folder: Path | None = None) -> Corpus:
    """The files of one split.

    Raises:
        InvalidArgumentError: if there are none.
    """
    names, texts = [], []
    for name, path in files(folder):
        if split_of(name) == split and SEPARATOR not in (text := path.read_bytes()):
            names.append(name)
            texts.append(bytes([SEPARATOR]) + text)
    if not texts:
        raise InvalidArgumentError(f"no source of the standard library for the {split} split in {folder or 'Python'}")
    return Corpus(tuple(names), torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8))


def windows(text: Tensor, count: int, length: int, seed: int) -> Tensor:
    """``count`` windows of ``length`` + 1 bytes that do not overlap, chosen by ``seed``; int64 ``[count, length + 1]``.

    Raises:
        InvalidArgumentError: if the text is too short.
    """
    fit = (len(text) - 1) // length
    if count > fit:
        raise InvalidArgumentError(f"{len(text)} bytes hold {fit} windows of {length}, not {count}")
    generator = torch.Generator("cpu").manual_seed(seed)
    chosen = torch.randperm(fit, generator=generator, dtype=torch.int64, device="cpu")[:count]
    at = chosen.sort().values[:, None] * length + torch.arange(length + 1, dtype=torch.int64, device="cpu")
    return text[at].long()

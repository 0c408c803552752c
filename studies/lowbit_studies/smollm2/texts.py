"""The texts that are read: five kinds and one more to calibrate on, as files beside this module.

texts/SOURCES.md says where each is from and under which licence; `write_texts.py` made them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowbit_attention import InvalidArgumentError

FOLDER = Path(__file__).parent / "texts"
KINDS = {
    "prose": "Python's language reference, as pydoc shows it",
    "code": "a module of Python's standard library",
    "licences": "three software licences",
    "changelog": "the changelog of a package",
    "headers": "C header files",
}
CALIBRATION = "calibration"
"""A text that is never judged: other prose and other code."""

Tokenize = Callable[[str], Sequence[int]]


def read(name: str) -> str:
    """One text.

    Raises:
        InvalidArgumentError: an unknown name.
    """
    if name not in KINDS and name != CALIBRATION:
        raise InvalidArgumentError(f"no text {name!r}; known: {', '.join(KINDS)}")
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def windows(tokens: Sequence[int], context: int, count: int) -> Tensor:
    """The first ``count`` tokens as windows that do not overlap, each with the token after it; int64 ``[W, N + 1]``.

    >>> windows(range(9), 4, 8)
    tensor([[0, 1, 2, 3, 4],
            [4, 5, 6, 7, 8]])

    Raises:
        InvalidArgumentError: if there are too few tokens, or fewer than one window is asked for.
    """
    if count < context or len(tokens) < count + 1:
        raise InvalidArgumentError(f"{count} of {len(tokens)} tokens are no windows of {context} and one more")
    whole = torch.tensor(list(tokens[: count // context * context + 1]), dtype=torch.int64, device="cpu")
    at = torch.arange(0, len(whole) - 1, context, dtype=torch.int64, device="cpu")[:, None]
    return whole[at + torch.arange(context + 1, dtype=torch.int64, device="cpu")]

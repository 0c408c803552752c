"""Models that `lowbit calibrate` knows by name, and how it finds any other."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidArgumentError


@dataclass(frozen=True)
class Subject:
    """A model and what it is calibrated with.

    name: for titles. model: whose attention calls ``torch.nn.functional.scaled_dot_product_attention``. prompts: what
    ``run`` is called with, one after the other; it runs the model once and returns its result. timesteps: what moves
    the steps (``None``, ``"forwards"`` or a scheduler), as in `observe`.
    """

    name: str
    model: torch.nn.Module
    prompts: Sequence[Any]
    run: Callable[[Any], Any]
    timesteps: Any = None


def minilm(chunks: int = 3, tokens: int = 512) -> Subject:
    """MiniLM-L6 with real weights, reading unpadded chunks of English from Python's docstrings.

    Raises:
        MissingExtraError: the extra ``demo`` is not installed.
    """
    from ..demo.minilm import load_sdpa
    from ..demo.text import passages

    model, tokenize = load_sdpa()
    prompts = [tokenize([text], tokens) for text in passages(chunks)]

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = model(**batch).last_hidden_state
        return out

    return Subject(f"MiniLM-L6, {chunks} chunks of {tokens} tokens", model, prompts, run)


def lm() -> Subject:
    """The trained language model of bytes (docs/subjects.md), on training text."""
    from ..subjects.calibration import lm as make

    return make()


def dit() -> Subject:
    """The trained diffusion transformer (docs/subjects.md), drawing two pictures a prompt."""
    from ..subjects.calibration import dit as make

    return make()


SUBJECTS: dict[str, Callable[[], Subject]] = {"minilm": minilm, "lm": lm, "dit": dit}
"""Every subject, by name."""


def find_subject(name: str) -> Subject:
    """A subject by its name, or ``module:function``: a function of the user's own that returns a `Subject`.

    Raises:
        InvalidArgumentError: an unknown name, or a function that cannot be found or returns something else.
    """
    if name in SUBJECTS:
        return SUBJECTS[name]()
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise InvalidArgumentError(
            f"subject {name!r} is neither one of {', '.join(SUBJECTS)} nor module:function, a function that returns a "
            "lowbit_attention.adaptive.Subject"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as python -m does
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InvalidArgumentError(f"subject {name!r}: {error}") from None
    found = make()
    if not isinstance(found, Subject):
        raise InvalidArgumentError(f"subject {name!r}: {function}() returned a {type(found).__name__}, not a Subject")
    return found

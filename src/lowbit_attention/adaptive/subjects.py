"""Models that `lowbit calibrate` knows by name, and how it finds any other."""

from __future__ import annotations

import importlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidArgumentError, LowbitError, shown


@dataclass(frozen=True)
class Subject:
    """A model and what it is calibrated with.

    name: for titles. model: whose attention calls ``torch.nn.functional.scaled_dot_product_attention``. prompts: what
    ``run`` is called with, one after the other; it runs the model once and returns its result. timesteps: what moves
    the steps (``None``, ``"forwards"`` or a scheduler), as in `observe`.

    Raises:
        InvalidArgumentError: a field of another type, or no prompt.
    """

    name: str
    model: torch.nn.Module
    prompts: Sequence[Any]
    run: Callable[[Any], Any]
    timesteps: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, torch.nn.Module):
            raise InvalidArgumentError(f"model is a {type(self.model).__name__}, not a torch.nn.Module")
        if not callable(self.run):
            raise InvalidArgumentError(f"run is a {type(self.run).__name__}, not a function")
        if not isinstance(self.prompts, Sequence) or not len(self.prompts):
            raise InvalidArgumentError(f"prompts is {shown(self.prompts)}, not a list with at least one")


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
    """The trained language model of bytes (docs/subjects.md), on training text.

    Raises:
        InvalidArgumentError: lowbit-attention-studies is not installed.
    """
    return _of_a_study("lm")


def dit() -> Subject:
    """The trained diffusion transformer (docs/subjects.md), drawing two pictures a prompt.

    Raises:
        InvalidArgumentError: lowbit-attention-studies is not installed.
    """
    return _of_a_study("dit")


def _of_a_study(name: str) -> Subject:
    """A subject whose weights are in the package of the studies (by its name: nothing here needs it otherwise)."""
    try:
        made: Subject = getattr(importlib.import_module(f"{_STUDIES}.subjects.calibration"), name)()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != _STUDIES:
            raise
        raise InvalidArgumentError(
            f"subject {name!r} is part of lowbit-attention-studies, which is not installed: pip install "
            "lowbit-attention-studies, or, in a clone of the repository, pip install ./studies"
        ) from None
    return made


_STUDIES = "lowbit_studies"


SUBJECTS: dict[str, Callable[[], Subject]] = {"minilm": minilm, "lm": lm, "dit": dit}
"""Every subject, by name."""


def find_subject(name: str) -> Subject:
    """A subject by its name, or ``module:function``: a function of the user's own that returns a `Subject`.

    Raises:
        InvalidArgumentError: an unknown name, or a function that cannot be found, raises or returns something else.
    """
    if not isinstance(name, str):
        raise InvalidArgumentError(f"subject {shown(name)} is no name")
    if name in SUBJECTS:
        return SUBJECTS[name]()
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise InvalidArgumentError(
            f"subject {name!r} is neither one of {', '.join(SUBJECTS)} nor module:function, a function that returns a "
            "lowbit_attention.adaptive.Subject"
        )
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"subject {shown(name)}: module:function are Python's names, from where the command runs (my.module:make)"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as python -m does
    with others_code(f"subject {name}: importing {module}"):
        imported = importlib.import_module(module)
    make = getattr(imported, function, None)
    if not callable(make):
        why = (
            "is no function" if hasattr(imported, function) else f"is not there: {module} has no attribute {function!r}"
        )
        raise InvalidArgumentError(f"subject {name!r}: {function} {why}")
    with others_code(f"subject {name}: {function}()"):
        found = make()
    if not isinstance(found, Subject):
        raise InvalidArgumentError(f"subject {name!r}: {function}() returned a {type(found).__name__}, not a Subject")
    return found


_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@contextmanager
def others_code(what: str) -> Iterator[None]:
    """Within the block runs code that is not ours: what it raises, sys.exit included, becomes one line.

    Our own errors pass as they are, and so does Ctrl-C.

    Raises:
        InvalidArgumentError: something else was raised; that is its cause.
    """
    try:
        yield
    except LowbitError:
        raise
    except SystemExit as error:
        raise InvalidArgumentError(f"{what} called sys.exit({shown(error.code)}){_where(error)}") from error
    except Exception as error:
        text = " ".join(str(error).split())
        said = f"{type(error).__name__}: {text if len(text) <= _LONGEST else text[:_LONGEST] + '…'}"
        raise InvalidArgumentError(f"{what} raised {said.removesuffix(': ')}{_where(error)}") from error


_LONGEST = 300
"""Characters of an error's text that are shown."""


def _where(error: BaseException) -> str:
    """The innermost line of code that is neither an installed package's nor ours nor the import machinery's."""
    frames = traceback.extract_tb(error.__traceback__)
    installed = (
        "site-packages",
        "dist-packages",
        "<frozen",
        str(Path(__file__).parents[1]),
        sysconfig.get_path("stdlib"),
    )
    theirs = [f for f in frames if not any(part in f.filename for part in installed)]
    return f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""

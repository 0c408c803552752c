"""Files of this room: JSON that is read as plain data, value by value, each of its type and within its bounds."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InvalidArgumentError, shown
from ..output.files import json_text
from ..output.saving import as_path, write_whole

_MOST_BYTES = 1 << 29
"""Of a file: twice what the 200,000 calls that `observe` keeps take, at about 1 kB each."""
_MOST = 2**53
"""Of a count: a JSON number beyond it is not exact in every reader."""
_LARGEST = sys.float_info.max
_DEEPEST = 32
"""Of nested lists and objects in what people write into a policy."""

DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What looking into a document that is none of ours raises."""


def text_of(value: Any, what: str) -> str:
    """A text. ValueError: something else."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {shown(value)}, not a text")
    return value


def count_of(value: Any, what: str, most: int = _MOST) -> int:
    """An integer from 0 to ``most``; 2.0 is one, too. ValueError: something else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{what} is {shown(value)}, not an integer from 0 to {most}")
    return value


def number_of(value: Any, what: str, least: float = -math.inf) -> float:
    """A finite number, at least ``least``. ValueError: something else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # (compared, not converted: an integer may be beyond any float)
    if not is_number or not abs(value) <= _LARGEST or value < least:
        bound = f" from {least:g}" if least > -math.inf else ""
        raise ValueError(f"{what} is {shown(value)}, not a finite number{bound}")
    return float(value)


def object_of(value: Any, what: str) -> dict[str, Any]:
    """A JSON object. ValueError: something else."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}, not an object")
    return value


def list_of(value: Any, what: str) -> list[Any]:
    """A JSON list. ValueError: something else."""
    if not isinstance(value, list):
        raise ValueError(f"{what} is {shown(value)}, not a list")
    return value


def check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Whether JSON can hold a value as it is.

    Raises:
        InvalidArgumentError: NaN, an object, a key that is no text, or too deep.
    """
    if depth > _DEEPEST:
        raise InvalidArgumentError(f"{where.split('[')[0]} is nested deeper than {_DEEPEST}")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise InvalidArgumentError(f"{where} has the key {shown(name)}, and JSON's keys are text")
            check_plain(inner, f"{where}[{shown(name)}]", depth + 1)
    elif isinstance(value, list | tuple):
        for at, inner in enumerate(value):
            check_plain(inner, f"{where}[{at}]", depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= _LARGEST:
            raise InvalidArgumentError(f"{where} is {shown(value)}, which JSON has no word for")
    elif value is not None and not isinstance(value, str | bool):
        raise InvalidArgumentError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def read_document(path: str | os.PathLike[str], form: str, schema: int) -> dict[str, Any]:
    """A JSON object of our own, as plain data.

    Raises:
        InvalidArgumentError: no such file, no regular one, too large, no JSON, another format or version.
    """
    named = as_path(path)
    try:
        data = json.loads(_content(named), parse_constant=_no_constant, object_pairs_hook=_each_once)
    except FileNotFoundError:
        raise InvalidArgumentError(f"no file {named}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{named} is no JSON file: {_first_line(error)}") from None
    if not isinstance(data, dict) or data.get("format") != form:
        what = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise InvalidArgumentError(f"{named} holds no {form}: its format is {shown(what)}")
    if type(data.get("schema")) is not int or data["schema"] != schema:
        raise InvalidArgumentError(f"{named} has schema {shown(data.get('schema'))}; this version reads {schema}")
    return data


def _content(path: Path) -> str:
    """The text of a regular file; a pipe is not waited for, and a device not read."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidArgumentError(f"{path} is no regular file")
        if found.st_size > _MOST_BYTES:
            raise InvalidArgumentError(f"{path} has {found.st_size} bytes, and at most {_MOST_BYTES} are read")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(_MOST_BYTES).decode("utf-8")
    finally:
        os.close(handle)


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(n for n in names if names.count(n) > 1))} is there twice in one object")
    return found


def _first_line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).partition("\n")[0]


def write_lines(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """JSON in which each entry of a list or object at the top has a line of its own; written whole or not at all.

    Raises:
        InvalidArgumentError, SaveError: as `write_whole`.
    """
    parts = []
    for name, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = ",\n".join("    " + json_text(entry) for entry in value)
            parts.append(f"  {json_text(name)}: [\n{inner}\n  ]")
        elif isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            rows = (f"    {json_text(k)}: {json_text(v)}" for k, v in value.items())
            parts.append(f"  {json_text(name)}: {{\n" + ",\n".join(rows) + "\n  }")
        else:
            parts.append(f"  {json_text(name)}: {json_text(value)}")
    write_whole(path, "{\n" + ",\n".join(parts) + "\n}\n")

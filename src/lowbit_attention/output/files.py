"""Rows of results as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .saving import write_whole

Row = Mapping[str, Any]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a row; the columns are all names that occur, in the order they first do.

    Raises:
        InvalidArgumentError, SaveError: as `write_whole`.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def write_json(path: Path, document: Any) -> None:
    """An indented JSON document, UTF-8; a number that is not finite is ``null``.

    Raises:
        InvalidArgumentError, SaveError: as `write_whole`.
    """
    write_whole(path, json_text(document, indent=2) + "\n")


def json_text(document: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: it has no word for NaN and infinity, which become ``null``.

    >>> json_text({"l1": float("nan"), "inputs": ["α"]})
    '{"l1": null, "inputs": ["α"]}'
    """
    return json.dumps(_finite(document), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value

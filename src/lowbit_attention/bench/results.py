"""Measurements as rows: one a shape, provider and part; CSV files that grow from run to run, and JSON."""

from __future__ import annotations

import csv
import io
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import torch

from .._version import __version__
from ..errors import InvalidArgumentError, shown
from ..output.saving import appending, check_writable
from .shapes import Shape

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Row = TypeVar("Row", bound=DataclassInstance)

CUDNN = "torch_cudnn"
"""The provider that ratios are to: the fastest 16-bit attention that comes with PyTorch."""


@dataclass(frozen=True)
class Facts:
    """What all rows of a run share."""

    gpu: str
    driver: str
    cuda: str
    torch: str
    lowbit: str
    commit: str


@dataclass(frozen=True)
class Measurement:
    """One measurement. Times are microseconds on the device; ``host_us`` is the host's for queueing a whole call."""

    time: str
    gpu: str
    driver: str
    cuda: str
    torch: str
    lowbit: str
    commit: str
    provider: str
    provider_version: str
    part: str
    shape: str
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    is_causal: bool
    dtype: str
    median_us: float
    p20_us: float
    p80_us: float
    rounds: int
    tops: float
    ratio_to_cudnn: float | None = None
    host_us: float | None = None
    extra_mib: float | None = None
    sm_mhz: float | None = None

    @property
    def series(self) -> str:
        """Provider and part."""
        return f"{self.provider} {self.part}"


def columns(kind: type[DataclassInstance]) -> tuple[str, ...]:
    """The columns of a file whose rows are of this kind."""
    return tuple(f.name for f in fields(kind))


COLUMNS = columns(Measurement)


def tops(shape: Shape, microseconds: float) -> float:
    """10¹² operations a second, of the visible pairs alone."""
    return shape.flops / microseconds / 1e6 if microseconds > 0 else 0.0


def with_ratios(rows: Sequence[Measurement]) -> list[Measurement]:
    """The rows of one shape in one run, with how much faster each is than cuDNN's whole 16-bit call, if that ran."""
    reference = [r.median_us for r in rows if r.provider == CUDNN and r.part == "whole"]
    if not reference:
        return list(rows)
    return [replace(r, ratio_to_cudnn=round(reference[0] / r.median_us, 4) if r.median_us else None) for r in rows]


def collect_facts(device: torch.device, driver: str, commit: str | None = None) -> Facts:
    """This machine, these versions, this commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    commit = commit if commit is not None else commit_of(Path(__file__).parents[1] / "__init__.py")
    return Facts(name, driver, torch.version.cuda or "", str(torch.__version__), __version__, commit)


def commit_of(file: Path) -> str:
    """The short commit of the checkout that a file is part of, ``+dirty`` if it has changes, empty elsewhere."""
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:  # say, a package in a project's .venv
        return ""
    head = _git(file.parent, "rev-parse", "--short", "HEAD")
    if not head:
        return ""
    return head + ("+dirty" if _git(file.parent, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=False, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_csv(path: Path, kind: type[DataclassInstance] = Measurement) -> None:
    """Whether rows can be appended to this file: it is not there, empty, or has the same columns.

    Raises:
        InvalidArgumentError: other columns, or no regular file. SaveError: it cannot be written.
    """
    check_writable(path)
    _check_columns(path, columns(kind))


def _check_columns(path: Path, wanted: tuple[str, ...]) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        try:
            header = tuple(next(csv.reader(file), []))
        except csv.Error as error:
            raise InvalidArgumentError(f"{path} is no CSV file: {error}") from None
    if header == wanted:
        return
    missing = [name for name in wanted if name not in header]
    foreign = [name for name in header if name not in wanted]
    why = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(foreign)}"] * bool(foreign)
    raise InvalidArgumentError(
        f"{path} holds other columns than a benchmark's ({shown('; '.join(why) or 'in another order')[1:-1]}): name "
        "another file"
    )


def append_csv(path: Path, rows: Sequence[DataclassInstance], kind: type[DataclassInstance] = Measurement) -> None:
    """Add rows to a file, which is made if it is not there; of several processes each adds whole rows.

    Raises:
        InvalidArgumentError: the file has other columns, or is no regular one. SaveError: it cannot be written.
    """
    check_csv(path, kind)
    with appending(path) as file:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns(kind))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
        file.write(text.getvalue().encode("utf-8", "backslashreplace"))


def read_csv(path: Path) -> list[Measurement]:
    """The rows of a file that `append_csv` wrote.

    Raises:
        InvalidArgumentError: other columns, or a value that is none.
    """
    return read_rows(path, Measurement)


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """As `read_csv`, rows of another kind."""
    if not path.is_file():
        raise InvalidArgumentError(f"no file {path}")
    names = columns(kind)
    _check_columns(path, names)
    kinds = get_type_hints(kind)
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, line in enumerate(csv.DictReader(file), start=2):
            try:
                rows.append(kind(**{name: _value(kinds[name], line[name]) for name in names}))
            except (TypeError, ValueError, OverflowError) as error:
                raise InvalidArgumentError(f"{path}, line {number}: {error}") from None
    return rows


def _value(kind: Any, text: str) -> Any:
    if kind is bool:
        if text not in ("True", "False"):
            raise ValueError(f"{text!r} is neither True nor False")
        return text == "True"
    if kind in (str, int, float):
        return kind(text)
    number = int if kind == (int | None) else float
    return number(text) if text else None

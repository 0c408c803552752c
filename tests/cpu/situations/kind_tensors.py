"""Tensors from files, and errors on their way between processes."""

from __future__ import annotations

import copy
import json
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from situation import Situation, gives, holds, refused

from lowbit_attention.adaptive import PolicyMismatchError
from lowbit_attention.errors import (
    InvalidArgumentError,
    InvalidRecipeError,
    LowbitError,
    MissingExtraError,
    UnsupportedError,
)
from lowbit_attention.evaluation import memory
from lowbit_attention.evaluation.inputs import from_file, not_finite

T = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0))


def tensors(case: str, what: str, save: Callable[[Path], Any], expect: Any, name: str = "a.pt") -> Situation:
    def act(folder: Path) -> Any:
        save(folder / name)
        return from_file(folder / name)

    return Situation(case, what, act, expect)


def saved(**changes: Any) -> Callable[[Path], Any]:
    return lambda path: torch.save({"q": T, "k": T, "v": T} | changes, path)


def _f4(path: Path) -> None:
    """A safetensors file whose q is of a type that torch has not."""
    header = {n: {"dtype": "F4", "shape": [1, 2, 8, 16], "data_offsets": [0, 128]} for n in ("q",)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(128))


INPUTS = [
    Situation(
        "T23+",
        "a file that unpacks to more than there is",
        lambda f: _bomb(f),
        refused(InvalidArgumentError, "unpacked", "of memory"),
    ),
    tensors("T23", "safetensors with F4", _f4, refused(InvalidArgumentError, "a.safetensors"), "a.safetensors"),
    tensors("T23", "an empty .pt", lambda p: p.write_bytes(b""), refused(InvalidArgumentError, "plain tensors")),
    tensors(
        "T23", "a meta tensor", saved(q=torch.empty(1, 2, 8, 16, device="meta")), refused(InvalidArgumentError, "meta")
    ),
    tensors(
        "T23",
        "a tensor expanded to 8 TB",
        saved(k=torch.zeros(1, 1, 1, 1).expand(1, 2, 2**36, 16)),
        refused(InvalidArgumentError, "GiB of memory"),
    ),
    tensors(
        "T23",
        "saved with requires_grad",
        saved(q=T.clone().requires_grad_()),
        holds(lambda f: not f[0].q.requires_grad),
    ),
    tensors("T23+", "a parameter", saved(v=torch.nn.Parameter(T)), holds(lambda f: not f[0].v.requires_grad)),
    tensors("T23+", "a sparse tensor", saved(q=T.to_sparse()), refused(InvalidArgumentError, "not a plain one")),
    tensors("T23+", "complex numbers", saved(q=T.to(torch.complex64)), refused(InvalidArgumentError, "complex64")),
    tensors(
        "T23+",
        "an FP8 tensor is computed with as float32",
        saved(q=T.to(torch.float8_e4m3fn)),
        holds(lambda f: f[0].q.dtype == torch.float32),
    ),
    tensors(
        "T23+",
        "half a file",
        lambda p: (saved()(p), p.write_bytes(p.read_bytes()[:500])),
        refused(InvalidArgumentError, "plain tensors"),
    ),
    tensors(
        "T23+", "a list of q, k, v", lambda p: torch.save([T, T, 3], p), refused(InvalidArgumentError, "has only k, q")
    ),
    tensors(
        "T23+",
        "safetensors cut short",
        lambda p: (save_file({"q": T}, p), p.write_bytes(p.read_bytes()[:-8])),
        refused(InvalidArgumentError, "safetensors"),
        "a.safetensors",
    ),
    tensors(
        "T23+",
        "a tensor beside them in F4 is left alone",
        lambda p: _beside(p),
        holds(lambda f: f[0].name == "a"),
        "a.safetensors",
    ),
    tensors(
        "T23",
        "NaN and infinity are counted",
        saved(q=T.where(T < 1, math.nan)),
        holds(lambda f: not_finite(f[0]) == {"q": int((T >= 1).sum())}),
    ),
]


def _bomb(folder: Path) -> Any:
    """A small file that unpacks to more than there is, on a machine with 1 MiB."""
    torch.save({n: torch.zeros(1, 1, 2**18, 1) for n in "qkv"}, folder / "stored.pt")
    with (
        zipfile.ZipFile(folder / "stored.pt") as old,
        zipfile.ZipFile(folder / "a.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with mock.patch.object(memory, "host_bytes", return_value=1 << 20):
        return from_file(folder / "a.pt")


def _beside(path: Path) -> None:
    data = T.numpy().tobytes()
    header = {n: {"dtype": "F32", "shape": [1, 2, 8, 16], "data_offsets": [0, len(data)]} for n in ()}
    at = 0
    for n in "qkv":
        header[n] = {"dtype": "F32", "shape": [1, 2, 8, 16], "data_offsets": [at, at + len(data)]}
        at += len(data)
    header["w"] = {"dtype": "F4", "shape": [16], "data_offsets": [at, at + 8]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data * 3 + bytes(8))


def _errors() -> list[LowbitError]:
    """One of every class of error that the package has."""
    special: dict[type, LowbitError] = {
        InvalidRecipeError: InvalidRecipeError("recipe 'x'", ["a", "b"]),
        MissingExtraError: MissingExtraError("a plot", "plot", "matplotlib"),
        UnsupportedError: UnsupportedError("no", {"kernel": ("why", "and why")}),
        PolicyMismatchError: PolicyMismatchError(["modules: 1, here 2"]),
    }
    found, todo = [], [LowbitError]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls.__module__.startswith("lowbit_attention"):
            found.append(special.get(cls) or cls("what happened"))
    return found


def _told(error: BaseException) -> Any:
    fields = {name: getattr(error, name, None) for name in ("reasons", "extra", "differences", "msg")}
    return type(error), str(error), error.args, fields, error.__dict__


def _comes_back(way: Callable[[Any], Any]) -> list[str]:
    return [type(e).__name__ for e in _errors() if _told(way(e)) != _told(e)]


ERRORS = [
    Situation("T26", "every error pickled", lambda _: _comes_back(lambda e: pickle.loads(pickle.dumps(e))), gives([])),
    Situation("T26+", "with protocol 0", lambda _: _comes_back(lambda e: pickle.loads(pickle.dumps(e, 0))), gives([])),
    Situation("T26", "every error copied", lambda _: _comes_back(copy.copy), gives([])),
    Situation("T26+", "and copied deeply", lambda _: _comes_back(copy.deepcopy), gives([])),
]

SITUATIONS = [*INPUTS, *ERRORS]

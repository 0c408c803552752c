"""Q, K and V to evaluate: from a file (nothing in it is executed) or from a synthetic family."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from ..call import checks
from ..errors import InvalidArgumentError
from .memory import check_fits
from .synthetic import make

_SAFE_TORCH = Version("2.10")  # the first whose restricted unpickler has no known hole
_ROLES = {"q": "q", "query": "q", "k": "k", "key": "k", "v": "v", "value": "v"}
_DTYPES = (*checks.FLOAT_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)
_BYTES_A_NUMBER = 4 + 8
"""What each number takes at the least: a recipe computes in float32, its judge in float64."""


@dataclass(frozen=True)
class Inputs:
    """One named set of ``[B, H, N, D]`` tensors."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor


def from_family(
    family: str,
    *,
    batch: int,
    heads: int,
    length: int,
    head_dim: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """A synthetic family, rounded to ``dtype``.

    Raises:
        InvalidArgumentError: an unknown family, or sizes that do not fit into this machine's memory.
    """
    check_fits(
        f"Q, K and V of {batch} × {heads} × {length} × {head_dim}",
        3 * batch * heads * length * head_dim * _BYTES_A_NUMBER,
    )
    made = make(family, batch=batch, heads=heads, length=length, head_dim=head_dim, seed=seed)
    return Inputs(family, *(t.to(dtype) for t in made))


def from_file(path: Path, layout: str = "HND") -> list[Inputs]:
    """Every set of Q, K and V in a ``.safetensors`` or ``.pt``/``.pth`` file.

    A set is three tensors named ``q``, ``k``, ``v`` (or ``query``, ``key``, ``value``), behind a common prefix if the
    file holds several: ``layers.3.q``. Tensors of 3 dimensions are one batch. A ``.pt`` file is read with
    ``weights_only``, so that nothing in it is executed; gradients are not asked for.

    Raises:
        InvalidArgumentError: an unreadable file, another ending, no complete set in it, or tensors that hold no plain
            floating numbers, or more of them than fit into memory.
    """
    checks.check_choice("layout", layout, checks.LAYOUTS)
    if not path.is_file():
        raise InvalidArgumentError(f"no file {path}")
    if path.suffix not in _READERS:
        raise InvalidArgumentError(f"{path} ends in {path.suffix!r}; readable are {', '.join(_READERS)}")
    check_fits(str(path), path.stat().st_size)
    tensors, names = _READERS[path.suffix](path)
    sets: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if _ROLES[last] in sets.setdefault(prefix, {}):
            raise InvalidArgumentError(f"{path}: {name} and another tensor are both {prefix or path.name}'s {last[0]}")
        sets[prefix][_ROLES[last]] = tensor
    incomplete = [f"{prefix or path.name} has only {', '.join(sorted(s))}" for prefix, s in sets.items() if len(s) < 3]
    if not sets or incomplete:
        why = "; ".join(incomplete) or f"its tensors are {', '.join(names[:8]) or 'none'}"
        raise InvalidArgumentError(f"{path}: expected tensors q, k and v (or prefix.q, …): {why}")
    return [
        Inputs(
            prefix or path.stem,
            *(_hnd(s[r], layout, f"{path}: {prefix}.{r}" if prefix else f"{path}: {r}") for r in "qkv"),
        )
        for prefix, s in sets.items()
    ]


def not_finite(inputs: Inputs) -> dict[str, int]:
    """How many numbers of each tensor are NaN or infinite; only those that have any."""
    counts = {name: int((~t.isfinite()).sum()) for name, t in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v))}
    return {name: count for name, count in counts.items() if count}


def _is_wanted(name: str) -> bool:
    return name.rpartition(".")[2] in _ROLES


def _hnd(t: Tensor, layout: str, name: str) -> Tensor:
    """A tensor as it is computed with: plain numbers in this machine's memory, ``[B, H, N, D]``, without gradients."""
    if t.is_meta:
        raise InvalidArgumentError(f"{name} is on the meta device: it has a shape and no numbers")
    if t.is_nested or t.layout is not torch.strided:
        raise InvalidArgumentError(f"{name} is a {'nested' if t.is_nested else t.layout} tensor, not a plain one")
    if t.dtype not in _DTYPES or t.dim() not in (3, 4) or t.numel() == 0:
        raise InvalidArgumentError(
            f"{name}: expected floating tensors of 3 or 4 dimensions, got {t.dtype} {tuple(t.shape)}"
        )
    check_fits(f"{name} {tuple(t.shape)}", t.numel() * _BYTES_A_NUMBER)
    t = t.detach()
    t = t if t.dtype in checks.FLOAT_DTYPES else t.float()
    t = t[None] if t.dim() == 3 else t
    return t.transpose(1, 2) if layout == "NHD" and t.dim() == 4 else t


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that are wanted, and every name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names if _is_wanted(name)}, names
    except SafetensorError as error:
        raise InvalidArgumentError(f"{path} is no safetensors file: {_first_line(error)}") from None
    except Exception as error:  # an element type that torch has not, say: several kinds of error from several versions
        raise InvalidArgumentError(f"{path} holds tensors that torch cannot read: {_first_line(error)}") from None


def _read_pt(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that are wanted, and every name."""
    if Version(torch.__version__) < _SAFE_TORCH:
        raise InvalidArgumentError(
            f"{path}: such a file can make PyTorch {torch.__version__} execute code, even with weights_only "
            f"(CVE-2025-32434, CVE-2026-24747): use .safetensors, or PyTorch {_SAFE_TORCH} or newer"
        )
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                check_fits(f"{path}, unpacked,", sum(entry.file_size for entry in packed.infolist()))
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except InvalidArgumentError:
        raise
    except Exception as error:  # unpickling fails in many ways, each of them the file's
        raise InvalidArgumentError(f"{path} cannot be read as plain tensors: {_first_line(error)}") from None
    if isinstance(content, list | tuple) and len(content) == 3:
        content = dict(zip("qkv", content, strict=True))
    if not isinstance(content, dict):
        raise InvalidArgumentError(f"{path} holds a {type(content).__name__}, not a dict of tensors or (q, k, v)")
    named = {str(name): value for name, value in content.items()}
    return {n: t for n, t in named.items() if isinstance(t, Tensor) and _is_wanted(n)}, list(named)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_READERS = {".safetensors": _read_safetensors, ".pt": _read_pt, ".pth": _read_pt}

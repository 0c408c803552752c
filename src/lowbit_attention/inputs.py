"""Q, K and V to evaluate: from a file (nothing in it is executed) or from a synthetic family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from . import checks
from .errors import InvalidArgumentError
from .synthetic import make

_SAFE_TORCH = Version("2.10")  # the first whose restricted unpickler has no known hole
_ROLES = {"q": "q", "query": "q", "k": "k", "key": "k", "v": "v", "value": "v"}


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
    """A synthetic family, rounded to ``dtype``."""
    made = make(family, batch=batch, heads=heads, length=length, head_dim=head_dim, seed=seed)
    return Inputs(family, *(t.to(dtype) for t in made))


def from_file(path: Path, layout: str = "HND") -> list[Inputs]:
    """Every set of Q, K and V in a ``.safetensors`` or ``.pt``/``.pth`` file.

    A set is three tensors named ``q``, ``k``, ``v`` (or ``query``, ``key``, ``value``), behind a common prefix if the
    file holds several: ``layers.3.q``. Tensors of 3 dimensions are one batch. A ``.pt`` file is read with
    ``weights_only``, so that nothing in it is executed.

    Raises:
        InvalidArgumentError: an unreadable file, another ending, or no complete set in it.
    """
    checks.check_choice("layout", layout, checks.LAYOUTS)
    if not path.is_file():
        raise InvalidArgumentError(f"no file {path}")
    tensors = _load(path)
    sets: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last in _ROLES and isinstance(tensor, Tensor):
            if _ROLES[last] in sets.setdefault(prefix, {}):
                raise InvalidArgumentError(
                    f"{path}: {name} and another tensor are both {prefix or path.name}'s {last[0]}"
                )
            sets[prefix][_ROLES[last]] = tensor
    incomplete = [f"{prefix or path.name} has only {', '.join(sorted(s))}" for prefix, s in sets.items() if len(s) < 3]
    if not sets or incomplete:
        why = "; ".join(incomplete) or f"its tensors are {', '.join(map(str, list(tensors)[:8])) or 'none'}"
        raise InvalidArgumentError(f"{path}: expected tensors q, k and v (or prefix.q, …): {why}")
    return [Inputs(prefix or path.stem, *(_hnd(s[r], layout) for r in "qkv")) for prefix, s in sets.items()]


def _hnd(t: Tensor, layout: str) -> Tensor:
    if not t.is_floating_point() or t.dim() not in (3, 4) or t.numel() == 0:
        raise InvalidArgumentError(f"expected floating tensors of 3 or 4 dimensions, got {t.dtype} {tuple(t.shape)}")
    t = t[None] if t.dim() == 3 else t
    return t.transpose(1, 2) if layout == "NHD" and t.dim() == 4 else t


def _load(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise InvalidArgumentError(f"{path} is no safetensors file: {error}") from None
    if path.suffix in (".pt", ".pth"):
        if Version(torch.__version__) < _SAFE_TORCH:
            raise InvalidArgumentError(
                f"{path}: such a file can make PyTorch {torch.__version__} execute code, even with weights_only "
                f"(CVE-2025-32434, CVE-2026-24747): use .safetensors, or PyTorch {_SAFE_TORCH} or newer"
            )
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling fails in many ways, each of them the file's
            raise InvalidArgumentError(
                f"{path} cannot be read as plain tensors: {str(error).splitlines()[0]}"
            ) from None
        if isinstance(content, list | tuple) and len(content) == 3:
            return dict(zip("qkv", content, strict=True))
        if isinstance(content, dict):
            return {str(name): value for name, value in content.items()}
        raise InvalidArgumentError(f"{path} holds a {type(content).__name__}, not a dict of tensors or (q, k, v)")
    raise InvalidArgumentError(f"{path} ends in {path.suffix!r}; readable are .safetensors, .pt and .pth")

"""What a provider is: someone who can run attention, and whom the benchmark times."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import metadata
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import LowbitError
from .shapes import Shape

Part = Literal["whole", "kernel"]
"""``whole``: floating-point tensors in, floating-point tensors out. ``kernel``: the attention kernel alone, on inputs
that are quantised already."""

Call = Callable[[], object]


class Unsupported(LowbitError):
    """A provider cannot do this shape on this machine; the message is the reason."""


class Provider(ABC):
    """One way to run attention, under a name.

    ``takes_sequences``: whether `prepare` is given shapes that are sequences of different lengths.
    """

    name: str
    takes_sequences: bool = False

    @abstractmethod
    def version(self) -> str:
        """The version of what runs; only asked if it is available."""

    def not_available_reason(self) -> str | None:
        """Why it cannot run here at all, whatever the shape; ``None`` if it can."""
        return None

    @abstractmethod
    def prepare(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> dict[Part, Call]:
        """Everything that is done once, and what is then timed.

        Args:
            q: ``[B, Hq, Nq, D]``, contiguous; k, v: ``[B, Hkv, Nk, D]``.
            mask: the one that the shape names.
        Returns:
            Functions that queue one call on the current stream; their first tensor is the output. One that raises
            `Unsupported` is left out, with a note.

        Raises:
            Unsupported: not this shape, or not on this machine.
        """


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found; it is not imported."""
    return importlib.util.find_spec(module) is not None


def load(module: str) -> Any:
    """An optional package, untyped."""
    return importlib.import_module(module)


def import_problem(module: str, how: str) -> str | None:
    """Why an optional package cannot be used: not installed (and how it can be), or its own error when imported."""
    if not is_installed(module):
        return f"not installed: {how}"
    try:
        load(module)
    except Exception as error:  # a package built for other libraries can raise anything here
        return f"{module} does not import: {first_line(error)}"
    return None


def package_version(*names: str) -> str:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def first_line(error: BaseException, limit: int = 600) -> str:
    """An error as one line of a report."""
    text = " ".join(str(error).strip().partition("\n")[0].split()) or "no message"
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text if isinstance(error, LowbitError) else f"{type(error).__name__}: {text}"


def need_cuda(q: Tensor) -> None:
    """Refuse tensors that are not on a GPU."""
    if q.device.type != "cuda":
        raise Unsupported("it runs on CUDA devices only")


def packed(*tensors: Tensor) -> list[Tensor]:
    """``[B, H, N, D]`` as packed sequences ``[tokens, H, D]``: only how many tokens there are matters."""
    return [t.transpose(1, 2).reshape(-1, *t.shape[1::2]).contiguous() for t in tensors]


def cu_seqlens(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the sequences of a shape begin, in packed queries and keys: int32 ``[B + 1]``."""
    starts = (accumulate(shape.sequence_lengths(tokens), initial=0) for tokens in (shape.q_len, shape.kv_len))
    cu_q, cu_k = (torch.tensor(list(some), dtype=torch.int32, device=device) for some in starts)
    return cu_q, cu_k


def need_no_mask(mask: Tensor | None, why: str) -> None:
    """Refuse a mask."""
    if mask is not None:
        raise Unsupported(f"no mask is timed with it: {why}")


def need_square_causal(shape: Shape) -> None:
    """Refuse causality between different lengths, for those whose alignment is top-left or undefined."""
    if shape.is_causal and shape.q_len != shape.kv_len:
        raise Unsupported(f"its causality needs as many queries as keys, got {shape.q_len} and {shape.kv_len}")

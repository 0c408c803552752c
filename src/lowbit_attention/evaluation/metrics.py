"""How far two attention outputs are apart, in float64.

Formulas: SageAttention2 (arXiv 2411.10958), section 4.1, on the flattened outputs; O is the exact one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from torch import Tensor

from ..errors import InvalidArgumentError


@dataclass(frozen=True)
class Metrics:
    """Distance of an output O' from the exact output O.

    cos_sim: ``Σ O·O' / (√ΣO² √ΣO'²)``, 1 is best.
    l1: relative L1, ``Σ|O − O'| / Σ|O|``.
    rmse: ``√(Σ(O − O')² / len)``.
    max_error: ``max |O − O'|``.
    """

    cos_sim: float
    l1: float
    rmse: float
    max_error: float

    @property
    def score(self) -> float:
        """``CosSim · (1 − L1)``: what the adaptive choice of SageAttention2 sorts by."""
        return self.cos_sim * (1.0 - self.l1)

    def as_dict(self) -> dict[str, float]:
        """The four numbers by name."""
        return asdict(self)


def compare(exact: Tensor, other: Tensor, rows: Tensor | None = None) -> Metrics:
    """Compare ``other`` with ``exact``.

    Args:
        exact, other: the same shape, ``[..., D]``; any floating dtype.
        rows: bool, broadcastable to the shape without its last dimension: rows that count. Leave out rows that are
            padding or fully masked: they would only dilute the errors.

    Two all-zero outputs are equal (CosSim 1, L1 0); an error against an all-zero exact output gives L1 = ∞. Without
    a single row that counts every number is NaN.

    >>> import torch
    >>> compare(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.5]])).l1
    0.5

    Raises:
        InvalidArgumentError: if the shapes differ.
    """
    if exact.shape != other.shape:
        raise InvalidArgumentError(f"shapes differ: exact {tuple(exact.shape)}, other {tuple(other.shape)}")
    a, b = exact.detach().double(), other.detach().double().to(exact.device)
    if rows is not None:
        chosen = rows.to(a.device).expand(a.shape[:-1])
        a, b = a[chosen], b[chosen]
    if a.numel() == 0:
        return Metrics(math.nan, math.nan, math.nan, math.nan)
    a, b = a.flatten(), b.flatten()
    difference = (a - b).abs()
    norms = float(a.norm() * b.norm())
    total, wrong = float(a.abs().sum()), float(difference.sum())
    equal_zero = 1.0 if wrong == 0 else 0.0
    return Metrics(
        cos_sim=float(a @ b) / norms if norms != 0 else equal_zero,
        l1=wrong / total if total != 0 else (0.0 if wrong == 0 else math.inf),
        rmse=math.sqrt(float((difference**2).mean())),
        max_error=float(difference.max()),
    )

"""What recipes lose on given tensors: the one measurement behind ``lowbit evaluate``, the error budget and the tools.

A long sequence is measured on a sample of its query tiles: means and scales are those of all of Q, K and V, every key
is summed, and only the rows of a few whole query tiles are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.base import MAX_HEAD_DIM
from ..call import checks
from ..call.masks import Masking
from ..errors import InvalidArgumentError, UnsupportedError
from ..recipes.definition import Recipe
from ..recipes.machine import DEFAULT_MACHINE, Machine
from ..recipes.options import AllTokens
from ..reference.attention import emulate
from ..reference.exact import exact
from .metrics import Metrics, compare
from .synthetic import make

DRAWN_ON_THE_CPU = 8192
"""Up to so many tokens synthetic inputs are drawn on the CPU, whatever measures them: short lengths repeat anywhere.
Longer ones are drawn where they are used; drawing 300K tokens on a CPU takes longer than measuring them on a GPU."""


def sampled_rows(length: int, tile: int, wanted: int) -> Tensor:
    """The rows of ``⌈wanted / tile⌉`` whole query tiles spread evenly over a sequence, int64, ascending.

    Of T tiles those with the numbers ``⌊(i + ½) · T / count⌋``; all rows if there are no more tiles.

    >>> sampled_rows(100, 16, 20).tolist() == [*range(16, 32), *range(80, 96)]
    True
    """
    if wanted < 1:
        raise InvalidArgumentError(f"query_rows={wanted}: at least 1")
    tiles = -(-length // tile)
    count = min(tiles, -(-wanted // tile))
    chosen = ((2 * torch.arange(count, dtype=torch.int64, device="cpu") + 1) * tiles) // (2 * max(1, count))
    rows = (chosen[:, None] * tile + torch.arange(tile, dtype=torch.int64, device="cpu")).flatten()
    return rows[rows < length]


class Case:
    """Tensors with their exact attention in float64, against which recipes are measured.

    Args:
        q: ``[B, Hq, Nq, D]``; k: ``[B, Hkv, Nk, D]``; v: ``[B, Hkv, Nk, Dv]``; any floating dtype, on any device.
        machine: whose numbers are emulated, its fidelity included.
        is_causal: causal attention (bottom-right).
        query_rows: measure the fewest whole query tiles that have so many rows (`sampled_rows`); ``None``: all rows.

    Attributes:
        rows: int64 ``[R]``, or ``None`` for all.
        exact: float64 ``[B, Hq, R, Dv]``.

    Raises:
        InvalidArgumentError: shapes that cannot attend to each other.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        machine: Machine = DEFAULT_MACHINE,
        *,
        is_causal: bool = False,
        query_rows: int | None = None,
    ) -> None:
        checks.check_hnd(q, k, v)
        if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
            raise InvalidArgumentError(f"head_dim {max(q.shape[3], v.shape[3])} is above {MAX_HEAD_DIM}")
        q, k, v = q.detach(), k.detach(), v.detach()
        self.q, self.k, self.v, self.machine, self.is_causal = q, k, v, machine, is_causal
        self.sm_scale = 1.0 / math.sqrt(q.shape[-1])
        self.masking = Masking(k.shape[2] - q.shape[2] if is_causal else None)
        self.rows: Tensor | None = None
        seen_by, masking = q, self.masking
        if query_rows is not None:
            self.rows = sampled_rows(q.shape[2], machine.geometry.b_q, query_rows).to(q.device)
            seen_by, masking = q[:, :, self.rows], masking.of_rows(self.rows)
        self.exact, lse = exact(seen_by, k, v, sm_scale=self.sm_scale, masking=masking)
        self._sees = lse != -math.inf  # (the first rows may see no key)

    def emulated(self, recipe: Recipe) -> Tensor:
        """The recipe's output by emulation, float32 ``[B, Hq, R, Dv]``."""
        if recipe.is_exact:
            q = self.q if self.rows is None else self.q[:, :, self.rows]
            masking = self.masking if self.rows is None else self.masking.of_rows(self.rows)
            return exact(q, self.k, self.v, sm_scale=self.sm_scale, masking=masking, dtype=torch.float32)[0]
        return emulate(
            self.q, self.k, self.v, recipe,
            sm_scale=self.sm_scale, masking=self.masking, machine=self.machine, rows=self.rows,
        ).out  # fmt: skip

    def by_kernel(self, recipe: Recipe) -> Tensor:
        """The output of the kernel that runs the whole call here, in the inputs' dtype, ``[B, Hq, R, Dv]``.

        Raises:
            UnsupportedError: no kernel runs it.
        """
        from ..api import attention, explain
        from ..backends.registry import IMPLEMENTATIONS

        told = explain(self.q, self.k, self.v, recipe=recipe, is_causal=self.is_causal)
        if told.implementation not in {i.name for i in IMPLEMENTATIONS if i.is_kernel}:
            reasons = {verdict.implementation: verdict.reasons for verdict in told.verdicts if not verdict.chosen}
            raise UnsupportedError(f"no kernel runs recipe {recipe.name} ({told.request})", reasons)
        out = attention(self.q, self.k, self.v, recipe=recipe, is_causal=self.is_causal)
        return out if self.rows is None else out[:, :, self.rows]

    def metrics(self, out: Tensor) -> Metrics:
        """`compare` over all rows that see a key."""
        return compare(self.exact, out, self._sees)

    def by_head(self, out: Tensor) -> HeadErrors:
        """The absolute errors of each head."""
        error = (out.double() - self.exact).abs().sum(dim=-1)
        wrong, total = (torch.where(self._sees, x, 0.0).sum(dim=-1) for x in (error, self.exact.abs().sum(dim=-1)))
        return HeadErrors(wrong.cpu(), total.cpu())


@dataclass(frozen=True)
class HeadErrors:
    """``Σ|O' − O|`` and ``Σ|O|`` of every head, float64 ``[B, H]``: they are pooled, and their spread tells how well.

    >>> some = HeadErrors(torch.tensor([[1.0, 3.0]]), torch.tensor([[10.0, 10.0]]))
    >>> some.l1, some.standard_error
    (0.2, 0.1)
    """

    wrong: Tensor
    total: Tensor

    @property
    def l1(self) -> float:
        """Relative L1 of all heads together; ∞ where the exact output is 0 and the other is not."""
        return _ratio(self.wrong, self.total)

    @property
    def standard_error(self) -> float | None:
        """Of `l1`, from the spread over heads; ``None`` for a single one."""
        return _standard_error(self.wrong, self.total)

    def times(self, other: HeadErrors) -> tuple[float, float | None]:
        """How many times ``other``'s errors these are on the same heads, and the standard error of that."""
        return _ratio(self.wrong, other.wrong), _standard_error(self.wrong, other.wrong)


def _ratio(above: Tensor, below: Tensor) -> float:
    up, down = float(above.sum()), float(below.sum())
    return up / down if down else (0.0 if up == 0 else math.inf)


def _standard_error(above: Tensor, below: Tensor) -> float | None:
    """Of a ratio of sums over n heads: √(n / (n − 1) · Σ(a − ratio · b)²) / Σb."""
    count, down = above.numel(), float(below.sum())
    if count < 2 or not down:
        return None
    spread = above - _ratio(above, below) * below
    return math.sqrt(count / (count - 1) * float((spread**2).sum())) / down


def with_mean_of_all(recipe: Recipe) -> Recipe:
    """The recipe with k̄ over all tokens: recipes whose k̄ is the same differ by what is left, not by a sample's luck."""
    return recipe.replace(name=recipe.name, k_sample=AllTokens())


@dataclass(frozen=True)
class Grid:
    """What of synthetic families is measured at a length: so many heads × seeds of so many query rows."""

    heads: int = 8
    seeds: int = 3
    head_dim: int = 128
    query_rows: int | None = 64
    dtype: torch.dtype = torch.bfloat16
    is_causal: bool = False

    def case(self, families: Sequence[str], length: int, machine: Machine, device: str = "cpu") -> Case:
        """All seeds of all families side by side in one batch, in this order."""
        shape = (len(families) * self.seeds, self.heads, length, self.head_dim)
        batch = [torch.empty(shape, dtype=self.dtype, device=device) for _ in range(3)]
        drawn_on = "cpu" if length <= DRAWN_ON_THE_CPU else device
        for number, family in enumerate(families):
            for seed in range(self.seeds):
                made = make(family, heads=self.heads, length=length, head_dim=self.head_dim, seed=seed, device=drawn_on)
                for into, one in zip(batch, made, strict=True):
                    into[number * self.seeds + seed] = one[0]
        q, k, v = batch
        return Case(q, k, v, machine, is_causal=self.is_causal, query_rows=self.query_rows)

    def split(self, families: Sequence[str], errors: HeadErrors) -> dict[str, HeadErrors]:
        """The errors of a `case` by family."""
        parts = zip(*(torch.split(x, self.seeds) for x in (errors.wrong, errors.total)), strict=True)
        return {family: HeadErrors(*part) for family, part in zip(families, parts, strict=True)}

    def measure(
        self,
        families: Sequence[str],
        length: int,
        recipes: Mapping[str, Recipe],
        machine: Machine,
        device: str = "cpu",
        run: Callable[[Case, Recipe], Tensor] = Case.emulated,
    ) -> dict[tuple[str, str], HeadErrors]:
        """Errors by family and recipe's label, against exact attention in float64."""
        case = self.case(families, length, machine, device)
        return {
            (family, label): errors
            for label, recipe in recipes.items()
            for family, errors in self.split(families, case.by_head(run(case, recipe))).items()
        }

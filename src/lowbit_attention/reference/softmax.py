"""The online softmax with its two levels of sums: a partial sum in the tensor core's accumulator, and the output.

Everything is in base 2. A row's state is a maximum m (what was subtracted), a row sum l, and sums of P·V; the
*partial* state is what the MMAs add to, the *output* state is FP32 and takes the partial over at each promotion.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..machine import Machine
from ..recipe import Recipe
from ..recipe_options import RestartedMax, TileMax
from .accumulate import E4M3_MIN_EXPONENT, FP16_MIN_EXPONENT, accumulate, round_to_accumulator
from .quantize import round_probabilities


class OnlineSoftmax:
    """State of S slices (batch × head) with N query rows each.

    Args:
        shape: S, N and the channels of V.
    """

    def __init__(self, shape: tuple[int, int, int], recipe: Recipe, machine: Machine, device: torch.device) -> None:
        slices, rows, channels = shape
        self.recipe, self.machine = recipe, machine
        self.sum_in_mma = recipe.row_sum == "accumulator"
        self.channels = channels
        columns = channels + (machine.row_sum_columns if self.sum_in_mma else 0)  # the last columns' are the row sum
        partial_dtype = torch.float64 if machine.accumulators.lossless else torch.float32

        def rows_of(value: float) -> Tensor:
            return torch.full((slices, rows), value, dtype=torch.float32, device=device)

        self.seen = rows_of(-math.inf)  # M, the maximum of all keys so far
        self.partial = torch.zeros(slices, rows, columns, dtype=partial_dtype, device=device)
        self.partial_m, self.partial_l = rows_of(-math.inf), rows_of(0.0)
        self.out = torch.zeros(slices, rows, columns, dtype=torch.float32, device=device)
        self.out_m, self.out_l = rows_of(-math.inf), rows_of(0.0)

    def choose_max(self, rows: slice, x: Tensor, fresh: bool) -> Tensor:
        """Fix what is subtracted from the tile ``x`` ``[S, rows, keys]``; ``fresh``: the partial sum is empty.

        Returns:
            P before rounding, ``P_r · 2^(x − m)``.
        """
        tile_max = x.amax(dim=-1)
        seen = torch.maximum(self.seen[:, rows], tile_max)
        self.seen[:, rows] = seen
        kind = self.recipe.softmax_max
        if isinstance(kind, TileMax):
            m = tile_max
        elif not fresh:
            m = torch.maximum(self.partial_m[:, rows], tile_max)
            factor = _power(self.partial_m[:, rows], m)
            scaled = self.partial[:, rows] * factor[..., None]
            self.partial[:, rows] = round_to_accumulator(scaled, self.recipe.accumulator, self.machine.accumulators)
            self.partial_l[:, rows] *= factor
        elif isinstance(kind, RestartedMax):
            m = torch.maximum(seen - kind.slack, torch.minimum(seen, tile_max + kind.headroom))
        else:
            m = seen
        self.partial_m[:, rows] = m
        # (x − m) + log2 P_r, never x − (m − log2 P_r): that loses P_r's digits beside a large m, and P exceeds P_r
        below = x - torch.where(m == -math.inf, 0.0, m)[..., None]
        return _exp2(below + math.log2(self.recipe.p_max))

    def add(self, rows: slice, p: Tensor, v: Tensor) -> None:
        """Add ``p`` (unrounded, ``[S, rows, keys]``) times ``v`` (``[S, keys, columns]``) to the partial sums."""
        rounded = round_probabilities(p, self.recipe.pv_format)
        if not self.sum_in_mma:
            summed = p if self.recipe.row_sum == "unrounded" else rounded
            self.partial_l[:, rows] += summed.sum(dim=-1)
        accumulate(
            self.partial[:, rows],
            rounded,
            v,
            self.recipe.accumulator,
            self.machine.accumulators,
            self.machine.fidelity,
            E4M3_MIN_EXPONENT if self.recipe.pv_format == "e4m3" else FP16_MIN_EXPONENT,
        )

    def promote(self, rows: slice, scale: Tensor | None = None) -> None:
        """Add the partial sums, times ``scale`` (``[S, 1, columns]``), to the output and start them afresh."""
        m = self.partial_m[:, rows]
        if isinstance(self.recipe.softmax_max, TileMax):
            m = torch.maximum(self.out_m[:, rows], m)
        old, new = _power(self.out_m[:, rows], m), _power(self.partial_m[:, rows], m)
        partial = self.partial[:, rows].float()
        if scale is not None:
            partial = partial * scale
        self.out[:, rows] = self.out[:, rows] * old[..., None] + partial * new[..., None]
        self.out_l[:, rows] = self.out_l[:, rows] * old + self.partial_l[:, rows] * new
        self.out_m[:, rows] = m
        self.partial_m[:, rows] = m
        self.partial[:, rows] = 0
        self.partial_l[:, rows] = 0

    def merge(self, other: OnlineSoftmax) -> None:
        """Add the output state of ``other``, over other keys, to this one's; all partial sums have been promoted."""
        m = torch.maximum(self.out_m, other.out_m)
        mine, others = _power(self.out_m, m), _power(other.out_m, m)
        self.out = self.out * mine[..., None] + other.out * others[..., None]
        self.out_l = self.out_l * mine + other.out_l * others
        self.out_m = m

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output ``[S, N, channels]`` over its row sum (0 for rows that saw no key), row maximum and row sum / P_r."""
        row_sum = self.out[..., self.channels :].sum(dim=-1) if self.sum_in_mma else self.out_l
        out = self.out[..., : self.channels]
        out = out / torch.where(row_sum == 0, 1.0, row_sum)[..., None]
        return out, self.out_m, row_sum / self.recipe.p_max


def _power(old: Tensor, new: Tensor) -> Tensor:
    """``2^(old − new)``, 0 where ``old`` is −inf: nothing was summed yet."""
    return _exp2(old - torch.where(new == -math.inf, 0.0, new))


def _exp2(x: Tensor) -> Tensor:
    """``2^x``, rounded once. (torch's float32 exp2 on a CPU differs by an ulp with a number's place in memory.)"""
    return torch.exp2(x.double()).float()

"""The online softmax with its two levels of sums: a partial sum in the tensor core's accumulator, and the output.

Everything is in base 2. A row's state is a maximum m (what was subtracted), a row sum l, and sums of P·V; the
*partial* state is what the MMAs add to, the *output* state is FP32 and takes the partial over at each promotion.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..recipes.definition import Recipe
from ..recipes.machine import Machine, polynomial_keys
from ..recipes.options import RestartedMax, TileMax
from .accumulate import E4M3_MIN_EXPONENT, FP16_MIN_EXPONENT, accumulate, round_to_accumulator
from .arithmetic import product
from .quantize import SIGNIFICANT_BITS, round_probabilities


def uses_polynomial(recipe: Recipe, machine: Machine, head_dim: int) -> bool:
    """Whether a machine approximates some exponentials of this recipe (``Machine.polynomial_exp2``)."""
    keys = recipe.promotion_keys(machine.geometry) or 0
    sums = recipe.accumulator == "fp8_f16" and keys > machine.geometry.b_k and recipe.row_sum == "accumulator"
    return machine.polynomial_exp2 and sums and head_dim <= 64 and recipe.qk_bits == 8 and not recipe.smooth_q


def row_sum_columns(recipe: Recipe, machine: Machine) -> int:
    """Columns of ones beside V: the machine's, or where V has means by key tile, one for each tile of an interval.

    Key tile t then counts in column t mod columns, whole (on Hopper in one of eight, which its MMA has anyway).
    """
    keys = recipe.promotion_keys(machine.geometry) or 0
    tiles = keys // machine.geometry.b_k if recipe.v_tile_means else 1
    return max(tiles, machine.row_sum_columns)


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
        self.row_sum_columns = row_sum_columns(recipe, machine)
        columns = channels + (self.row_sum_columns if self.sum_in_mma else 0)  # the last columns' are the row sum
        partial_dtype = torch.float64 if machine.accumulators.lossless else torch.float32

        def rows_of(value: float) -> Tensor:
            return torch.full((slices, rows), value, dtype=torch.float32, device=device)

        self.seen = rows_of(-math.inf)  # M, the maximum of all keys so far
        self.partial = torch.zeros(slices, rows, columns, dtype=partial_dtype, device=device)
        self.partial_m, self.partial_l = rows_of(-math.inf), rows_of(0.0)
        self.out = torch.zeros(slices, rows, columns, dtype=torch.float32, device=device)
        self.out_m, self.out_l = rows_of(-math.inf), rows_of(0.0)
        # how much more of P's range a tile takes that jumps (None: none is looked for)
        self.jump_bits = recipe.jump_bits(machine.geometry)
        self.jumps = torch.zeros(slices, rows, dtype=torch.bool, device=device)  # the last tile that `watch` saw
        self.begins = torch.zeros_like(self.jumps)  # that one, an interval
        self.level = rows_of(-math.inf)  # what was subtracted before that one

    def watch(self, rows: slice, x: Tensor, tile: int, fresh: bool, tile_means: Tensor | None) -> None:
        """Before `choose_max`: find the rows that jump in the tile ``x``, and promote where they or the last tile did.

        A warp's rows go together. ``tile``: its number; ``fresh``, ``tile_means``: see `choose_max` and `promote`.
        """
        kind = self.recipe.softmax_max
        if self.jump_bits is None or not isinstance(kind, RestartedMax) or kind.jump is None:
            return
        before = self.jumps[:, rows] & (tile > 1)  # (the second tile begins an interval anyway)
        level = torch.where(before, self.level[:, rows], self.partial_m[:, rows])
        rises = x.amax(dim=-1) - level > kind.jump
        jumps = _of_whole_warps(rises, self.machine.geometry.warp_rows) | (tile == 0)
        self.level[:, rows] = self.partial_m[:, rows]
        if not fresh:
            self.promote(rows, None, tile_means, jumps | before)
        self.begins[:, rows] = jumps | before | fresh
        self.jumps[:, rows] = jumps

    def choose_max(self, rows: slice, x: Tensor, fresh: bool, scores: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Fix what is subtracted from the tile ``x`` ``[S, rows, keys]``; ``fresh``: the partial sum is empty.

        Args:
            scores: where some keys' exponentials are approximated (`uses_polynomial`), the integer scores s and factors
                f of ``x = s · f``, shaped like ``x``.

        Returns:
            P before rounding, ``P_r · 2^(x − m)``.
        """
        tile_max = x.amax(dim=-1)
        seen = torch.maximum(self.seen[:, rows], tile_max)
        self.seen[:, rows] = seen
        kind = self.recipe.softmax_max
        if isinstance(kind, TileMax):
            m = tile_max
        elif isinstance(kind, RestartedMax) and self.jump_bits is not None:
            m = self._max_with_jumps(kind, self.jump_bits, rows, tile_max)
            if not fresh:  # (sums that an interval begins with are 0)
                self._rescale(rows, m)
        elif not fresh:
            m = torch.maximum(self.partial_m[:, rows], tile_max)
            self._rescale(rows, m)
        elif isinstance(kind, RestartedMax):
            m = torch.maximum(seen - kind.slack, torch.minimum(seen, tile_max + kind.headroom))
        else:
            m = seen
        self.partial_m[:, rows] = m
        # (x − m) + log2 P_r, never x − (m − log2 P_r): that loses P_r's digits beside a large m, and P exceeds P_r
        m = torch.where(m == -math.inf, 0.0, m)[..., None]
        log2_p_max = math.log2(self.recipe.p_max)
        p = _exp2(x - m + log2_p_max)
        if scores is not None:
            keys = polynomial_keys(torch.arange(x.shape[-1], dtype=torch.int64, device=x.device))
            s, factor = (of[..., keys] for of in scores)
            p[..., keys] = polynomial_exp2(_exponent(x[..., keys], s, factor, log2_p_max - m))
        return p

    def _max_with_jumps(self, kind: RestartedMax, bits: int, rows: slice, tile_max: Tensor) -> Tensor:
        """What is subtracted from a tile that `watch` has seen."""
        seen = self.seen[:, rows]
        first = torch.where(seen <= tile_max + kind.headroom, seen, tile_max)
        first = torch.where(self.jumps[:, rows], tile_max - bits, first)
        later = torch.maximum(self.partial_m[:, rows], tile_max)
        return torch.where(self.begins[:, rows], torch.maximum(seen - kind.slack, first), later)

    def _rescale(self, rows: slice, m: Tensor) -> None:
        """The partial sums from their maximum to ``m``."""
        factor = _power(self.partial_m[:, rows], m)
        scaled = self.partial[:, rows] * factor[..., None]
        self.partial[:, rows] = round_to_accumulator(scaled, self.recipe.accumulator, self.machine.accumulators)
        self.partial_l[:, rows] *= factor

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
            SIGNIFICANT_BITS[self.recipe.pv_format],
        )

    def promote(
        self, rows: slice, scale: Tensor | None = None, tile_means: Tensor | None = None, of: Tensor | None = None
    ) -> None:
        """Add the partial sums, times ``scale`` (``[S, 1, columns]``), to the output and start them afresh.

        ``tile_means``: what was subtracted from V in the key tile of each column of ones, ``[S, columns, channels]``;
        ``of``: only those of the rows, bool ``[S, rows]``.
        """
        if of is not None and not of.any():
            return
        kept = None if of is None else [state[:, rows].clone() for state in self._states]
        m = self.partial_m[:, rows]
        if isinstance(self.recipe.softmax_max, TileMax):
            m = torch.maximum(self.out_m[:, rows], m)
        old, new = _power(self.out_m[:, rows], m), _power(self.partial_m[:, rows], m)
        partial = self.partial[:, rows].float()
        if scale is not None:
            partial = partial * scale
        if tile_means is not None:
            partial[..., : self.channels] += product(partial[..., self.channels :], tile_means)
        self.out[:, rows] = self.out[:, rows] * old[..., None] + partial * new[..., None]
        self.out_l[:, rows] = self.out_l[:, rows] * old + self.partial_l[:, rows] * new
        self.out_m[:, rows] = m
        self.partial_m[:, rows] = m
        self.partial[:, rows] = 0
        self.partial_l[:, rows] = 0
        for state, before in zip(self._states, kept or (), strict=False):
            assert of is not None
            state[:, rows] = torch.where(of[..., None] if state.dim() == 3 else of, state[:, rows], before)

    @property
    def _states(self) -> tuple[Tensor, ...]:
        """What a promotion changes."""
        return self.out, self.out_m, self.out_l, self.partial, self.partial_m, self.partial_l

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


def _of_whole_warps(rows: Tensor, warp_rows: int) -> Tensor:
    """Whether each pair of rows in a row's warp has one of these (a thread holds r and r + 8), bool ``[S, rows]``."""
    count = rows.shape[1]
    whole = torch.nn.functional.pad(rows, (0, -count % warp_rows))  # (rows beyond the end never jump)
    pairs = whole.reshape(whole.shape[0], -1, warp_rows // 16, 2, 8).any(dim=3).flatten(2)
    return pairs.all(dim=2).repeat_interleave(warp_rows, dim=1)[:, :count]


def _power(old: Tensor, new: Tensor) -> Tensor:
    """``2^(old − new)``, 0 where ``old`` is −inf: nothing was summed yet."""
    return _exp2(old - torch.where(new == -math.inf, 0.0, new))


def _exp2(x: Tensor) -> Tensor:
    """``2^x``, rounded once. (torch's float32 exp2 on a CPU differs by an ulp with a number's place in memory.)"""
    return torch.exp2(x.double()).float()


_MAGIC = 1.5 * 2**23
"""Added to integer scores, so that their sums' bits are floats; the FMA that scales them takes it away."""
_POWER_MAGIC = 1.5 * 2**13
"""From here on float32 counts 2⁻¹⁰."""
_POWER_BIAS = 15
"""FP16's exponent's."""
_LARGEST_FAST_FACTOR = 1 / 16
_SMALLEST_FACTOR = 2.0**-90
"""The kernel raises smaller ones to it, whose inverse it could not take."""
POLYNOMIAL = (7968.0, -0.233154296875, 0.94140625)
"""``2^f / (1 + f) ≈ (a · f · 2⁻¹⁴ + b)² + c``, FP16 numbers: the least error on average that has no bias."""


def _exponent(x: Tensor, s: Tensor, factor: Tensor, base: Tensor) -> Tensor:
    """``x + base`` as `polynomial_exp2` wants it, rounded as the kernel does: by one FMA of the scores ``s`` where
    their ``factor`` is small enough for what that loses (up to two of their units, never more than x + base and 2⁻¹¹).
    """
    s, factor = s * factor.sign(), factor.abs()  # (a negative sm_scale is in the kernel's Q)
    base = base.float()
    careful = (x + base) + (_POWER_BIAS + _POWER_MAGIC)
    small = factor.clamp(_SMALLEST_FACTOR, _LARGEST_FAST_FACTOR).double()
    fast = (base.double() + (_POWER_BIAS + _POWER_MAGIC)).float().double()
    fast = _difference_rounded_down(fast, _MAGIC * small).double()
    fast = ((s.double() + _MAGIC) * small + fast).float()
    return torch.where(x == -math.inf, -math.inf, torch.where(factor <= _LARGEST_FAST_FACTOR, fast, careful))


def _difference_rounded_down(a: Tensor, b: Tensor) -> Tensor:
    """The float32 number at or below ``a − b`` for float64 numbers, also where float64 itself loses ``b``'s digits."""
    difference = a - b
    part = difference - a
    lost = (a - (difference - part)) - (b + part)  # a − b = difference + lost, exactly
    nearest = difference.float()
    above = (nearest.double() > difference) | ((nearest.double() == difference) & (lost < 0))
    return torch.where(above, torch.nextafter(nearest, nearest.new_tensor(-math.inf)), nearest)


def polynomial_exp2(y: Tensor) -> Tensor:
    """``2^x`` as the FMA units approximate it in FP16, to 0.6 %, unbiased on average; 0 below ``x = −15``.

    (The kernel raises x to −14 instead, which E4M3 rounds to 0 as well.)

    Read as FP16, the bits of ``1024 · (x + 15)`` are ``2^n · (1 + f)`` for ``x = n + f``, and ``2^f / (1 + f)`` is
    nearly a parabola of ``f``.

    Args:
        y: float32 ``x + 15 + 1.5 · 2¹³``, for x < 16.

    >>> x = torch.tensor([-20.0, -1.0, 0.5, 3.0])
    >>> polynomial_exp2(x + 15 + 1.5 * 2**13)
    tensor([0.0000, 0.4978, 1.4121, 7.9648])
    """
    number = y.clamp(min=_POWER_MAGIC).sub(_POWER_MAGIC).mul(1024)
    bits = torch.where(number.isnan(), 0.0, number).to(torch.int16)
    value, fraction = bits.view(torch.float16), (bits & 0x3FF).view(torch.float16)
    scale, shift, rest = POLYNOMIAL
    f = (fraction.double() * scale + shift).half().double()
    power = (value.double() * (f * f + rest).half().double()).half().float()
    return torch.where(number.isnan(), number, power)

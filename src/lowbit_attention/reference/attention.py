"""Emulated attention: one recipe on one machine, tile by tile in the kernels' order, in O(N · tile) memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..call.masks import LOG2E, Masking, valid_keys
from ..recipes.definition import Recipe
from ..recipes.formats import FP32_MAX
from ..recipes.granularity import PerChannelAndKeyTile
from ..recipes.machine import DEFAULT_MACHINE, Machine, row_sum_column
from .arithmetic import product, without_autocast
from .quantize import Means, Packed, pack
from .softmax import OnlineSoftmax, by_parabola, row_sum_columns

_TILE_ELEMENTS = 1 << 20
_TILE_ELEMENTS_CUDA = 1 << 24
"""Logits held at once (4 MiB of float32; on a GPU, where every operation costs a launch, 64 MiB), if one head's
rows × b_k are not more."""


@dataclass(frozen=True)
class Result:
    """``out`` ``[B, Hq, Nq, Dv]`` and natural-log ``lse`` ``[B, Hq, Nq]``, float32; ``packed`` is what was summed."""

    out: Tensor
    lse: Tensor
    packed: Packed


def emulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recipe: Recipe,
    *,
    sm_scale: float,
    masking: Masking = Masking(),
    machine: Machine = DEFAULT_MACHINE,
    means: Means | None = None,
    key_splits: int = 1,
    rows: Tensor | None = None,
) -> Result:
    """Quantised attention as a kernel of ``machine``'s kind computes it.

    Args:
        q: ``[B, Hq, Nq, D]``; k: ``[B, Hkv, Nk, D]``; v: ``[B, Hkv, Nk, Dv]``; any floating dtype, Hq a multiple of
            Hkv. All arithmetic is float32, like a kernel's.
        means: a kernel's own means, to be used instead of the reference's.
        key_splits: in how many parts the key tiles are summed up by themselves, as a kernel does that shares a block of
            rows out between multiprocessors: part i begins with tile ``⌊tiles · i / key_splits⌋``.
        rows: the query rows to compute, int64 ``[R]`` (``None``: all): whole query tiles in their order, of which the
            last may be cut. Nq in the result is then R; the numbers are those of all rows (up to the order of float32
            sums): means and scales are still taken over all of Q, K and V.
    """
    recipe.check_geometry(machine.geometry)
    with without_autocast(q.device):
        return _emulate(q, k, v, recipe, sm_scale, masking, machine, means, key_splits, rows)


def _emulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recipe: Recipe,
    sm_scale: float,
    masking: Masking,
    machine: Machine,
    means: Means | None,
    key_splits: int,
    some: Tensor | None,
) -> Result:
    # contiguous: the order of a mean's additions, and so its last bit, must not depend on the caller's strides
    q, k, v = q.float().contiguous(), k.float().contiguous(), v.float().contiguous()
    packed = pack(q, k, v, recipe, machine.geometry, valid_keys(masking, q, k), means)
    if some is not None:
        q, packed, masking = q[:, :, some], packed.of_rows(some, machine.geometry), masking.of_rows(some)
    batch, heads, rows = q.shape[:3]
    out = q.new_zeros(batch * heads, rows, v.shape[3])
    lse = q.new_full((batch * heads, rows), -math.inf)
    if out.numel() or lse.numel():
        elements = _TILE_ELEMENTS_CUDA if q.is_cuda else _TILE_ELEMENTS
        at_once = max(1, elements // (rows * machine.geometry.b_k))
        for first in range(0, batch * heads, at_once):
            part = slice(first, min(first + at_once, batch * heads))
            out[part], lse[part] = _slices(packed, recipe, sm_scale, masking, machine, part, key_splits)
    out, lse = out.reshape(batch, heads, rows, v.shape[3]), lse.reshape(batch, heads, rows)
    group = heads // max(1, k.shape[1])
    if packed.v_mean is not None:
        seen = (lse != -math.inf)[..., None]
        out = torch.where(seen, out + packed.v_mean.repeat_interleave(group, dim=1)[:, :, None], out)
    if packed.k_mean is not None:
        k_mean = packed.k_mean.repeat_interleave(group, dim=1).flatten(0, 1)[..., None]
        lse = lse + (torch.bmm(q.flatten(0, 1).double(), k_mean.double()) * sm_scale).float().reshape(lse.shape)
    return Result(out.clamp(-FP32_MAX, FP32_MAX), lse, packed)


def _slices(
    packed: Packed,
    recipe: Recipe,
    sm_scale: float,
    masking: Masking,
    machine: Machine,
    part: slice,
    key_splits: int,
) -> tuple[Tensor, Tensor]:
    """Output (v̄ not yet added) and log-sum-exp (k̄'s term not yet added) of some of the B · Hq slices."""
    geometry = machine.geometry
    q_heads, kv_heads = packed.q.shape[1], packed.k.shape[1]
    index = torch.arange(part.start, part.stop, dtype=torch.int64, device=packed.q.device)
    b, h = index // q_heads, index % q_heads
    h_kv = h // (q_heads // kv_heads)

    q = packed.q[b, h]
    q_scale = packed.q_scale[b, h][:, packed.q_group] * (sm_scale * LOG2E)
    k, v = packed.k[b, h_kv], packed.v[b, h_kv]
    k_scale = packed.k_scale[b, h_kv][:, packed.k_group]
    tile_scale = packed.v_scale[b, h_kv]
    v_scale = tile_scale.amax(dim=1, keepdim=True)  # taken out of the sums, which so stay in range
    tile_scale = tile_scale / v_scale
    rows, keys = q.shape[1], k.shape[1]
    if recipe.row_sum == "accumulator":
        columns = row_sum_columns(recipe, machine)
        key = torch.arange(keys, dtype=torch.int64, device=v.device)
        column = key // geometry.b_k % columns if recipe.v_tile_means else row_sum_column(key, columns)
        ones = torch.nn.functional.one_hot(column, columns).to(v.dtype)
        v = torch.cat([v, ones.expand(v.shape[0], -1, -1)], dim=2)
        tile_scale = torch.cat([tile_scale, tile_scale.new_ones(*tile_scale.shape[:2], columns)], dim=2)
    tile_means = None if packed.v_tile_means is None else packed.v_tile_means[b, h_kv]
    scaled_by_tile = isinstance(recipe.v_granularity, PerChannelAndKeyTile)
    interval = recipe.promotion_keys(geometry)

    approximates = keys > 0 and by_parabola(recipe, machine, max(packed.q.shape[3], packed.v.shape[3]))
    if approximates:
        # (groups of zeros have the scale 1, which may be far larger than any other: their scores are 0 by any factor)
        of_numbers = torch.where(k.any(dim=-1), k_scale, 0.0).nan_to_num(nan=FP32_MAX)
        largest_factor = (q_scale.abs() * of_numbers.amax(dim=-1, keepdim=True)).clamp(max=FP32_MAX)

    def summed_up(part: range) -> OnlineSoftmax:
        softmax = OnlineSoftmax((len(index), rows, packed.v.shape[3]), recipe, machine, q.device)
        fresh, begins = True, [0]  # where the rows begin that see each key tile
        for number, key_tile in enumerate(part):
            start = key_tile * geometry.b_k
            seeing = slice(masking.first_row(start, geometry.b_q), rows)
            if seeing.start >= rows:
                break  # causality: no row sees this tile or a later one
            begins.append(seeing.start)
            tile = slice(start, min(start + geometry.b_k, keys))
            factor = (q_scale[:, seeing, None] * k_scale[:, None, tile]).clamp_(-FP32_MAX, FP32_MAX)
            # integers of 8 bits, whose sums stay below 2^24: exact whatever rounds float32 operands
            multiply = torch.bmm if recipe.quantises_qk else product
            products = multiply(q[:, seeing], k[:, tile].transpose(1, 2))
            scores = None
            if approximates:
                largest = largest_factor[:, seeing, None]
                scores = products.clone(), factor.clamp(-largest, largest)
            x = products.mul_(factor)
            if packed.q_mean is not None and packed.k_smooth is not None:
                mean = packed.q_mean[b, h] * (sm_scale * LOG2E)
                x += _delta_s(mean, packed.k_smooth[b, h_kv, tile], seeing, geometry.b_q)
            if recipe.quantises_qk:  # (non-finite Q or K are NaN here, and stay so)
                x = x.clamp_(-FP32_MAX, FP32_MAX)
            x = masking.hide(x, (b, h), seeing, tile)

            before = _means_by_column(tile_means, key_tile - 1, softmax.row_sum_columns)
            softmax.watch(seeing, x, number, fresh, before)
            p = softmax.choose_max(seeing, x, fresh, scores)
            step = geometry.b_k if interval is None else min(interval, geometry.b_k)
            for first in range(0, tile.stop - start, step):
                softmax.add(seeing, p[..., first : first + step], v[:, start + first : min(start + first + step, keys)])
                fresh = _interval_ends(recipe, interval, geometry.b_k, number)
                if fresh:
                    scale = tile_scale[:, key_tile, None] if scaled_by_tile else None
                    softmax.promote(seeing, scale, _means_by_column(tile_means, key_tile, softmax.row_sum_columns))
        if tile_means is not None:  # each row's columns hold the tiles up to the last that it sees
            for number, (first, end) in enumerate(pairwise([*begins, rows])):
                means = _means_by_column(tile_means, part.start + max(0, number - 1), softmax.row_sum_columns)
                softmax.promote(slice(first, end), None, means)
        elif not scaled_by_tile:  # (a scale per tile promotes at every tile)
            softmax.promote(slice(0, rows), None, None)
        return softmax

    tiles = -(-keys // geometry.b_k)
    softmax = summed_up(range(tiles // key_splits))
    for i in range(1, key_splits):
        softmax.merge(summed_up(range(tiles * i // key_splits, tiles * (i + 1) // key_splits)))
    out, m, row_sum = softmax.finish()
    return out * v_scale, m / LOG2E + row_sum.log()


def _means_by_column(tile_means: Tensor | None, last: int, columns: int) -> Tensor | None:
    """V's means of the latest key tile up to ``last`` whose row sum each column holds, ``[S, columns, Dv]``.

    Where that tile is not in the present interval (or is none), the column's sum is 0.
    """
    if tile_means is None or not tile_means.shape[1]:  # (without keys there are no tiles)
        return None
    column = torch.arange(columns, dtype=torch.int64, device=tile_means.device)
    return tile_means[:, (last - (last - column) % columns).clamp(min=0)]


def _interval_ends(recipe: Recipe, interval: int | None, b_k: int, tile: int) -> bool:
    """Whether the sums are promoted after key tile number ``tile`` (or after each part of it)."""
    if interval is None:
        return False
    tiles = max(1, interval // b_k)
    return tile % tiles == 0 if recipe.promote_first_tile else (tile + 1) % tiles == 0


def _delta_s(q_mean: Tensor, k_smooth: Tensor, rows: slice, tile: int) -> Tensor:
    """ΔS ``[S, rows, keys]``: each query tile's (scaled) mean times the unquantised smoothed K."""
    first = rows.start // tile  # `Masking.first_row` starts at a tile
    per_tile = product(q_mean[:, first:], k_smooth.transpose(1, 2))
    return per_tile.repeat_interleave(tile, dim=1)[:, : rows.stop - rows.start]

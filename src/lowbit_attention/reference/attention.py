"""Emulated attention: one recipe on one machine, tile by tile in the kernels' order, in O(N · tile) memory.

This file is the executable definition of the numerics: a function a step, in the papers' symbols and order. Query tile
i, key tile j; logits x and maxima m are in base 2:

    1 smooth      γ(Q) = Q − q̄_i, γ(K) = K − k̄, γ(V) = V − v̄     `pack`         SageAttention §4.2, SageAttention2 §3.1
    2 quantize    Q̂, K̂, V̂ and their scales δ_Q, δ_K, δ_V          `pack`         SageAttention2 §3.2, §3.3
      for each key tile j (`_sum_tiles`):
    3 multiply    Q̂ K̂ᵀ                                           `_multiply`
    4 dequantize  x = log2 e · (sm_scale · δ_Q δ_K · Q̂ K̂ᵀ + ΔS)   `_dequantize`  SageAttention2 §3.1
    5 softmax     m, then P̃ = P_r · 2^(x − m)                    `watch`, `choose_max`   SageAttention2 §3.3
    6 multiply    R += P̂ V̂, l += P̂ · 1, as the machine sums      `add`          SageAttention2++ §3
    7 promote     O = 2^(m_old − m_new) · O + R                  `_promote`     SageAttention2 §3.3
      after the last tile:
    8 epilogue    O / l · δ_V + v̄                                `_epilogue`, `_restore_means`
                  lse = m / log2 e + ln l + sm_scale · q k̄ᵀ

`pack` is quantize.py's; `choose_max`, `add` and what `_promote` calls are `OnlineSoftmax`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..call.masks import LOG2E, Masking, lists_keys, seeing_rows, seen_keys
from ..recipes.definition import Recipe
from ..recipes.formats import FP32_MAX
from ..recipes.granularity import PerChannelAndKeyTile
from ..recipes.machine import DEFAULT_MACHINE, Machine, row_sum_column
from .arithmetic import product, without_autocast
from .quantize import Means, Packed, key_positions, pack
from .softmax import OnlineSoftmax, row_sum_columns, uses_polynomial

_TILE_ELEMENTS = 1 << 20
_TILE_ELEMENTS_CUDA = 1 << 24
"""Logits held at once (4 MiB of float32; on a GPU, where every operation costs a launch, 64 MiB), if one head's
rows × b_k are not more."""


@dataclass(frozen=True)
class Result:
    """``out`` ``[B, Hq, Nq, Dv]`` and natural-log ``lse`` ``[B, Hq, Nq]``, float32; ``packed`` is what was summed.

    (Where keys are left out head by head, that of the last.)
    """

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
    work_rows: int | None = None,
) -> Result:
    """Quantised attention as a kernel of ``machine``'s kind computes it.

    Args:
        q: ``[B, Hq, Nq, D]``; k: ``[B, Hkv, Nk, D]``; v: ``[B, Hkv, Nk, Dv]``; any floating dtype, Hq a multiple of
            Hkv. All arithmetic is float32, like a kernel's.
        means: a kernel's own means, to be used instead of the reference's.
        key_splits: in how many parts the key tiles are summed by themselves, as a kernel does whose work tiles are
            split along the keys (split-KV): part i begins with tile ``⌊tiles · i / key_splits⌋``.
        rows: the query rows to compute, int64 ``[R]`` (``None``: all): whole query tiles in their order, of which the
            last may be cut. Nq in the result is then R; the numbers are those of all rows (up to the order of float32
            sums): means and scales are still taken over all of Q, K and V.
        work_rows: the rows of a kernel's work tile, which leaves out key tiles that a mask hides from all of them:
            then what is promoted together are the tiles that are left (``None``: none is left out).

    Keys that no query sees do not count in means and scales. Where a bool mask hides them from all rows alike
    (`lists_keys`), attention is that of the keys which are left, one behind the other. Biases are FP16 numbers, less
    the largest of each row (`Masking.relative`).

    A query that is not finite is spoilt: NaN in ``out`` and ``lse`` (0 and −∞ if it sees no key). To the others it is
    as one that sees no key: it counts in no mean and no scale, and is quantised as zeros.
    """
    recipe.check_geometry(machine.geometry)
    with without_autocast(q.device):
        # contiguous: the order of a mean's additions, and so its last bit, must not depend on the caller's strides
        q, k, v = q.float().contiguous(), k.float().contiguous(), v.float().contiguous()
        mask, largest_bias = masking.mask, None
        if mask is None or 0 in (*q.shape[:3], *k.shape[:3], *mask.shape):
            work_rows = None
        elif mask.dtype != torch.bool:
            masking, largest_bias = masking.relative(q.shape[2], k.shape[2])
        elif lists_keys(mask.shape, q.shape[1], k.shape[1], masking.causal_offset is not None):
            return _of_listed_keys(
                q, k, v, mask, means or Means(), recipe=recipe, sm_scale=sm_scale, machine=machine,
                key_splits=key_splits, rows=rows,
            )  # fmt: skip
        seen, seeing = seen_keys(masking, q, k), seeing_rows(masking, q, k)
        spoilt = ~q.isfinite().all(dim=-1)
        if bool(spoilt.any()):
            seeing = ~spoilt if seeing is None else seeing & ~spoilt
        packed = pack(q, k, v, recipe, machine.geometry, seen, means, seeing)
        if rows is not None:
            q, packed, masking = q[:, :, rows], packed.of_rows(rows, machine.geometry), masking.of_rows(rows)
            spoilt = spoilt[:, :, rows]
        if work_rows is None:
            out, lse = _attend(packed, recipe, sm_scale, masking, machine, key_splits)
        else:
            out, lse = _attend_by_work_tiles(packed, recipe, sm_scale, masking, machine, key_splits, work_rows)
        result = _restore_means(q, packed, sm_scale, out, lse)
        result = _spoil(result, spoilt & (lse != -math.inf))
        if largest_bias is None:
            return result
        largest_bias = largest_bias if rows is None else largest_bias[:, :, rows]
        return replace(result, lse=torch.where(lse == -math.inf, lse, result.lse + largest_bias))


def _spoil(result: Result, rows: Tensor) -> Result:
    """NaN in these rows, bool ``[B, Hq, Nq]``."""
    out, lse = result.out.masked_fill(rows[..., None], torch.nan), result.lse.masked_fill(rows, torch.nan)
    return replace(result, out=out, lse=lse)


def _of_listed_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, means: Means, **options: Any) -> Result:
    """Attention of the keys that a mask ``[B or 1, H or 1, 1, Nk]`` leaves, list by list."""
    q_heads, kv_heads, keys = q.shape[1], k.shape[1], k.shape[2]
    every = slice(None)
    batches = [every] if mask.shape[0] == 1 else [slice(b, b + 1) for b in range(q.shape[0])]
    heads = [every] if mask.shape[1] == 1 else [slice(h, h + 1) for h in range(kv_heads)]
    found = []
    for b in batches:
        of_heads = []
        for h in heads:
            listed = mask[b, h][0, 0, 0].expand(keys).nonzero()[:, 0]
            of = Means(**{name: None if t is None else t[b, h] for name, t in vars(means).items()})
            of_heads.append(emulate(q[b, h], k[b, h][:, :, listed], v[b, h][:, :, listed], means=of, **options))
        found.append(of_heads)
    out = torch.cat([torch.cat([r.out for r in row], dim=1) for row in found])
    lse = torch.cat([torch.cat([r.lse for r in row], dim=1) for row in found])
    assert out.shape[1] == q_heads
    return Result(out, lse, found[-1][-1].packed)


def _attend_by_work_tiles(
    packed: Packed, recipe: Recipe, sm_scale: float, masking: Masking, machine: Machine, key_splits: int, rows: int
) -> tuple[Tensor, Tensor]:
    """`_attend`, each block of ``rows`` query rows with those key tiles that some of them see, as if they were all."""
    mask = masking.mask
    assert mask is not None
    batch, heads, length = packed.q.shape[:3]
    keys, tile = packed.k.shape[2], machine.geometry.b_k
    group = heads // packed.k.shape[1]
    out = packed.q.new_zeros(batch, heads, length, packed.v.shape[3])
    lse = packed.q.new_full((batch, heads, length), -math.inf)
    every = slice(None)
    for b in [every] if mask.shape[0] == 1 else [slice(i, i + 1) for i in range(batch)]:
        for h in [every] if mask.shape[1] == 1 else [slice(i, i + 1) for i in range(heads)]:
            of_kv = h if h == every else slice(h.start // group, h.start // group + 1)
            for first in range(0, length, rows):
                some = torch.arange(first, min(first + rows, length), dtype=torch.int64, device=mask.device)
                visible = masking.of_rows(some).written_out(len(some), keys)[b, h][:1, :1]
                sees = visible if visible.dtype == torch.bool else visible > -math.inf
                tiles = torch.nn.functional.pad(sees.any(dim=2)[0, 0], (0, -keys % tile)).view(-1, tile).any(dim=1)
                visited = tiles.nonzero()[:, 0]
                if not len(visited):
                    continue
                of = packed.of_heads(b, h, of_kv).of_rows(some, machine.geometry).of_tiles(visited, tile)
                left = visible[..., key_positions(visited, tile, keys)]
                out[b, h, some], lse[b, h, some] = _attend(
                    of, recipe, sm_scale, Masking(None, left), machine, key_splits
                )
    return out, lse


def _attend(
    packed: Packed, recipe: Recipe, sm_scale: float, masking: Masking, machine: Machine, key_splits: int
) -> tuple[Tensor, Tensor]:
    """Steps 3 to 8 for all B · Hq slices, as many at once as `_TILE_ELEMENTS` allows; v̄ and k̄ are still missing."""
    batch, heads, rows = packed.q.shape[:3]
    channels = packed.v.shape[3]
    out = packed.q.new_zeros(batch * heads, rows, channels)
    lse = packed.q.new_full((batch * heads, rows), -math.inf)
    if out.numel() or lse.numel():
        elements = _TILE_ELEMENTS_CUDA if out.is_cuda else _TILE_ELEMENTS
        at_once = max(1, elements // (rows * machine.geometry.b_k))
        for first in range(0, batch * heads, at_once):
            part = slice(first, min(first + at_once, batch * heads))
            slices = _slices(packed, part, recipe, sm_scale, masking, machine)
            out[part], lse[part] = _epilogue(slices, _sum_all_tiles(slices, key_splits))
    return out.reshape(batch, heads, rows, channels), lse.reshape(batch, heads, rows)


@dataclass(frozen=True)
class _Slices:
    """What S of the B · Hq slices (a query head of a batch each) multiply. R query rows, N keys, T key tiles.

    ``v`` and ``tile_scale`` have C columns: V's channels and, where the MMA sums P's rows, columns of ones.
    """

    recipe: Recipe
    machine: Machine
    masking: Masking
    heads: tuple[Tensor, Tensor]
    """Batch and query head of each slice, ``[S]``."""
    q: Tensor
    """Q̂ ``[S, R, D]``."""
    q_scale: Tensor
    """δ_Q · sm_scale · log2 e of each row, ``[S, R]``."""
    q_mean: Tensor | None
    """q̄ · sm_scale · log2 e, ``[S, query tiles, D]``."""
    k: Tensor
    """K̂ ``[S, N, D]``."""
    k_scale: Tensor
    """δ_K of each key, ``[S, N]``."""
    k_smooth: Tensor | None
    """γ(K), for ΔS, ``[S, N, D]``."""
    v: Tensor
    """V̂ ``[S, N, C]``."""
    v_scale: Tensor
    """δ_V, the largest of all tiles', ``[S, 1, Dv]``: taken out of the sums, which so stay in range."""
    tile_scale: Tensor
    """Each tile's δ_V over ``v_scale``, ``[S, T or 1, C]``."""
    v_tile_means: Tensor | None
    """V's means by key tile, ``[S, T, Dv]``."""
    largest_factor: Tensor | None
    """Where some exponentials are approximated: the largest δ_Q δ_K of each row, ``[S, R]``."""

    @property
    def scaled_by_tile(self) -> bool:
        """Whether V has scales by key tile, so that every tile is promoted by its own."""
        return isinstance(self.recipe.v_granularity, PerChannelAndKeyTile)


def _slices(
    packed: Packed, part: slice, recipe: Recipe, sm_scale: float, masking: Masking, machine: Machine
) -> _Slices:
    """Slices number ``part`` of Q, with the K and V that their heads share, and a scale for each row and key."""
    q_heads, kv_heads = packed.q.shape[1], packed.k.shape[1]
    index = torch.arange(part.start, part.stop, dtype=torch.int64, device=packed.q.device)
    b, h = index // q_heads, index % q_heads
    h_kv = h // (q_heads // kv_heads)
    unit = sm_scale * LOG2E

    q_scale = packed.q_scale[b, h][:, packed.q_group] * unit
    k, k_scale = packed.k[b, h_kv], packed.k_scale[b, h_kv][:, packed.k_group]
    by_tile = packed.v_scale[b, h_kv]
    v_scale = by_tile.amax(dim=1, keepdim=True)
    v, tile_scale = _with_ones(packed.v[b, h_kv], by_tile / v_scale, recipe, machine)
    approximates = k.shape[1] > 0 and uses_polynomial(recipe, machine, max(packed.q.shape[3], packed.v.shape[3]))
    smooth_q = packed.q_mean is not None and packed.k_smooth is not None
    return _Slices(
        recipe,
        machine,
        masking,
        heads=(b, h),
        q=packed.q[b, h],
        q_scale=q_scale,
        q_mean=packed.q_mean[b, h] * unit if packed.q_mean is not None and smooth_q else None,
        k=k,
        k_scale=k_scale,
        k_smooth=packed.k_smooth[b, h_kv] if packed.k_smooth is not None and smooth_q else None,
        v=v,
        v_scale=v_scale,
        tile_scale=tile_scale,
        v_tile_means=None if packed.v_tile_means is None else packed.v_tile_means[b, h_kv],
        largest_factor=_largest_factor(q_scale, k, k_scale) if approximates else None,
    )


def _with_ones(v: Tensor, tile_scale: Tensor, recipe: Recipe, machine: Machine) -> tuple[Tensor, Tensor]:
    """V̂ and its scales with the columns of ones by which an MMA sums P's rows, where the recipe wants that."""
    if recipe.row_sum != "accumulator":
        return v, tile_scale
    columns = row_sum_columns(recipe, machine)
    key = torch.arange(v.shape[1], dtype=torch.int64, device=v.device)
    column = key // machine.geometry.b_k % columns if recipe.v_tile_means else row_sum_column(key, columns)
    ones = torch.nn.functional.one_hot(column, columns).to(v.dtype)
    v = torch.cat([v, ones.expand(v.shape[0], -1, -1)], dim=2)
    return v, torch.cat([tile_scale, tile_scale.new_ones(*tile_scale.shape[:2], columns)], dim=2)


def _largest_factor(q_scale: Tensor, k: Tensor, k_scale: Tensor) -> Tensor:
    """The largest |δ_Q δ_K| that a row meets, but for groups of zeros.

    (Those have the scale 1, which may be far larger than any other: their scores are 0 by any factor.)
    """
    of_numbers = torch.where(k.any(dim=-1), k_scale, 0.0).nan_to_num(nan=FP32_MAX)
    return (q_scale.abs() * of_numbers.amax(dim=-1, keepdim=True)).clamp(max=FP32_MAX)


def _sum_all_tiles(of: _Slices, key_splits: int) -> OnlineSoftmax:
    """Steps 3 to 7 for all key tiles: one split after the other, each by itself, and merged in their order."""
    tiles = -(-of.k.shape[1] // of.machine.geometry.b_k)
    softmax = _sum_tiles(of, range(tiles // key_splits))
    for i in range(1, key_splits):
        softmax.merge(_sum_tiles(of, range(tiles * i // key_splits, tiles * (i + 1) // key_splits)))
    return softmax


def _sum_tiles(of: _Slices, tiles: range) -> OnlineSoftmax:
    """Steps 3 to 7 for some key tiles: the loop over the tiles, and when sums are promoted."""
    geometry, keys = of.machine.geometry, of.k.shape[1]
    slices, rows = of.q_scale.shape
    softmax = OnlineSoftmax((slices, rows, of.v_scale.shape[2]), of.recipe, of.machine, of.q.device)
    interval = of.recipe.promotion_keys(geometry)
    step = geometry.b_k if interval is None else min(interval, geometry.b_k)  # keys summed before a promotion may come
    fresh, begins = True, [0]  # where the rows begin that see each key tile
    for number, j in enumerate(tiles):
        tile = slice(j * geometry.b_k, min((j + 1) * geometry.b_k, keys))
        seeing = slice(of.masking.first_row(tile.start, geometry.b_q), rows)
        if seeing.start >= rows:
            break  # causality: no row sees this tile or a later one
        begins.append(seeing.start)
        integers, factor = _multiply(of, seeing, tile)
        scores = _scores(of, seeing, integers, factor)
        x = _dequantize(of, seeing, tile, integers, factor)
        softmax.watch(seeing, x, number, fresh, _means_by_column(of.v_tile_means, j - 1, softmax.row_sum_columns))
        p = softmax.choose_max(seeing, x, fresh, scores)
        fresh = _interval_ends(of.recipe, interval, geometry.b_k, number)
        for first in range(tile.start, tile.stop, step):
            some = slice(first, min(first + step, tile.stop))
            softmax.add(seeing, p[..., some.start - tile.start : some.stop - tile.start], of.v[:, some])
            if fresh:
                _promote(of, softmax, seeing, j)
    _promote_rest(of, softmax, tiles, begins)
    return softmax


def _multiply(of: _Slices, rows: slice, tile: slice) -> tuple[Tensor, Tensor]:
    """Step 3: ``Q̂ K̂ᵀ`` and the factors ``δ_Q δ_K · sm_scale · log2 e`` that make logits of it, ``[S, rows, keys]``.

    Integers of 8 bits, whose sums stay below 2²⁴: exact whatever rounds float32 operands.
    """
    multiply = torch.bmm if of.recipe.quantizes_qk else product
    factor = (of.q_scale[:, rows, None] * of.k_scale[:, None, tile]).clamp_(-FP32_MAX, FP32_MAX)
    return multiply(of.q[:, rows], of.k[:, tile].transpose(1, 2)), factor


def _scores(of: _Slices, rows: slice, integers: Tensor, factor: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the approximated exponentials are made of: the integers and their factors, before step 4."""
    if of.largest_factor is None:
        return None
    if of.masking.mask is not None and of.masking.mask.is_floating_point():
        return integers.clone(), torch.full_like(factor, FP32_MAX)  # (with biases kernels take the logits themselves)
    largest = of.largest_factor[:, rows, None]
    return integers.clone(), factor.clamp(-largest, largest)


def _dequantize(of: _Slices, rows: slice, tile: slice, integers: Tensor, factor: Tensor) -> Tensor:
    """Step 4: the logits x in base 2, ΔS added and hidden keys −∞, ``[S, rows, keys]``; overwrites ``integers``."""
    x = integers.mul_(factor)
    if of.q_mean is not None and of.k_smooth is not None:
        x += _delta_s(of.q_mean, of.k_smooth[:, tile], rows, of.machine.geometry.b_q)
    if of.recipe.quantizes_qk:  # (non-finite Q or K are NaN here, and stay so)
        x = x.clamp_(-FP32_MAX, FP32_MAX)
    return of.masking.hide(x, of.heads, rows, tile)


def _delta_s(q_mean: Tensor, k_smooth: Tensor, rows: slice, tile: int) -> Tensor:
    """ΔS ``[S, rows, keys]``: each query tile's (scaled) mean times the unquantised smoothed K."""
    first = rows.start // tile  # `Masking.first_row` starts at a tile
    per_tile = product(q_mean[:, first:], k_smooth.transpose(1, 2))
    return per_tile.repeat_interleave(tile, dim=1)[:, : rows.stop - rows.start]


def _interval_ends(recipe: Recipe, interval: int | None, b_k: int, tile: int) -> bool:
    """Whether the sums are promoted after key tile number ``tile`` (or after each part of it)."""
    if interval is None:
        return False
    tiles = max(1, interval // b_k)
    return tile % tiles == 0 if recipe.promote_first_tile else (tile + 1) % tiles == 0


def _promote(of: _Slices, softmax: OnlineSoftmax, rows: slice, j: int) -> None:
    """Step 7 after key tile j: the partial sums times the tile's own scale, V's means by tile put back."""
    scale = of.tile_scale[:, j, None] if of.scaled_by_tile else None
    softmax.promote(rows, scale, _means_by_column(of.v_tile_means, j, softmax.row_sum_columns))


def _promote_rest(of: _Slices, softmax: OnlineSoftmax, tiles: range, begins: Sequence[int]) -> None:
    """Step 7 after the last tile: what no promotion has taken yet.

    With V's means by tile each row's columns of ones hold the tiles up to the last that it sees; ``begins`` says where
    the rows begin that see each tile (after a first 0). With scales by tile nothing is left: every tile was promoted.
    """
    rows = of.q_scale.shape[1]
    if of.v_tile_means is not None:
        for number, (first, end) in enumerate(pairwise([*begins, rows])):
            last = tiles.start + max(0, number - 1)
            softmax.promote(slice(first, end), None, _means_by_column(of.v_tile_means, last, softmax.row_sum_columns))
    elif not of.scaled_by_tile:
        softmax.promote(slice(0, rows))


def _means_by_column(tile_means: Tensor | None, last: int, columns: int) -> Tensor | None:
    """V's means of the latest key tile up to ``last`` whose row sum each column holds, ``[S, columns, Dv]``.

    Where that tile is not in the present interval (or is none), the column's sum is 0.
    """
    if tile_means is None or not tile_means.shape[1]:  # (without keys there are no tiles)
        return None
    column = torch.arange(columns, dtype=torch.int64, device=tile_means.device)
    return tile_means[:, (last - (last - column) % columns).clamp(min=0)]


def _epilogue(of: _Slices, softmax: OnlineSoftmax) -> tuple[Tensor, Tensor]:
    """Step 8 but for the means: ``O / l · δ_V`` ``[S, R, Dv]`` and ``ln l + m / log2 e`` ``[S, R]``."""
    out, m, row_sum = softmax.finish()
    return out * of.v_scale, m / LOG2E + row_sum.log()


def _restore_means(q: Tensor, packed: Packed, sm_scale: float, out: Tensor, lse: Tensor) -> Result:
    """Step 8's means: ``O + v̄``, because P's rows sum to 1, and ``lse + sm_scale · q k̄ᵀ``, with the original q.

    A row that saw no key stays 0.
    """
    group = packed.q.shape[1] // max(1, packed.k.shape[1])
    if packed.v_mean is not None:
        seen = (lse != -math.inf)[..., None]
        out = torch.where(seen, out + packed.v_mean.repeat_interleave(group, dim=1)[:, :, None], out)
    if packed.k_mean is not None:
        k_mean = packed.k_mean.repeat_interleave(group, dim=1).flatten(0, 1)[..., None]
        of_mean = (torch.bmm(q.flatten(0, 1).double(), k_mean.double()) * sm_scale).float().reshape(lse.shape)
        lse = torch.where(lse == -math.inf, lse, lse + of_mean)
    return Result(out.clamp(-FP32_MAX, FP32_MAX), lse, packed)

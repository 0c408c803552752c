"""The tile-by-tile quantised attention against a scalar oracle: one query row at a time, plain numpy loops.

The oracle takes the quantised operands and scales from `emulate(...).packed` (test_quantize.py proves those) and does
everything after them itself: logits with ΔS, causality, the maximum (running, tile's own, restarted), P rounded by
ml_dtypes and numpy, sums in the accumulator's steps, rescales, explicit promotions, row sum, output and lse. So what is
proved is *when* the maximum moves, *when* a sum is promoted and *where* it is rounded.

Integer logits are exact, so without ΔS both sides have the same P, bit for bit. Left are the orders in which float32
terms are added, u = 2⁻²⁴ each. With A = Σ|p·v| / l (what a channel's terms amount to; |out| ≤ A):

- at least 90 % of a case's elements differ by at most 32 u · A, u · A for each term of an MMA's 32 (most are equal, bit
  for bit). With ΔS, a float32 dot product, add what its error √D · u · Σ|q̄ · k| does to P and to the maximum.
- the others flipped a rounding: one unit of the accumulator (2⁻¹³ A for FP22, 2⁻¹⁰ A for FP16; four are allowed), or,
  with ΔS only, one unit of a rounded P: at most ⅛ A.

A rounding that is missed, done twice or done elsewhere moves most elements by a good part of 2⁻¹⁴ A or 2⁻¹¹ A. (The lse
counts as one more element of its row, with A = 1: an error of the row sum's is as large in its logarithm.)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from lowbit_attention.call.masks import Masking
from lowbit_attention.recipes.definition import Recipe
from lowbit_attention.recipes.granularity import PerChannelAndKeyTile
from lowbit_attention.recipes.machine import EXACT_SUMS, MACHINES, SM90_MMA, AccumulatorModel, Machine
from lowbit_attention.recipes.named import RECIPES
from lowbit_attention.recipes.options import RestartedMax, RunningMax, TileMax
from lowbit_attention.reference.attention import Result, emulate
from lowbit_attention.reference.exact import exact
from lowbit_attention.reference.softmax import polynomial_exp2, uses_polynomial

f16, f32, f64 = np.float16, np.float32, np.float64
U = 2.0**-24
HEAD_DIM, CHANNELS, SM_SCALE = 32, 12, 0.3
ADA, HOPPER = MACHINES["sm_89"], MACHINES["sm_90a"]  # 128 × 64 × 32 and 64 × 128 × 16; both truncate FP8 sums
INF = f32(np.inf)


def round_p(p: np.ndarray, pv_format: str) -> np.ndarray:
    if pv_format in ("int8", "u8"):
        return np.rint(p)
    types = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "fp16": f16, "fp32": f32}
    return p.astype(types[pv_format]).astype(f32)


def power(old: f32, new: f32) -> f32:
    """2^(old − new); an empty sum (−inf) has the factor 0."""
    return f32(0) if old == -INF else f32(np.exp2(f64(f32(old - new))))


def polynomial(s: f32, factor: f32, base: f32) -> f32:
    """2^(s · factor + base) as the kernel approximates it: FP16 arithmetic on the bits of a fixed-point exponent."""
    if factor <= 1 / 16:
        exact = f64(f32(f32(base) + f32(15 + 12288))) - 12582912 * f64(factor)
        offset = f32(exact) if f32(exact) <= exact else np.nextafter(f32(exact), -INF)
        y = f32((f64(s) + 12582912) * f64(factor) + f64(offset))
    else:
        y = f32(f32(f32(s * factor) + base) + f32(15 + 12288))
    bits = max(int(y.view(np.int32)), 0x46400000) & 0xFFFF
    whole, f = (np.uint16(b).view(f16) for b in (bits, bits & 0x3FF))
    scaled = f16(f64(f) * 7968 + f64(f16(-0.2332)))
    return f32(f16(f64(whole) * f64(f16(f64(scaled) ** 2 + f64(f16(0.9414))))))


def add(total: np.ndarray, p: np.ndarray, v: np.ndarray, kind: str, model: AccumulatorModel) -> np.ndarray:
    """The accumulator after ``p @ v``, MMA by MMA."""
    p, v = p.astype(f64), v.astype(f64)
    if model.lossless:
        return total + p @ v
    depth = {"fp16": 16, "fp8_f16": 32, "fp8_f32": 32}.get(kind, len(p))
    for at in range(0, len(p), depth):
        keys = np.arange(at, min(at + depth, len(p)))
        if kind == "fp8_f16" and model.fp8_by_fp16:  # two FP16 MMAs from zero, and an addition
            low, high = keys[(keys - at) % 4 < 2], keys[(keys - at) % 4 >= 2]
            half = (p[low] @ v[low]).astype(f32).astype(f16)
            half = (half + p[high] @ v[high]).astype(f32).astype(f16)
            total = (total + half.astype(f32)).astype(f16).astype(f32)
            continue
        total = (total + p[keys] @ v[keys]).astype(f32)
        if kind in ("fp16", "fp8_f16"):
            total = total.astype(f16).astype(f32)
        elif kind == "fp8_f32" and model.f32_fraction_bits is not None:
            mantissa, exponent = np.frexp(total)  # ½ ≤ |mantissa| < 1
            bits = model.f32_fraction_bits + 1
            total = np.ldexp(np.trunc(np.ldexp(mantissa, bits)), exponent - bits)
    return total


@dataclass
class Row:
    """``out`` before v̄, ``lse`` before k̄'s term, ``size``: A."""

    out: np.ndarray
    lse: float
    size: np.ndarray
    rescales: int = 0
    promotions: int = 0
    below: int = 0  # intervals that started below the maximum of the keys seen


def attend(
    x: np.ndarray,
    v: np.ndarray,
    v_scale: np.ndarray,
    r: Recipe,
    machine: Machine,
    units: np.ndarray | None = None,
    tile_means: np.ndarray | None = None,
    jumps: list[bool] | None = None,
) -> Row:
    """One query row: base-2 logits ``x`` (−inf: hidden), ``v`` ``[keys, channels]``, scales ``[tiles or 1, ·]``.

    ``units``: what the integer scores were multiplied with, where every fourth 16 keys' exponentials are approximated;
    ``tile_means``: what V lacks in each key tile, ``[tiles, channels]``; ``jumps``: the tiles that do.
    """
    b_k, model, kind = machine.geometry.b_k, machine.accumulators, r.accumulator
    per_tile = isinstance(r.v_granularity, PerChannelAndKeyTile)
    in_mma, f16_sums = r.row_sum == "accumulator", kind in ("fp16", "fp8_f16") and not model.lossless
    every: Any = {"tile": b_k, "never": math.inf}.get(r.keys_per_promotion, r.keys_per_promotion)
    columns = [(k % 32 // 16) * 4 + k % 8 // 2 if machine.row_sum_columns == 8 else 0 for k in range(len(x))]
    if tile_means is not None:
        columns = [k // b_k for k in range(len(x))]  # a column a tile: more than any interval has
    ones = np.eye(max(machine.row_sum_columns, *columns, 1) + 1, dtype=f32)[columns]  # a key counts in one column only
    channels, wide = v.shape[1], f64 if model.lossless else f32
    row = Row(np.zeros(channels, f32), -math.inf, np.zeros(channels))
    m_out, seen, m = -INF, -INF, -INF
    row_sum = np.zeros(ones.shape[1] if in_mma else 1, f32)
    sums: list[np.ndarray] = []  # the accumulator, the row sum and Σ|p·v|; empty: an interval starts

    def rescaled(total: np.ndarray, factor: f32, in_accumulator: bool) -> np.ndarray:
        total = total * factor
        return total.astype(f16).astype(f32) if in_accumulator and f16_sums else total

    def promote(tile: int) -> None:
        nonlocal row_sum, m_out
        m_new = max(m_out, m) if isinstance(r.softmax_max, TileMax) else m
        old, new = power(m_out, m_new), power(m, m_new)
        scale = v_scale[tile] if per_tile else np.ones(channels, f32)
        partial = sums[0].astype(f32) * scale
        if tile_means is not None:  # (those of tiles before this interval have the row sum 0)
            by_tile = sums[1][: len(tile_means)].astype(f64)
            partial = (partial + by_tile @ tile_means[: len(by_tile)]).astype(f32)
            sums[2] = sums[2] + by_tile @ np.abs(tile_means[: len(by_tile)])
        row.out = row.out * old + partial * new
        row_sum, m_out = row_sum * old + sums[1].astype(f32) * new, m_new
        row.size = row.size * f64(old) + sums[2] * scale * new
        row.promotions += 1
        sums.clear()

    for tile, start in enumerate(range(0, len(x), b_k)):
        stop = min(start + b_k, len(x))
        top = x[start:stop].max()
        seen = max(seen, top)
        if jumps is not None and sums and (jumps[tile] or (tile > 1 and jumps[tile - 1])):
            promote(-1)
        if isinstance(r.softmax_max, TileMax):
            m = top
        elif jumps is not None and isinstance(r.softmax_max, RestartedMax) and not sums:
            m = first_max(r, machine, top, seen, jumps[tile])
            row.below += bool(m < seen)
        elif not sums:
            m = max(top, f32(seen - f32(r.softmax_max.slack))) if isinstance(r.softmax_max, RestartedMax) else seen
            row.below += bool(m < seen)
        elif top > m:
            factor = power(m, top)
            sums = [rescaled(sums[0], factor, True), rescaled(sums[1], factor, in_mma), sums[2] * factor]
            row.rescales += 1
            m = top
        ends = every <= b_k
        if b_k < every < math.inf:
            ends = (tile if r.promote_first_tile else tile + 1) % (every // b_k) == 0
        part = int(min(every, b_k))
        for at in range(start, stop, part):
            sums = sums or [
                np.zeros(channels, wide),
                np.zeros_like(row_sum, wide if in_mma else f32),
                np.zeros(channels),
            ]
            keys = slice(at, min(at + part, stop))
            exponent = (x[keys] - m) + f32(math.log2(r.p_max)) if m > -INF else np.full_like(x[keys], -INF)
            p = np.exp2(exponent.astype(f64)).astype(f32)
            for k in range(keys.start, keys.stop) if units is not None else ():
                if k // 16 % 4 == 3 and x[k] > -INF:
                    base = f32(f32(math.log2(r.p_max)) - m)
                    p[k - keys.start] = polynomial(np.rint(x[k] / units[k]), units[k], base)
            p_hat = round_p(p, r.pv_format)
            sums[0] = add(sums[0], p_hat, v[keys], kind, model)
            if in_mma:
                sums[1] = add(sums[1], p_hat, ones[keys], kind, model)
            else:
                sums[1] = sums[1] + f32((p if r.row_sum == "unrounded" else p_hat).sum(dtype=f64))
            sums[2] = sums[2] + p_hat.astype(f64) @ np.abs(v[keys])
            if ends:
                promote(tile)
    if sums:
        promote(-1)
    total = row_sum.sum(dtype=f32)
    if total > 0:
        scale = np.ones(channels, f32) if per_tile else v_scale[0]
        row.out, row.size = row.out / total * scale, row.size / f64(total) * scale
        row.lse = math.log(2) * f64(m_out) + math.log(f64(total) / r.p_max)
    return row


def first_max(r: Recipe, machine: Machine, top: f32, seen: f32, jumps: bool) -> f32:
    """What an interval begins with, where tiles may jump."""
    kind, bits = r.softmax_max, r.jump_bits(machine.geometry)
    assert isinstance(kind, RestartedMax)
    assert bits is not None
    m = f32(top - f32(bits)) if jumps else seen if seen <= f32(top + f32(kind.headroom)) else top
    return max(m, f32(seen - f32(kind.slack)))


def jumping_tiles(warp: list[np.ndarray], r: Recipe, machine: Machine) -> list[bool]:
    """Which tiles jump for a warp's rows, of which the last ones may not exist."""
    b_k, keys, kind = machine.geometry.b_k, int(r.keys_per_promotion), r.softmax_max
    assert isinstance(kind, RestartedMax)
    assert kind.jump is not None
    m = level = seen = [-INF] * len(warp)
    found: list[bool] = []
    for tile, start in enumerate(range(0, len(warp[0]), b_k)):
        tops = [x[start : start + b_k].max() for x in warp]
        after_jump = tile > 1 and found[-1]
        rises = [top - old > kind.jump for top, old in zip(tops, level if after_jump else m, strict=True)]
        rises += [False] * (machine.geometry.warp_rows - len(rises))
        pairs = [i for i in range(len(rises)) if i % 16 < 8]
        found.append(tile == 0 or all(rises[i] or rises[i + 8] for i in pairs))
        begins = tile == 0 or found[tile] or after_jump or (tile - 1) % (keys // b_k) == 0
        seen = [max(s, top) for s, top in zip(seen, tops, strict=True)]
        level = m
        if begins:
            m = [first_max(r, machine, top, s, found[tile]) for top, s in zip(tops, seen, strict=True)]
        else:
            m = [max(old, top) for old, top in zip(m, tops, strict=True)]
    return found


def attend_in_parts(x: np.ndarray, v: np.ndarray, v_scale: np.ndarray, r: Recipe, machine: Machine, parts: int) -> Row:
    """`attend` over parts of the key tiles, each by itself, weighted with their shares of the mass."""
    b_k = machine.geometry.b_k
    tiles = -(-len(x) // b_k)
    cuts = [tiles * i // parts * b_k for i in range(parts)] + [len(x)]
    rows = [attend(x[a:b], v[a:b], v_scale, r, machine) for a, b in itertools.pairwise(cuts)]
    largest = max(row.lse for row in rows)
    mass = [math.exp(row.lse - largest) for row in rows]
    share = [m / sum(mass) for m in mass]
    return Row(
        out=sum(s * row.out.astype(f64) for s, row in zip(share, rows, strict=True)),
        lse=largest + math.log(sum(mass)),
        size=sum(s * row.size for s, row in zip(share, rows, strict=True)),
        promotions=sum(row.promotions for row in rows),
    )


def logits(
    packed: Any, b: int, h: int, i: int, machine: Machine, offset: int | None
) -> tuple[np.ndarray, float, np.ndarray]:
    """Base-2 logits of one row against the keys its query tile visits, a bound on the error ΔS brings to them, and what
    the integer scores were multiplied with."""
    b_q, b_k = machine.geometry.b_q, machine.geometry.b_k
    h_kv = h // (packed.q.shape[1] // packed.k.shape[1])
    keys, unit = packed.k.shape[2], f32(SM_SCALE * math.log2(math.e))
    if offset is not None:  # the tile of the last key that the last row of this query tile sees is the last one visited
        last_row = min((i // b_q + 1) * b_q, packed.q.shape[2]) - 1
        keys = min(keys, max(0, last_row + offset + b_k) // b_k * b_k)
    q, k = packed.q[b, h, i].numpy(), packed.k[b, h_kv, :keys].numpy()
    q_scale = packed.q_scale[b, h, packed.q_group[i]].numpy() * unit
    k_scale = packed.k_scale[b, h_kv].numpy()[packed.k_group[:keys].numpy()]
    x, error = (k.astype(f64) @ q).astype(f32) * (q_scale * k_scale), 0.0
    if packed.q_mean is not None:
        mean, k_smooth = packed.q_mean[b, h, i // b_q].numpy() * unit, packed.k_smooth[b, h_kv, :keys].numpy()
        x = x + (k_smooth.astype(f64) @ mean).astype(f32)
        error = math.sqrt(HEAD_DIM) * U * float((np.abs(k_smooth) @ np.abs(mean)).max(initial=0))
    if offset is not None:
        x = np.where(np.arange(keys) <= i + offset, x, -INF)
    return x, error, q_scale * k_scale


def compare(
    q: torch.Tensor, result: Result, r: Recipe, machine: Machine, offset: int | None, every: int, parts: int = 1
) -> list[Row]:
    """Every ``every``-th row and the last one; returns the oracle's rows."""
    packed, rows, near, unit = result.packed, [], [], {"fp8_f32": 2.0**-13, "fp8_f16": 2.0**-10, "fp16": 2.0**-10}
    flip = 0.0 if machine.accumulators.lossless else 4 * unit.get(r.accumulator, 0.0)
    heads = q.shape[1] // packed.k.shape[1]
    for b, h in np.ndindex(*q.shape[:2]):
        v, v_scale = packed.v[b, h // heads].numpy(), packed.v_scale[b, h // heads].numpy()
        for i in sorted({*range(h, q.shape[2], every), q.shape[2] - 1}):
            x, error, units = logits(packed, b, h, i, machine, offset)
            v_seen = v[: len(x)]
            if parts == 1:
                approximated = units if uses_polynomial(r, machine, HEAD_DIM) else None
                means = None if packed.v_tile_means is None else packed.v_tile_means[b, h // heads].numpy()
                jumps = None
                if r.jump_bits(machine.geometry) is not None:
                    size = machine.geometry.warp_rows
                    of_warp = range(i // size * size, min(i // size * size + size, q.shape[2]))
                    jumps = jumping_tiles([logits(packed, b, h, j, machine, offset)[0] for j in of_warp], r, machine)
                row = attend(x, v_seen, v_scale, r, machine, approximated, means, jumps)
            else:
                row = attend_in_parts(x, v_seen, v_scale, r, machine, parts)
            out, lse = result.out[b, h, i].numpy().astype(f64), float(result.lse[b, h, i])
            rows.append(row)
            if row.lse == -math.inf:
                assert lse == -math.inf
                np.testing.assert_array_equal(out, 0)
                continue
            shift = row.lse
            if packed.k_mean is not None:
                shift += SM_SCALE * float(q[b, h, i].double() @ packed.k_mean[b, h // heads].double())
            v_mean = 0 if packed.v_mean is None else packed.v_mean[b, h // heads].numpy().astype(f64)
            off = np.abs([*(out - (row.out + v_mean)), lse - shift])
            size = np.array([*row.size, 1.0])
            tight = (32 * U + 2 * math.log(2) * error) * size + 2 * U * np.abs([*out, abs(row.lse) + abs(shift)])
            near.append(off <= tight)
            loose = tight + (flip + (0.125 if error else 0)) * size
            assert (off <= loose).all(), f"row {i} of head {h} is off by {(off / size).max():.2g} A"
    share = np.mean(near) if near else 1.0
    assert share >= 0.9, f"only {share:.1%} of the elements are equal but for float32 additions"
    return rows


def inputs(family: str, n_q: int, n_k: int, heads: tuple[int, int], batch: int = 1) -> tuple[torch.Tensor, ...]:
    """``sink``: key 1 takes most of the mass and has V = 0; ``rising``: later keys have larger logits; ``far``: all."""
    rng = np.random.default_rng(7)
    q = rng.standard_normal((batch, heads[0], n_q, HEAD_DIM))
    k = rng.standard_normal((batch, heads[1], n_k, HEAD_DIM))
    v = 1 + rng.standard_normal((batch, heads[1], n_k, CHANNELS))
    q[..., 0] = 4 + 0.25 * q[..., 0]
    if family == "sink":
        k[:, :, 1:2, 0] += 10
        v[:, :, 1:2] = 0
    if family == "rising":
        k[..., 0] += np.linspace(-14, 14, n_k)
    several = [5, n_k // 2, n_k // 2 + 60, n_k - 2]  # two in neighbouring tiles
    sinks = {"sink_middle": [n_k // 2], "sink_last": [n_k - 1], "sinks": several}
    for key in sinks.get(family.removesuffix("_of_two_rows"), []):
        k[:, :, key, 0] += 10
        v[:, :, key] = 0
    if family.endswith("_of_two_rows"):  # of 16
        others = np.arange(n_q) % 16 % 11 != 2
        q[:, :, others, 0] -= 4
    if family == "far":
        k[..., 0] += 600
    return tuple(torch.from_numpy(t.astype(f32)) for t in (q, k, v))


def check(r: Recipe, machine: Machine, family: str, n_q: int = 90, n_k: int = 0, **options: Any) -> list[Row]:
    """Emulate and compare; 90 queries and 5.8 (Ada) or 3.8 (Hopper) tiles of keys unless given."""
    n_k = n_k or (370 if machine.geometry.b_k == 64 else 490)
    q, k, v = inputs(family, n_q, n_k, options.get("heads", (2, 1)), options.get("batch", 1))
    offset = n_k - n_q if options.get("causal") else None
    parts = options.get("parts", 1)
    result = emulate(q, k, v, r, sm_scale=SM_SCALE, masking=Masking(offset), machine=machine, key_splits=parts)
    return compare(q, result, r, machine, offset, options.get("every", 9), parts)


F16_28 = {"p_max": 28.0, "v_max": 4.5, "accumulator": "fp8_f16"}  # FP16 sums over up to 512 keys
FP22 = {"accumulator": "fp8_f32"}
TRUE_FP32 = {"accumulator": "fp32"}
HALF = {"pv_format": "fp16", "p_max": 1.0, "v_max": 128.0, "v_scale_power_of_two": True, "accumulator": "fp16"}
INT8 = {"pv_format": "int8", "p_max": 127.0, "v_max": 127.0, "accumulator": "int32"}
U8 = INT8 | {"pv_format": "u8", "p_max": 255.0}
UNROUNDED = {"pv_format": "fp32", "p_max": 1.0, "v_max": 1.0, "accumulator": "fp32"}
BY_TILE = {"v_granularity": PerChannelAndKeyTile()}
E5M2 = FP22 | {"pv_format": "e5m2"}
MAXIMA = [RunningMax(), RestartedMax(20.0), RestartedMax(2.5)]
machines = pytest.mark.parametrize("machine", [ADA, HOPPER], ids=["128x64", "64x128"])


@machines
@pytest.mark.parametrize("options", [F16_28, FP22], ids=["fp8_f16", "fp8_f32"])
@pytest.mark.parametrize("maximum", MAXIMA, ids=str)
@pytest.mark.parametrize("family", ["normal", "sink", "rising"])
@pytest.mark.parametrize(("tiles", "first"), [(0, False), (1, False), (2, False), (2, True), (3, False), (3, True)])
def test_promotions(tiles: int, first: bool, family: str, maximum: Any, options: dict, machine: Machine) -> None:
    """Intervals of 32 keys (half or a quarter of a tile) or of 1, 2 and 3 tiles; the first tile alone or not."""
    keys = tiles * machine.geometry.b_k or 32
    r = Recipe(**options, keys_per_promotion=keys, promote_first_tile=first, softmax_max=maximum, row_sum="rounded")
    rows = check(r, machine, family)
    visited = 6 if machine is ADA else 4
    intervals = rows[0].promotions if tiles else visited
    if family == "rising":  # the maximum moves in nearly every tile
        assert np.mean([row.rescales for row in rows]) >= 0.9 * (visited - intervals)
    if family == "sink" and isinstance(maximum, RestartedMax):  # every interval but the sink's starts below the sink
        assert np.mean([row.below for row in rows]) >= 0.9 * (intervals - 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("maximum", MAXIMA, ids=str)
@pytest.mark.parametrize("family", ["normal", "sink", "rising", "far"])
def test_exponentials_by_polynomial(family: str, maximum: Any, causal: bool) -> None:
    """``far``: logits of thousands, whose factors are too large for the FMA that takes the magic number away."""
    options = F16_28 | {"smooth_q": False, "keys_per_promotion": 256, "row_sum": "accumulator"}
    r = Recipe(**options, softmax_max=maximum)
    assert uses_polynomial(r, HOPPER, HEAD_DIM)
    check(r, HOPPER, family, causal=causal)

    q, k, v = inputs("normal", 90, 490, (2, 1))
    exact = dataclasses.replace(HOPPER, polynomial_exp2=False)
    result = emulate(q, k, v, r, sm_scale=SM_SCALE, masking=Masking(None), machine=exact)
    with pytest.raises(AssertionError):  # the oracle sees it if they are not
        compare(q, result, r, HOPPER, None, 9)


def test_polynomial_approximates_powers() -> None:
    x = torch.arange(-14 * 1024, 4 * 1024) / 1024
    power = polynomial_exp2(x + 15 + 12288)
    error = (power / x.exp2() - 1).numpy()
    assert np.abs(error).max() <= 0.006
    assert abs(error.mean()) <= 1e-4  # so that P of these keys is not larger or smaller than the others'
    np.testing.assert_array_equal(power, [polynomial(f32(s), f32(2.0**-10), f32(0)) for s in (x * 1024).numpy()])
    ends = torch.tensor([-15.0, -100.0, -3e38, -math.inf, math.nan])
    np.testing.assert_array_equal(polynomial_exp2(ends + 15 + 12288), [0, 0, 0, 0, math.nan])


@machines
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("options", [F16_28, FP22, TRUE_FP32], ids=["fp8_f16", "fp8_f32", "fp32"])
@pytest.mark.parametrize("maximum", MAXIMA, ids=str)
@pytest.mark.parametrize("family", ["normal", "sink", "rising"])
def test_keys_in_parts(family: str, maximum: Any, options: dict, parts: int, machine: Machine) -> None:
    """Parts of the keys have their own maxima and intervals, which begin with each part."""
    keys = 2 * machine.geometry.b_k
    r = Recipe(**options, keys_per_promotion=keys, promote_first_tile=True, softmax_max=maximum, row_sum="rounded")
    rows = check(r, machine, family, parts=parts)
    tiles = 6 if machine is ADA else 4
    of_parts = [tiles * (i + 1) // parts - tiles * i // parts for i in range(parts)]
    assert rows[0].promotions == sum(1 + -(-(t - 1) // 2) for t in of_parts)


@machines
@pytest.mark.parametrize("family", ["normal", "rising"])
@pytest.mark.parametrize("row_sum", ["unrounded", "rounded"])
@pytest.mark.parametrize("options", [FP22, TRUE_FP32, UNROUNDED], ids=["fp8_f32", "fp32", "p_fp32"])
def test_never_promoted(options: dict, row_sum: str, family: str, machine: Machine) -> None:
    """A single level of sums, rescaled whenever the running maximum moves."""
    check(Recipe(**options, keys_per_promotion="never", row_sum=row_sum), machine, family)


@machines
@pytest.mark.parametrize("keys", ["tile", 256])
@pytest.mark.parametrize("row_sum", ["unrounded", "rounded", "accumulator"])
@pytest.mark.parametrize("options", [F16_28, FP22, HALF, E5M2], ids=["fp8_f16", "fp8_f32", "fp16", "e5m2"])
def test_row_sums(options: dict, row_sum: str, keys: Any, machine: Machine) -> None:
    check(Recipe(**options, row_sum=row_sum, keys_per_promotion=keys), machine, "rising")


@machines
@pytest.mark.parametrize("maximum", [TileMax(), *MAXIMA], ids=str)
def test_large_logits(maximum: Any, machine: Machine) -> None:
    """P is 2^((x − m) + log2 P_r): adding log2 P_r to an x or m of a thousand would lose its digits."""
    check(Recipe(**FP22, softmax_max=maximum, smooth_k=False), machine, "far")


@machines
@pytest.mark.parametrize("by_tile", [{}, BY_TILE], ids=["", "v_by_tile"])
@pytest.mark.parametrize("maximum", [TileMax(), *MAXIMA], ids=str)
@pytest.mark.parametrize("family", ["sink", "rising"])
@pytest.mark.parametrize(
    ("options", "row_sum"),
    [(U8, "rounded"), (U8, "unrounded"), (INT8, "rounded"), (FP22, "accumulator"), (HALF, "rounded")],
    ids=["u8", "u8-unrounded", "int8", "e4m3", "fp16"],
)
def test_promoted_every_tile(
    options: dict, row_sum: str, family: str, maximum: Any, by_tile: dict, machine: Machine
) -> None:
    """Integers, which promote every tile; every tile's own maximum; V scales of a channel and key tile."""
    check(Recipe(**options, **by_tile, row_sum=row_sum, softmax_max=maximum), machine, family)


@machines
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 70), (150, 150), (70, 333), (200, 90), (131, 1)])
@pytest.mark.parametrize(
    "r",
    [
        Recipe(**F16_28, softmax_max=RestartedMax(2.5), keys_per_promotion=256, promote_first_tile=True, smooth_v=True),
        Recipe(**U8, softmax_max=TileMax(), row_sum="rounded", **BY_TILE),
        Recipe(**FP22, keys_per_promotion="never", smooth_k=False),
    ],
    ids=["fp8_f16", "u8", "never"],
)
def test_lengths(r: Recipe, n_q: int, n_k: int, causal: bool, machine: Machine) -> None:
    """Lengths that are no multiples of tiles, two batches, 4 query heads on 2 key heads, rows that see no key."""
    check(r, machine, "sink", n_q, n_k, heads=(4, 2), batch=2, causal=causal, every=29)


@machines
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("options", [F16_28, FP22, U8], ids=["fp8_f16", "fp8_f32", "u8"])
def test_smooth_q(options: dict, bits: int, causal: bool, machine: Machine) -> None:
    """ΔS is added to the logits of every row of its query tile, before the maximum is taken."""
    r = Recipe(**options, qk_bits=bits, smooth_q=True, smooth_v=True, row_sum="rounded")
    check(r, machine, "rising", 150, causal=causal, heads=(4, 2))


@pytest.mark.parametrize("keys", [64, 256])
@pytest.mark.parametrize("accumulators", [SM90_MMA, EXACT_SUMS], ids=str)
@pytest.mark.parametrize("options", [F16_28, FP22, HALF], ids=["fp8_f16", "fp8_f32", "fp16"])
def test_other_accumulators(options: dict, accumulators: AccumulatorModel, keys: int) -> None:
    """FP8 by two FP16 MMAs, and sums that lose nothing (their rescales round nothing either)."""
    machine = dataclasses.replace(ADA, accumulators=accumulators)
    check(Recipe(**options, keys_per_promotion=keys, row_sum="accumulator"), machine, "rising")


@machines
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("keys", "first"), [(128, False), (256, True), (512, False)])
@pytest.mark.parametrize("family", ["normal", "sink", "rising"])
def test_means_by_tile_are_put_back(family: str, keys: int, first: bool, parts: int, machine: Machine) -> None:
    """By the row sums of their tiles over the rounded P, at each promotion, whatever rescaled them before."""
    options = {**F16_28, "p_max": 28.0, "softmax_max": RestartedMax(2.5), "row_sum": "accumulator"}
    r = Recipe(**options, keys_per_promotion=keys, promote_first_tile=first, v_tile_means=True)
    n_k = 370 if machine.geometry.b_k == 64 else 490
    q, k, v = inputs(family, 90, n_k, (2, 1))
    v = v + torch.linspace(-4, 4, n_k)[:, None] * torch.linspace(-1, 1, CHANNELS)
    exact = dataclasses.replace(machine, accumulators=EXACT_SUMS, polynomial_exp2=False)
    result = emulate(q, k, v, r, sm_scale=SM_SCALE, machine=exact, key_splits=parts)
    means = result.packed.v_tile_means
    assert means is not None
    assert (means != 0).float().mean() > (0.3 if family == "sink" else 0.5)
    if parts == 1:
        compare(q, emulate(q, k, v, r, sm_scale=SM_SCALE, machine=machine), r, machine, None, 9)
    # nothing is lost by exact sums: what comes out is what V with its means would have given
    whole = result.packed.v + means.repeat_interleave(machine.geometry.b_k, dim=2)[:, :, :n_k]
    assert (whole - v / result.packed.v_scale).abs().max() <= 4.5 * 2.0**-4
    for i in range(0, 90, 9):
        x, _, _ = logits(result.packed, 0, 1, i, exact, None)
        scale = result.packed.v_scale[0, 0].numpy()
        row = attend_in_parts(x, whole[0, 0].numpy(), scale, r.replace(v_tile_means=False), exact, parts)
        np.testing.assert_allclose(result.out[0, 1, i], row.out, rtol=0, atol=64 * U * 4.5 * scale.max())


SINKS = ["sink", "sink_middle", "sink_last", "sinks"]


@machines
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tiles", "by_tile"), [(2, False), (4, False), (4, True)])
@pytest.mark.parametrize("family", ["normal", "rising", *SINKS, "sink_middle_of_two_rows"])
def test_tiles_that_jump(family: str, tiles: int, by_tile: bool, causal: bool, machine: Machine) -> None:
    """They have intervals of their own and more of P's range, first, inside or last, whatever is promoted anyway."""
    options = {**F16_28, "row_sum": "accumulator", "promote_first_tile": True, "v_tile_means": by_tile}
    maximum = RestartedMax(20.0, 4.0, 4.0)
    r = Recipe(**options, keys_per_promotion=tiles * machine.geometry.b_k, softmax_max=maximum)
    assert r.jump_bits(machine.geometry) == {2: 1, 4: 2}[tiles]
    length = 6 * machine.geometry.b_k - 20
    rows = check(r, machine, family, 90, length, causal=causal)
    if not causal and tiles == 4:  # tile 0, tiles 1 to 4 and tile 5, unless something jumps among the middle ones
        promotions = {round(float(np.median([row.promotions for row in rows])))}
        expected = {"sink_middle": {5}, "sinks": {6}, "sink_last": {3}, "sink": {3}, "normal": {3},
                    "sink_middle_of_two_rows": {3}}  # fmt: skip
        assert promotions <= expected.get(family, {3, 4, 5, 6})


def test_sinks_in_tiles_of_their_own_leave_the_others_their_digits() -> None:
    """A sink with V = 0 in the middle: the rest of its interval is as near to exact as without the sink."""
    q, k, v = inputs("sink_middle", 64, 1024, (2, 1))
    true = exact(q, k, v, sm_scale=SM_SCALE)[0]
    fast = RECIPES["fast_8b"]
    without = fast.replace(softmax_max=RestartedMax(20.0, 4.0))
    off = [
        float((emulate(q, k, v, r, sm_scale=SM_SCALE, machine=HOPPER).out - true).abs().mean()) for r in (fast, without)
    ]
    assert off[0] < 0.9 * off[1], off


@pytest.mark.parametrize(
    ("maximum", "keys"),
    [(m, k) for m in MAXIMA for k in (32, "tile", 128)] + [(RunningMax(), "never"), (TileMax(), "tile")],
    ids=str,
)
def test_the_oracle_is_softmax(maximum: Any, keys: Any) -> None:
    """Where nothing is rounded, the maximum and the promotions cancel: the oracle gives the textbook's softmax."""
    r = Recipe(**UNROUNDED, keys_per_promotion=keys, softmax_max=maximum)
    rng = np.random.default_rng(1)
    x, v = rng.normal(0, 6, 200).astype(f32), rng.standard_normal((200, CHANNELS)).astype(f32)
    x[150:] += np.linspace(0, 20, 50, dtype=f32)
    row = attend(x, v, np.full((1, CHANNELS), 0.5, f32), r, dataclasses.replace(ADA, accumulators=EXACT_SUMS))
    p = np.exp2(x.astype(f64))
    np.testing.assert_allclose(row.out, 0.5 * p @ v / p.sum(), rtol=1e-5, atol=1e-6)
    assert row.lse == pytest.approx(math.log(p.sum()), rel=1e-6)

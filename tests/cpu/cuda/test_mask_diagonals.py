"""Masks that are said in a few numbers, prepared without their tensor: csrc/mask/by_place.cuh, played.

What a kernel finds in the blocks of diagonals, at the places that the host's `MaskArgs` says, must be the mask written
out, bit for bit; and so must the lists of keys and key tiles, which come from formulas.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from c_structs import read

from lowbit_attention import ALiBi, KeyPadding, Window
from lowbit_attention.backends.cuda import mask as host
from lowbit_attention.call.mask_types import as_tensor, checked_mask
from lowbit_attention.call.masks import LOG2E, Masking
from lowbit_attention.call.request import make_request

PREPARE = " ".join(" ".join(read(f"mask/{file}", None) for file in ("rows.cuh", "by_place.cuh")).split())
MASKS = " ".join(read("common/masks.cuh", None).split())
ROWS = 64
"""kMaskRows."""
HIDING = np.float32(9000)
SHAPES = [(1, 1), (1, 300), (64, 64), (64, 128), (100, 130), (130, 100), (300, 300), (257, 640), (200, 64), (65, 1000)]
CAUSALITY = ["", "bottom_right", "top_left"]
KERNELS = [(64, 128), (64, 256), (128, 128), (128, 192), (128, 256)]
"""Keys of a tile, and rows of a work tile."""


def call(mask, q_len, kv_len, causality="", *, batch=1, heads=1, kv_heads=1):
    """The request of a call with this mask; the mask written out, with causality."""
    q = torch.empty(batch, heads, q_len, 8)
    k = torch.empty(batch, kv_heads, kv_len, 8)
    mask = checked_mask(mask, q, k)
    options = {"is_causal": bool(causality), "bottom_right": causality != "top_left", "return_lse": True}
    request = make_request(q, k, k, mask, None, None, **options)
    return request, Masking(request.causal_offset, as_tensor(mask, q, k))


@pytest.fixture
def plan_of(monkeypatch):
    monkeypatch.setattr(host, "_kernels", lambda *where: None)
    return lambda request, tile_keys, q_rows: host.MaskPlan.of(request, "sm_90a", tile_keys, q_rows)


def numbers(plan, q_len, plane=0):
    """The block of every row and key tile of a plane."""
    m = plan.mask
    row, tile = np.arange(q_len)[:, None], np.arange(plan.arguments.values.tiles)
    of_rows = (plane * m.row_blocks + row // ROWS) * m.row_step + plane * m.plane_step + m.first_block
    return of_rows + tile * m.tile_step + np.where(tile == m.last_tile, m.last_step, 0)


def packed(plan, tile_keys, slope=None):
    """What pack_diagonals writes for a plane, ``[blocks, 64, keys of a tile]``: what is seen, and biases in FP16."""
    args = plan.arguments.values
    block = np.arange(args.blocks)[:, None, None]
    row, key = np.arange(ROWS)[:, None], np.arange(tile_keys)
    is_last = block >= args.diagonals
    keys = np.where(is_last, args.kv_len - (args.tiles - 1) * tile_keys, tile_keys)
    diagonal = np.where(is_last, block - args.row_blocks, block) - (args.row_blocks - 1)
    apart = diagonal * ROWS + key - row
    seen = (apart >= args.first_offset) & (apart <= args.causal_offset) & (key < keys)
    if slope is None:
        return seen, None
    bias, largest = bias_at(slope, np.abs(args.shift - apart)), bias_at(slope, args.nearest)
    with np.errstate(invalid="ignore", over="ignore"):
        less = np.where(seen & ~hides_at(bias, largest), (bias - largest) * np.float32(LOG2E), -np.inf)
        return seen, less.astype(np.float32).astype(np.float16)


def bias_at(slope, distance):
    with np.errstate(over="ignore", invalid="ignore"):
        slope = np.float32(math.nan) if slope < 0 else np.float32(-slope)
        return slope * np.asarray(distance).astype(np.float32)


def hides_at(bias, largest):
    with np.errstate(invalid="ignore"):
        return (bias == -np.inf) | (bias - largest < -HIDING)


def reach(args, slope=None):
    low, high, largest = args.first_offset, args.causal_offset, np.float32(0)
    if slope is None:
        return low, high, largest
    largest = bias_at(slope, args.nearest)
    seen, hidden = -1, args.q_len + args.kv_len
    while hidden - seen > 1:
        middle = seen + (hidden - seen) // 2
        if hides_at(bias_at(slope, middle), largest):
            hidden = middle
        else:
            seen = middle
    return max(low, args.shift - seen), min(high, args.shift + seen), largest


def keys_of(reaches, first_row, last_row, end):
    """`Range`: the keys that rows see, first and last (one less than the first if none)."""
    low, high, _ = reaches
    first, last = max(first_row + low, 0), min(last_row + high, end - 1)
    return (first, first - 1) if low > high or last < first else (first, last)


def test_the_kernels_do_what_is_played_here():
    for text in (
        "const bool is_last = block >= args.diagonals;",
        "keys = is_last ? args.kv_len - (args.tiles - 1) * TILE_KEYS : TILE_KEYS;",
        "diagonal = (is_last ? block - args.row_blocks : block) - (args.row_blocks - 1);",
        "apart = diagonal * kMaskRows + mine.first_key - mine.row(first + i);",
        "range_of_sixteen(args.first_offset - apart, min(args.causal_offset - apart, i64(keys) - 1 - mine.first_key))",
        "plane = blockIdx.x / thread_blocks;",
        "block = blockIdx.x % thread_blocks * kPackWarps + threadIdx.x / 32;",
        "number = plane * args.blocks + block;",
        "distance = i32(args.shift - apart - k);",
        "while (hidden - seen > 1) {",
        "first(max(first_row + reach.low, i64(0))), last(min(last_row + reach.high, kv_len - 1))",
        "if (reach.is_empty() || last < first) last = first - 1;",
        "const Range keys(any, 0, args.q_len - 1, end);",
        f"kPlaceThreads = {host._PLACE_THREADS};",
    ):
        assert text in PREPARE, text
    assert "return i32(plane(batch, head)) * plane_step + first_block;" in MASKS
    for file, text in (
        (
            "hopper/mainloop.cuh",
            "shared.tile_block[q_ring.stage][tile % kTileSlots] + thread.group * args.mask.row_step;",
        ),
        (
            "hopper/producer.cuh",
            "of_rows = i32(mask_block(args, work)) * args.mask.row_step + args.mask.block_of_plane(",
        ),
        ("hopper/producer.cuh", "[tile % kTileSlots] = of_rows + args.mask.block_of_tile(of_keys);"),
    ):
        assert text in " ".join(read(file, None).split()), text
    assert "args.mask.row_block(work.batch, work.head, work.first_row + row(block, 0))) * args.mask.row_step;" in (
        " ".join(read("mma/mainloop.cuh", None).split())
    )
    assert "tile * tile_step + (tile == last_tile ? last_step : 0);" in MASKS
    assert "kHidingBias = 9000.0f" in PREPARE


WINDOWS = [(None, None), (0, 0), (5, 3), (100, None), (None, 7), (63, 64), (1000, 0), (200, 200), (None, 1 << 40)]


@pytest.mark.parametrize(("q_len", "kv_len"), SHAPES)
@pytest.mark.parametrize("causality", CAUSALITY)
def test_windows(plan_of, q_len, kv_len, causality):
    for window, (tile_keys, q_rows) in itertools.product(WINDOWS, KERNELS):
        request, masking = call(Window(*window), q_len, kv_len, causality)
        visible = masking.written_out(q_len, kv_len)[0, 0].expand(q_len, -1).numpy()
        plan = plan_of(request, tile_keys, q_rows)
        assert plan.by_place
        if plan.form == "keys":
            first, last = keys_of(reach(plan.arguments.values), 0, q_len - 1, kv_len)
            assert np.flatnonzero(visible.any(axis=0)).tolist() == list(range(first, last + 1))
            continue
        assert plan.form == "bits"
        seen, _ = packed(plan, tile_keys)
        at = numbers(plan, q_len)
        assert at.min() >= 0
        assert at.max() < plan.arguments.values.blocks
        found = seen[at, np.arange(q_len)[:, None] % ROWS].reshape(q_len, -1)
        assert np.array_equal(found[:, :kv_len], visible), (window, tile_keys)
        assert not found[:, kv_len:].any()
        check_lists(plan, [reach(plan.arguments.values)], visible[None], tile_keys, q_rows)


def check_lists(plan, reaches, visible, tile_keys, q_rows):
    """The formulas of list_by_place against what counts, ``[planes that share a list, Nq, Nk]``."""
    args = plan.arguments.values
    q_len, kv_len = visible.shape[1:]
    for mine, seen in zip(reaches, visible, strict=True):
        for i in range(q_len):
            first, last = keys_of(mine, i, i, kv_len)
            assert np.flatnonzero(seen[i]).tolist() == list(range(first, last + 1))
        for block in range(args.q_blocks):
            rows = range(block * q_rows, min((block + 1) * q_rows, q_len))
            first, last = keys_of(mine, rows[0], rows[-1], kv_len)
            tiles = np.unique(np.flatnonzero(seen[rows].any(axis=0)) // tile_keys).tolist()
            count = last // tile_keys + 1 - first // tile_keys if last >= first else 0
            assert tiles == [first // tile_keys + i for i in range(count)]
    widest = reaches[0]  # (list_by_place's loop over the planes of a list)
    for other in reaches[1:]:
        if (widest[0] > widest[1] or other[0] < widest[0] or other[1] > widest[1]) and other[0] <= other[1]:
            widest = other
    first, last = keys_of(widest, 0, q_len - 1, kv_len)
    assert np.flatnonzero(visible.any(axis=(0, 1))).tolist() == list(range(first, last + 1))


SLOPES = [0.0, 2.0**-8, 0.3, 1.0, 40.0, 777.7, 1e6, 3e38, math.inf, math.nan]


@pytest.mark.parametrize(("q_len", "kv_len"), SHAPES)
@pytest.mark.parametrize("causality", CAUSALITY)
def test_slopes(plan_of, q_len, kv_len, causality):
    """Also steep ones, whose far keys count for nothing, and those whose products no float holds."""
    heads, group = len(SLOPES), 2
    slopes = torch.tensor(SLOPES)
    request, masking = call(ALiBi(slopes), q_len, kv_len, causality, heads=heads, kv_heads=heads // group)
    if q_len > kv_len and causality != "bottom_right":
        assert not host.is_by_place(request)  # (rows before key 0: their largest bias is no matter of key − row)
        return
    assert host.is_by_place(request)
    relative, largest = masking.relative(q_len, kv_len)
    wanted = relative.mask[0].expand(-1, q_len, -1).numpy()
    largest = largest[0].numpy()
    for tile_keys, q_rows in KERNELS:
        plan = plan_of(request, tile_keys, q_rows)
        args = plan.arguments.values
        assert (plan.form, plan.planes, plan.lists) == ("bias", heads, heads // group)
        at, reaches = numbers(plan, q_len), [reach(args, slope) for slope in SLOPES]
        for head, slope in enumerate(SLOPES):
            _, biases = packed(plan, tile_keys, slope)
            assert np.array_equal(numbers(plan, q_len, head), at + head * args.blocks)
            found = biases[at, np.arange(q_len)[:, None] % ROWS].reshape(q_len, -1)
            assert (found[:, kv_len:] == -np.inf).all()
            sees = [keys_of(reaches[head], i, i, kv_len) for i in range(q_len)]
            for i, (first, last) in enumerate(sees):
                if last >= first:
                    assert np.array_equal(reaches[head][2], largest[head, i], equal_nan=True)
            if math.isfinite(slope):
                in_natural_units = found[:, :kv_len].astype(np.float32) / np.float32(LOG2E)
                assert np.array_equal(in_natural_units, wanted[head]), slope
        finite = [h for h, slope in enumerate(SLOPES) if math.isfinite(slope)]
        for one in range(0, len(finite) - 1, group):
            some = finite[one : one + group]
            check_lists(plan, [reaches[h] for h in some], wanted[some] > -np.inf, tile_keys, q_rows)


def test_a_slope_below_0_shows(plan_of):
    request, _ = call(ALiBi(torch.tensor([-1.0])), 100, 100)
    _, biases = packed(plan_of(request, 64, 128), 64, -1.0)
    assert np.isnan(biases).any()
    assert "slope < 0 ? __uint_as_float(0x7FFFFFFF) : -slope" in PREPARE


@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths(plan_of, is_causal):
    """They are read where no row differs from another; with causality they are written out."""
    request, _ = call(KeyPadding(torch.tensor([3, 70])), 50, 70, "bottom_right" if is_causal else "", batch=2)
    plan = plan_of(request, 64, 128)
    assert (plan.form, plan.by_place) == (("bits", False) if is_causal else ("keys", True))
    assert "const Range keys(any, 0, args.q_len - 1, end);" in PREPARE
    assert "end = max(min(length, end), i64(0));" in PREPARE


@pytest.mark.parametrize("tile_keys", [64, 128])
def test_memory_grows_with_the_length(plan_of, tile_keys):
    """By the lengths' sum, not by their product."""
    sizes = {}
    for length in (1 << 14, 1 << 15, 1 << 20):
        request, _ = call_without_tensor(Window(4096, 0), length)
        sizes[length] = plan_of(request, tile_keys, 128).size
    assert sizes[1 << 15] <= 2 * sizes[1 << 14] + 4096
    assert sizes[1 << 20] < 100 << 20
    request, _ = call_without_tensor(ALiBi(torch.ones(1)), 1 << 20)
    assert plan_of(request, tile_keys, 128).size < 1 << 30


def call_without_tensor(mask, length):
    q = torch.empty(1, 1, 1, 8).expand(1, 1, length, 8)
    mask = checked_mask(mask, q, q)
    return make_request(q, q, q, mask, None, None, is_causal=False, bottom_right=True, return_lse=False), mask

"""A mask's bits lie where the MMAs' scores are, and lists have the ranks they should: csrc/mask/mask.cu, played.

The device's own expressions are read from csrc and evaluated here. Which thread holds which score comes from the models
of test_layout.py (wgmma) and test_mma_layout.py (mma.sync), which are the PTX manual's.
"""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
from c_structs import read
from test_layout import LANE, WARP, accumulator_place
from test_mma_layout import QUAD, TURN, c_place

from lowbit_attention.backends.cuda import mask as host

PREPARE = " ".join(read("mask/mask.cu", None).split())
MASKS = " ".join(read("common/masks.cuh", None).split())


def expression(text, before, after=";"):
    """The C expression between two texts, as Python: alike but for the division."""
    assert text.count(before) == 1, before
    found = text.split(before)[1].split(after)[0]
    return compile(found.replace("/", "//").strip(), before, "eval")


def evaluate(code, **names):
    return eval(code, {"__builtins__": {}, "min": min, "max": max}, names)


LOW = expression(PREPARE, "const u32 low = ", ",")
HIGH = expression(PREPARE, "const u32 low = seen >> 2 * q & 3, high = ")
SHIFTED = expression(PREPARE, "words[q] = ")
PLACE = expression(PREPARE, "args.bits[", "] =")
SHIFT = expression(MASKS, "return !(bits[i / 2 % 2] >> (", ") & 1)")
ROWS = 64
"""kMaskRows."""


def packed_bits(visible, tile_keys):
    """What pack_bits writes for a plane ``[Nq, Nk]``, by address."""
    q_len, kv_len = visible.shape
    row_blocks, tiles, lanes = -(-q_len // ROWS), -(-kv_len // tile_keys), tile_keys // 16
    args = SimpleNamespace(tiles=tiles)
    padded = np.zeros((row_blocks * ROWS, tiles * tile_keys), dtype=np.int64)
    padded[:q_len, :kv_len] = visible
    out = np.full(row_blocks * tiles * ROWS * 4, -1, dtype=np.int64)
    for block, tile in itertools.product(range(row_blocks), range(tiles)):
        some = padded[block * ROWS : (block + 1) * ROWS, tile * tile_keys : (tile + 1) * tile_keys]
        of_lanes = (some.reshape(ROWS, lanes, 16) << np.arange(16)).sum(axis=2)
        for q in range(4):
            word = np.zeros(ROWS, dtype=np.int64)
            for lane in range(lanes):
                seen = of_lanes[:, lane]
                low, high = (evaluate(half, seen=seen, q=q) for half in (LOW, HIGH))
                word |= evaluate(SHIFTED, low=low, high=high, lane=lane)
            at = evaluate(PLACE, block=block, tile=tile, args=args, kMaskRows=ROWS, of_block=np.arange(ROWS), lane=q)
            assert (out[at] == -1).all()
            out[at] = word
    assert (out >= 0).all()
    assert out.max(initial=0) < 1 << tile_keys // 4  # (a word has as many bits)
    return out


def masks(q_len, kv_len, seed=0):
    r = np.random.default_rng(seed)
    yield r.random((q_len, kv_len)) < 0.5
    one = np.zeros((q_len, kv_len), dtype=bool)
    one[q_len - 1, kv_len - 1] = True
    yield one
    yield np.tril(np.ones((q_len, kv_len), dtype=bool), kv_len - q_len)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (64, 128), (100, 300), (129, 257)])
def test_wgmma_threads_find_their_scores_bits(q_len, kv_len):
    """`Consumer::bits_of` and `Visible::hides`: of every thread of a warpgroup, every score."""
    row, column = accumulator_place(128)
    i = np.arange(64)
    thread_row, lane_in_quad = 16 * WARP + LANE // 4, LANE % 4
    tiles = -(-kv_len // 128)
    for visible in masks(q_len, kv_len):
        bits = packed_bits(visible, 128)
        padded = np.zeros((-(-q_len // ROWS) * ROWS, tiles * 128), dtype=bool)
        padded[:q_len, :kv_len] = visible
        for block, tile in itertools.product(range(-(-q_len // ROWS)), range(tiles)):
            at = (block * tiles + tile) * (ROWS * 4) + thread_row * 4 + lane_in_quad
            words = np.concatenate((bits[at], bits[at + 8 * 4]), axis=1)  # [thread, half]
            hidden = (words[:, i // 2 % 2] >> evaluate(SHIFT, i=i) & 1) == 0
            assert np.array_equal(~hidden, padded[block * ROWS + row, tile * 128 + column])


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (64, 64), (100, 130), (257, 200)])
def test_mma_lanes_find_their_scores_bits(q_len, kv_len):
    """`Warp::visible`: rows 32 · warp + 16 · block + 8 · half + quad, and of an m16 block four registers eight keys."""
    in_row, in_column = c_place()
    tiles, i = -(-kv_len // 64), np.arange(32)
    for visible in masks(q_len, kv_len):
        bits = packed_bits(visible, 64)
        padded = np.zeros((-(-q_len // ROWS) * ROWS, tiles * 64), dtype=bool)
        padded[:q_len, :kv_len] = visible
        for first, tile in itertools.product(range(0, padded.shape[0], 16), range(tiles)):
            row = first + QUAD  # of half 0
            at = (row // ROWS * tiles + tile) * (ROWS * 4) + row % ROWS * 4 + TURN
            words = np.stack((bits[at], bits[at + 8 * 4]), axis=1)  # [lane, half]
            hidden = (words[:, i // 2 % 2] >> evaluate(SHIFT, i=i) & 1) == 0
            where = first + in_row[:, i % 4], tile * 64 + 8 * (i // 4) + in_column[:, i % 4]
            assert np.array_equal(~hidden, padded[where])


def test_the_kernels_read_bits_where_these_models_do():
    """The addresses above, in the kernels' own words."""
    wgmma, mma = (" ".join(read(f"{kernel}/mainloop.cuh", None).split()) for kernel in ("hopper", "mma"))
    assert "mask_block(tile) * (kMaskRows * 4) + thread.row(0) * 4 + thread.lane_in_quad" in wgmma
    assert "{{ld_global_nc_u32(from), ld_global_nc_u32(from + 8 * 4)}}" in wgmma
    assert "number * (kMaskRows * 4) + row(block, 0) % kMaskRows * 4 + lane_in_quad" in mma
    assert "{{args.mask.bits[word], args.mask.bits[word + 8 * 4]}}" in mma
    assert "bits[i / 2 % 2] >>" in MASKS
    assert f"kMaskRows = {ROWS};" in MASKS


# ---- where biases lie


@pytest.mark.parametrize("tile_keys", [64, 128])
def test_a_warps_biases_follow_each_other(tile_keys):
    """Every row and key of a block has a place of its own, that pack_biases writes and the kernels read."""
    word, run = tile_keys // 4, 4
    next_run, next_row = 32 * run, word // run * 32 * run
    for text in (
        "kBiasRun = 4, kNextRun = 32 * kBiasRun, kNextBiasRow = kWordKeys / kBiasRun * kNextRun;",
        "return row / 8 * kNextBiasRow + (row % 8 * 4 + lane_in_quad) * kBiasRun;",
    ):
        assert text in MASKS
    assert (
        PREPARE.count("bias_of_row(of_block, q) + lane * kNextRun;")
        == PREPARE.count("bias_of_row(row, q) + lane * kNextRun;")
        == 1
    )
    at = lambda row, quad_lane: row // 8 * next_row + (row % 8 * 4 + quad_lane) * run  # noqa: E731
    place = {}
    for row, sixteen, q, i in itertools.product(range(ROWS), range(tile_keys // 16), range(4), range(4)):
        key = 16 * sixteen + (2 * q + i if i < 2 else 8 + 2 * q + i - 2)  # (the order in which a lane writes its four)
        place[row, key] = at(row, q) + sixteen * next_run + i
    assert sorted(place.values()) == list(range(ROWS * tile_keys))

    wgmma, softmax, mma = (
        " ".join(read(file, None).split()) for file in ("hopper/mainloop.cuh", "common/softmax.cuh", "mma/mainloop.cuh")
    )
    assert "mask_block(tile) * (kMaskRows * kTileKeys) + bias_of_row(thread.row(0), thread.lane_in_quad)" in wgmma
    assert "visible.bias + half * kNextBiasRow + part * kNextRun" in softmax
    assert "scores[2 * kBiasRun * part + j / 2 * 4 + 2 * half + j % 2]" in softmax
    assert "visible.bias[i / 2 % 2 * kNextBiasRow + i / 8 * kNextRun + i / 4 % 2 * 2 + i % 2]" in mma
    for warp, quad, q, i in itertools.product(range(4), range(8), range(4), range(tile_keys // 2)):
        row, key = 16 * warp + quad, 8 * (i // 4) + 2 * q + i % 2
        half = i // 2 % 2  # of score number i, as the MMA gives it
        read_at = at(row, q) + half * next_row + i // 8 * next_run + i // 4 % 2 * 2 + i % 2
        assert read_at == place[row + 8 * half, key]


# ---- causality and the end: a range of sixteen keys

_, _, AFTER = PREPARE.partition("u32 range_of_sixteen(i64 low, i64 high) {")
NONE = compile(
    re.search(r"if \((.+?)\) return 0;", AFTER)[1].replace("||", " or "), "range_of_sixteen returns 0", "eval"
)
FROM, TO = (
    re.search(rf"{name} = 0xFFFFu (<<|>>) \((.+?) \? u32\((.+?)\) : 0u\)", AFTER).groups()
    for name in ("u32 from", ", to")
)


def range_of_sixteen(low, high):
    if evaluate(NONE, low=low, high=high):
        return 0

    def shift(parts):
        _, condition, by = parts
        return evaluate(by, low=low, high=high) if evaluate(condition, low=low, high=high) else 0

    assert (FROM[0], TO[0]) == ("<<", ">>")
    by = shift(FROM), shift(TO)
    assert all(0 <= n < 32 for n in by)  # (what a shift of 32 bits may be)
    return (0xFFFF << by[0] & 0xFFFFFFFF) & (0xFFFF >> by[1]) & 0xFFFF


def test_a_range_of_sixteen_keys():
    ends = [*range(-20, 37), -(1 << 40), 1 << 40]
    for low, high in itertools.product(ends, ends):
        assert range_of_sixteen(low, high) == sum(1 << k for k in range(16) if low <= k <= high), (low, high)


@pytest.mark.parametrize("causal_offset", [-70, -1, 0, 3, 200, 1000])
def test_ranges_are_causality_and_the_end(causal_offset):
    """As pack_bits calls it, for every row and sixteen keys."""
    q_len, kv_len = 90, 150
    first_offset = -q_len  # no window
    seen = np.zeros((q_len, -(-kv_len // 16) * 16), dtype=bool)
    for row, first_key in itertools.product(range(q_len), range(0, kv_len, 16)):
        high = min(row + causal_offset, kv_len - 1) - first_key
        word = range_of_sixteen(row + first_offset - first_key, high)
        seen[row, first_key : first_key + 16] = word >> np.arange(16) & 1
    key = np.arange(seen.shape[1])
    expected = (key <= np.arange(q_len)[:, None] + causal_offset) & (key < kv_len)
    assert np.array_equal(seen, expected)
    assert "min(row + args.causal_offset, i64(args.kv_len) - 1) - first_key" in PREPARE
    assert "range_of_sixteen(row + args.first_offset - first_key, high)" in PREPARE


# ---- lists

BITS_ALONE = PREPARE.split("__launch_bounds__(kBitsThreads) pack_biases(")[0]
WORD = expression(BITS_ALONE.replace("const u32 word = word_of_lanes", ""), "const u32 word = ", ";")
KEY_SEEN = expression(PREPARE, "sees = mask == nullptr ? ", " :")


@pytest.mark.parametrize("tile_keys", [128, 64])
def test_lists_read_the_keys_that_pack_bits_has_seen(tile_keys):
    """A bit a key: words of two lanes' sixteen keys, written by tile, read by key."""
    for seed, tiles in itertools.product(range(3), (1, 3)):
        seen = np.random.default_rng(seed).random(tiles * tile_keys) < 0.5
        of_keys = (seen.reshape(tiles, -1, 16) << np.arange(16)).sum(axis=2)  # [tile, lane]
        threads = SimpleNamespace(x=np.arange(tile_keys // 32))
        words = np.concatenate(
            [evaluate(WORD, of_keys=[lanes], turn=0, threadIdx=threads, kKeysALane=16) for lanes in of_keys]
        )
        found = evaluate(KEY_SEEN, seen=words, key=np.arange(tiles * tile_keys))
        assert np.array_equal(found, seen)


def popcount(x):
    return int(x).bit_count()


def listed(seen, threads):
    """What list_keys (1024 threads) or list_tiles (a warp) writes: every thread's rank by ballots, step by step."""
    keys, count = {}, 0
    for first in range(0, len(seen), threads):
        sees = np.zeros(threads, dtype=bool)
        sees[: len(seen) - first] = seen[first : first + threads]
        votes = [sum(1 << lane for lane in range(32) if warp[lane]) for warp in sees.reshape(-1, 32)]
        for thread in np.flatnonzero(sees):
            warp, lane = divmod(int(thread), 32)
            rank = count + sum(map(popcount, votes[:warp])) + popcount(votes[warp] & ((1 << lane) - 1))
            assert rank not in keys
            keys[rank] = first + int(thread)
        count += sum(map(popcount, votes))
    return count, [keys[rank] for rank in range(count)]


@pytest.mark.parametrize("threads", [32, host._LIST_THREADS])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 1023, 1024, 1025, 3000])
def test_lists_are_of_what_is_seen_in_order(threads, length):
    for share in (0.0, 0.03, 0.5, 1.0):
        seen = np.random.default_rng(length).random(length) < share
        count, keys = listed(seen, threads)
        assert count == seen.sum()
        assert keys == np.flatnonzero(seen).tolist()
    assert "rank += __popc(votes & ((1u << lane) - 1))" in PREPARE
    assert "if (w < warp) rank += count; before += count;" in PREPARE


def test_the_host_knows_the_devices_numbers():
    for text, number in (
        ("kListThreads = 1024", host._LIST_THREADS),
        ("kBitsThreads = 256", host._BITS_THREADS),
        ("kTilesABlock = 16", host._TILES_A_BLOCK),
    ):
        assert text in PREPARE
        assert text.endswith(str(number))
    assert f"kMaskRows = {host._ROWS};" in MASKS
    assert "__launch_bounds__(32) list_tiles" in PREPARE

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

PREPARE = " ".join(
    " ".join(read(f"mask/{file}", None) for file in ("rows.cuh", "tensor.cuh", "by_place.cuh", "mask.cu")).split()
)
MASKS = " ".join(read("common/masks.cuh", None).split())


def expression(text, before, after=";"):
    """The C expression between two texts, as Python: alike but for the division."""
    assert text.count(before) == 1, before
    found = text.split(before)[1].split(after)[0]
    return compile(found.replace("/", "//").strip(), before, "eval")


def evaluate(code, **names):
    return eval(code, {"__builtins__": {}, "min": min, "max": max}, names)


def function(name, *parameters):
    """A device function of words, as Python of arrays whose last axis is the lanes of a row.

    It may have assignments, ternaries that are all of an expression or of a pair of parentheses, and shuffles.
    """
    _, found, after = PREPARE.partition(f"u32 {name}(")
    assert found, name
    lines = []
    for step in after.partition("{ ")[2].partition(" }")[0].rstrip(";").split("; "):
        step = re.sub(r"^(const )?(u32|bool) ", "", step.strip()).replace("return ", "out = ")
        step = re.sub(r"__shfl_xor_sync\(0xFFFFFFFF, (\w+), (\d)\)", r"of_lane(\1, \2)", step)
        step = re.sub(r"= (\w+) \? (.+?) : (.+)$", r"= where(\1, \2, \3)", step)
        step = re.sub(r"\((\w+) \? (.+?) : (.+?)\)", r"where(\1, \2, \3)", step)
        lines += re.split(r", (?=\w+ = )", step)
    code = compile("\n".join(lines), name, "exec")

    def play(*values):
        names = dict(zip(parameters, values, strict=True))
        names |= {"where": np.where, "of_lane": lambda x, apart: x[..., np.arange(x.shape[-1]) ^ apart]}
        exec(code, {"__builtins__": {}}, names)
        assert names["out"].max(initial=0) < 1 << 32  # (nothing was shifted out that 32 bits would lose)
        return names["out"]

    return play


by_quad_lane = function("by_quad_lane", "seen")
exchange_nibbles = function("exchange_nibbles", "x", "lane")
join_halves = function("join_halves", "x", "lane")
SHIFT = expression(MASKS, "return !(bits[i / 2 % 2] >> (", ") & 1)")
ROWS = 64
"""kMaskRows."""


def packed_bits(visible, tile_keys):
    """What pack_bits writes for a plane ``[Nq, Nk]``, by address."""
    q_len, kv_len = visible.shape
    row_blocks, tiles, lanes = -(-q_len // ROWS), -(-kv_len // tile_keys), tile_keys // 16
    padded = np.zeros((row_blocks * ROWS, tiles * tile_keys), dtype=np.int64)
    padded[:q_len, :kv_len] = visible
    out = np.full(row_blocks * tiles * ROWS * 4, -1, dtype=np.int64)
    for block, tile in itertools.product(range(row_blocks), range(tiles)):
        some = padded[block * ROWS : (block + 1) * ROWS, tile * tile_keys : (tile + 1) * tile_keys]
        of_lanes = (some.reshape(ROWS, lanes, 16) << np.arange(16)).sum(axis=2)
        words = out[(block * tiles + tile) * (ROWS * 4) :]
        at_once, lane = 32 // lanes, np.arange(lanes)
        for first in range(0, ROWS, 2 * at_once):  # two steps of a warp
            rows = first + np.arange(at_once)[:, None]
            pair = by_quad_lane(of_lanes[rows, lane]) | by_quad_lane(of_lanes[rows + at_once, lane]) << 16
            x = exchange_nibbles(pair, lane)
            if tile_keys == 64:
                written = ((rows * 4 + lane, x & 0xFFFF), ((rows + at_once) * 4 + lane, x >> 16))
            else:
                written = (((rows + lane // 4 * at_once) * 4 + lane % 4, join_halves(x, lane)),)
            for at, word in written:
                assert (words[at] == -1).all()
                words[at] = word
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


def test_words_are_stored_as_they_are_played():
    for text in (
        "exchange_nibbles(by_quad_lane(seen) | by_quad_lane(seen_next) << 16, mine.lane)",
        "block[mine.row(step) * 4 + mine.lane] = MaskWord(x);",
        "block[mine.row(step + 1) * 4 + mine.lane] = MaskWord(x >> 16);",
        "block[mine.row(step + mine.lane / 4) * 4 + mine.lane % 4] = join_halves(x, mine.lane);",
        "return step * kRowsAtOnce + first_row;",
        "(rows.number * args.tiles + tile) * (kMaskRows * 4)",
    ):
        assert PREPARE.count(text) == 1


NONZERO = expression(PREPARE, "nonzero[i] = ")


def test_bytes_that_are_not_0_are_bits():
    r = np.random.default_rng(0)
    some = np.array([0, 0, 0, 1, 2, 127, 128, 255], dtype=np.uint8)[r.integers(0, 8, (5000, 16))]
    words = np.ascontiguousarray(some).view("<u4").astype(np.uint64)
    nonzero = [evaluate(NONZERO, bytes=SimpleNamespace(word=words.T), i=i) & 0xFFFFFFFF for i in range(4)]
    low, high = (
        evaluate(expression(PREPARE, before, ";"), nonzero=nonzero)
        for before in ("const u32 low = ", "const u32 high = ")
    )
    found = (low & 0xFF) | (high & 0xFF) << np.uint64(8)
    assert np.array_equal(found, ((some != 0).astype(np.uint64) << np.arange(16, dtype=np.uint64)).sum(axis=1))
    assert "return low | high << 8;" in PREPARE


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
    for text in (
        "for (int q = 0; q < 4; q += 2)",
        "block + bias_of_row(mine.row(step), q) + mine.lane * kNextRun;",
        "{ cvt_f16x2_f32(x[2 * q + 1], x[2 * q]), cvt_f16x2_f32(x[2 * q + 9], x[2 * q + 8]), "
        "cvt_f16x2_f32(x[2 * q + 3], x[2 * q + 2]), cvt_f16x2_f32(x[2 * q + 11], x[2 * q + 10])}",
    ):
        assert PREPARE.count(text) == 1
    at = lambda row, quad_lane: row // 8 * next_row + (row % 8 * 4 + quad_lane) * run  # noqa: E731
    place = {}
    order = [0, 1, 8, 9, 2, 3, 10, 11]  # of a lane's eight numbers at once, from 2 · q on
    for row, sixteen, q, i in itertools.product(range(ROWS), range(tile_keys // 16), (0, 2), range(8)):
        place[row, 16 * sixteen + 2 * q + order[i]] = at(row, q) + sixteen * next_run + i
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

KEY_SEEN = expression(PREPARE, "sees = mask == nullptr ? ", " :")


@pytest.mark.parametrize("tile_keys", [128, 64])
def test_lists_read_the_keys_that_pack_bits_has_seen(tile_keys):
    """A bit a key: words of two lanes' sixteen keys, written by tile, read by key."""
    assert "const u32 word = of_keys | __shfl_xor_sync(0xFFFFFFFF, of_keys, 1) << kKeysALane;" in PREPARE
    assert "args.key_seen + (rows.list * args.tiles + tile) * (TILE_KEYS / 32) + mine.lane / 2;" in PREPARE
    for seed, tiles in itertools.product(range(3), (1, 3)):
        seen = np.random.default_rng(seed).random(tiles * tile_keys) < 0.5
        of_lanes = (seen.reshape(tiles, -1, 2, 16) << np.arange(16)).sum(axis=3)  # [tile, word, even or odd lane]
        words = (of_lanes[..., 0] | of_lanes[..., 1] << 16).reshape(-1)
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
        ("kPackThreads = 256", host._PACK_THREADS),
        ("kTilesABlock = 16", host._TILES_A_BLOCK),
    ):
        assert text in PREPARE
        assert text.endswith(str(number))
    assert f"kMaskRows = {host._ROWS};" in MASKS
    assert "__launch_bounds__(32) list_tiles" in PREPARE

"""Packed tiles and registers lie where the tensor cores look for them, shown by models of the hardware's own order.

The models come from the PTX manual's pictures of wgmma: the swizzles of shared memory, and which thread holds what of
an accumulator and of an operand in registers. Nothing of `lowbit_attention.backends.cuda.layout` is used to build them.
"""

import re

import numpy as np
import pytest
import torch

from lowbit_attention import RECIPES
from lowbit_attention.backends.cuda.instances import CSRC, TILE_KEYS, wgmma_config
from lowbit_attention.backends.cuda.layout import TOKEN_ORDER, swizzled_offsets, unpack_keys, unpack_values
from lowbit_attention.recipes.granularity import PerThread
from lowbit_attention.recipes.machine import MACHINES, row_sum_column

# (rows, row bytes) of what wgmma reads: Q, K and Vᵀ for 128 and for 64 channels
TILES = [(64, 128), (128, 128), (64, 64), (128, 64)]

THREAD = np.arange(128)[:, None]  # of a warpgroup
WARP, LANE = THREAD // 32, THREAD % 32
Q = LANE % 4  # a thread's place in its quad


# ---- what the hardware does


def address_read(row, byte, row_bytes, step):
    """Where wgmma finds a byte of a K-major operand: start + 32 · step, 8-row groups 8 · row_bytes apart, XORed.

    The 128-byte swizzle XORs address bits 4–6 with bits 7–9, the 64-byte one bits 4–5 with bits 7–8.
    """
    address = 32 * step + row // 8 * (8 * row_bytes) + row % 8 * row_bytes + byte
    return address ^ ((address >> 7 & (7 if row_bytes == 128 else 3)) << 4)


def accumulator_place(columns):
    """Row and column of 32-bit register i of thread t in an m64nN accumulator, each ``[128, N / 2]``."""
    i = np.arange(columns // 2)
    return 16 * WARP + LANE // 4 + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * Q + (i & 1)


def half_accumulator_place(columns):
    """The same of FP16 number h of register j, rows ``[128, N / 4]`` and columns ``[128, N / 4, 2]``."""
    j = np.arange(columns // 4)
    row, column = 16 * WARP + LANE // 4 + 8 * (j & 1), 8 * (j >> 1) + 2 * Q
    return row, column[..., None] + np.arange(2)


def operand_place():
    """Row and depth of byte b of register r of an 8-bit m64k32 operand, ``[128, 4, 4]``."""
    r, b = np.arange(4)[:, None], np.arange(4)
    lane, warp, q = LANE[..., None], WARP[..., None], Q[..., None]
    row = 16 * warp + lane // 4 + 8 * (r & 1)
    depth = 16 * (r >> 1) + 4 * q + b
    return np.broadcast_to(row, depth.shape), depth


@pytest.mark.parametrize("columns", [64, 128])
def test_the_models_cover_every_element_once(columns):
    row, column = accumulator_place(columns)
    assert sorted(set((row * columns + column).ravel())) == list(range(64 * columns))
    row, column = half_accumulator_place(columns)
    assert sorted(set((row[..., None] * columns + column).ravel())) == list(range(64 * columns))
    row, depth = operand_place()
    assert sorted(set((row * 32 + depth).ravel())) == list(range(64 * 32))


# ---- shared memory


@pytest.mark.parametrize(("rows", "row_bytes"), TILES)
def test_wgmma_reads_the_element_that_was_written(rows, row_bytes):
    name = np.arange(rows * row_bytes).reshape(rows, row_bytes)  # of a row's byte
    memory = np.full(rows * row_bytes, -1)
    offsets = swizzled_offsets(rows, row_bytes).numpy()[..., None] + np.arange(16)
    memory[offsets.reshape(rows, row_bytes)] = name
    row, byte = np.arange(rows)[:, None], np.arange(32)
    for step in range(row_bytes // 32):
        read = memory[address_read(row, byte, row_bytes, step)]
        assert np.array_equal(read, name[:, 32 * step : 32 * step + 32]), step


@pytest.mark.parametrize(("rows", "row_bytes"), TILES)
def test_equal_chunks_of_eight_rows_lie_in_different_banks(rows, row_bytes):
    banks = swizzled_offsets(rows, row_bytes) % 128 // 16
    for first in range(0, rows, 8):
        assert all(len(set(column.tolist())) == 8 for column in banks[first : first + 8].T)


def test_the_device_code_has_the_same_token_order():
    text = (CSRC / "tile" / "swizzle.cuh").read_text()
    (order,) = re.findall(r"kTokenOrder\[16\] = \{([^}]*)\}", text)
    assert tuple(map(int, order.split(","))) == TOKEN_ORDER
    # from the fragments: position 4q + 2e + r of an operand's 16 depths is what a quad's thread q has as 8e + 2q + r
    assert [TOKEN_ORDER[4 * q + 2 * e + r] for q in range(4) for e in range(2) for r in range(2)] == [
        8 * e + 2 * q + r for q in range(4) for e in range(2) for r in range(2)
    ]


# ---- registers: from the scores to the output


def packed_probabilities(scores):
    """What softmax.cuh does with a thread's 8 scores of every 16 keys: registers P[2g + half], four bytes each."""
    groups = scores.shape[1] // 8
    p = np.empty((128, 2 * groups, 4), dtype=scores.dtype)
    for g in range(groups):
        for half in range(2):
            p[:, 2 * g + half] = scores[:, [8 * g + 2 * half + i for i in (0, 1, 4, 5)]]
    return p


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("sums", ["f32", "f16"])
@pytest.mark.parametrize("columns", [64, 128])
def test_registers_give_the_product_of_p_and_v(dim, sums, columns):
    """64 × 128 × D: the scores' registers as the next operand, V's tokens in `TOKEN_ORDER`, and the output's registers.

    ``columns``: keys whose scores one accumulator holds. Whole numbers, so every sum is exact.
    """
    generator = np.random.default_rng(dim)
    p, v = generator.integers(0, 449, (64, TILE_KEYS)), generator.integers(-448, 449, (TILE_KEYS, dim))
    v_rows = v.reshape(8, 16, dim)[:, list(TOKEN_ORDER)].reshape(TILE_KEYS, dim).T  # [channel, position]

    total = np.zeros((64, dim), dtype=p.dtype)
    for first in range(0, TILE_KEYS, columns):
        registers = packed_probabilities(p[:, first : first + columns][accumulator_place(columns)])
        for step in range(columns // 32):  # wgmmas, each of 32 positions
            a = np.full((64, 32), -1)
            a[operand_place()] = registers[:, 4 * step : 4 * step + 4]
            at = first + 32 * step
            total += a @ v_rows[:, at : at + 32].T
    assert np.array_equal(total, p @ v)

    # the kernel's sum_of: number i of a thread's sums; finish: sums 4i + 2 · half + c go to channel 8i + 2q + c
    if sums == "f32":
        mine = total[accumulator_place(dim)]
    else:
        row, column = half_accumulator_place(dim)
        pairs = total[row[..., None], column]
        i = np.arange(dim // 2)
        mine = pairs[:, i // 4 * 2 + i // 2 % 2, i % 2]
    out = np.zeros_like(total)
    for i in range(dim // 8):
        for half in range(2):
            for c in range(2):
                row, channel = (16 * WARP + LANE // 4 + 8 * half)[:, 0], (8 * i + 2 * Q + c)[:, 0]
                out[row, channel] = mine[:, 4 * i + 2 * half + c]
    assert np.array_equal(out, p @ v)


def test_the_rows_of_ones_share_the_keys_as_the_reference_does():
    """multiply.cuh writes them word by word, wgmma reads them as it reads V, and a thread adds up its two columns."""
    columns, words = 8, TILE_KEYS // 4
    memory = np.zeros(columns * TILE_KEYS, dtype=np.int64)
    offsets = swizzled_offsets(columns, TILE_KEYS).numpy()
    for row in range(columns):
        for word in range(words):
            at = offsets[row, word // 4] + word % 4 * 4
            memory[at : at + 4] = word % columns == row
    byte = np.arange(TILE_KEYS)
    read = np.stack([memory[address_read(row, byte % 32, TILE_KEYS, byte // 32)] for row in range(columns)])
    counted = np.empty((TILE_KEYS, columns), dtype=np.int64)  # [key, column]
    key = byte // 16 * 16 + np.array(TOKEN_ORDER)[byte % 16]
    counted[key] = read.T
    assert (counted.sum(axis=1) == 1).all()  # every key once
    assert np.array_equal(counted.argmax(axis=1), row_sum_column(torch.arange(TILE_KEYS), columns).numpy())

    p = np.random.default_rng(0).integers(0, 449, (64, TILE_KEYS))
    row, column = half_accumulator_place(columns)
    pairs = (p @ counted)[row[..., None], column]  # [thread, register, two columns]
    for half in range(2):
        mine = pairs[:, half].sum(axis=1)
        over_quad = mine.reshape(-1, 4).sum(axis=1)
        assert np.array_equal(over_quad, p.sum(axis=1)[(16 * WARP + LANE // 4 + 8 * half)[::4, 0]])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 8), (9, 13), (17, 17), (1000, 1007)])
def test_promotions_put_the_means_of_their_tiles_back(first, last, dim):
    """block.cuh, producer.cuh and `promoted`: the rows of ones that a tile's copy brings, the ring of means, and the
    MMA whose A are the accumulators of the last eight columns. Tiles ``first`` to ``last`` make the interval."""
    columns, slots, pitch = 8, 16, dim + 8
    config = wgmma_config(RECIPES["fast_8b"], dim, torch.float16).header()
    assert f"kMeanSlots = {slots};" in config
    assert f"kMeanPitch = {pitch};" in config
    generator = np.random.default_rng(dim + last)
    p = {tile: generator.integers(0, 15, (64, TILE_KEYS)) for tile in range(first, last + 1)}
    means = {tile: generator.integers(-4, 5, dim) for tile in range(max(0, last - 20), last + 5)}  # 4 stages ahead

    table = np.zeros((15, TILE_KEYS), dtype=np.int64)
    table[7] = 1
    counted = np.zeros((64, columns), dtype=np.int64)
    for tile, of_tile in p.items():
        ones = table[7 - tile % 8 :][:8].flatten()  # as it lies behind V
        byte = np.arange(TILE_KEYS)
        rows = np.stack([ones[address_read(row, byte % 32, TILE_KEYS, byte // 32)] for row in range(columns)])
        assert np.array_equal(rows.sum(axis=1), TILE_KEYS * (np.arange(8) == tile % 8))
        counted += of_tile @ rows.T

    memory = np.zeros(slots * pitch, dtype=np.int64)  # 16-bit numbers
    for tile in sorted(means):
        memory[tile % slots * pitch :][:dim] = means[tile]
    lane = np.arange(32)
    of_column = last - ((last - lane) & 7)
    address = of_column % slots * pitch
    assert len({2 * a // 16 % 8 for a in address[:8]}) == 8  # different banks
    assert all(2 * a % 16 == 0 for a in address)

    expected = sum(p[tile].sum(axis=1)[:, None] * means[tile] for tile in p)
    row, column = half_accumulator_place(columns)
    a = counted[row[..., None], column]  # [thread, half, two columns]
    out = np.zeros((64, dim), dtype=np.int64)
    for four in range(dim // 8):
        matrix = np.stack([memory[address[r] + 8 * four :][:8] for r in range(8)])
        b = np.stack([matrix[2 * (lane % 4) + i, lane // 4] for i in range(2)], axis=1)  # ldmatrix.trans
        for warp in range(4):
            of_a, of_b = np.zeros((16, 8), dtype=np.int64), np.zeros((8, 8), dtype=np.int64)
            for thread in lane:  # mma.m16n8k8
                for i in range(2):
                    for half in range(2):
                        of_a[thread // 4 + 8 * half, 2 * (thread % 4) + i] = a[32 * warp + thread, half, i]
                    of_b[2 * (thread % 4) + i, thread // 4] = b[thread, i]
            out[16 * warp : 16 * warp + 16, 8 * four : 8 * four + 8] = of_a @ of_b
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("dim", [64, 128])
def test_rows_on_their_way_out_lie_in_order(dim):
    """rows.cuh: a warp's 16 rows by stmatrix, in rows of ``pitch`` bytes; no two of eight chunks meet in a bank."""
    pitch, lane = 2 * dim + 16, np.arange(32)
    rows = np.arange(16 * dim).reshape(16, dim)
    memory = np.full(16 * pitch // 2, -1)  # 16-bit numbers

    def register(i, half):  # y[i][half] of every lane: two channels
        return np.stack([rows[lane // 4 + 8 * half, 8 * i + 2 * (lane % 4) + c] for c in range(2)], axis=1)

    for i in range(0, dim // 8, 2):
        registers = (register(i, 0), register(i, 1), register(i + 1, 0), register(i + 1, 1))
        address = lane % 16 * pitch + (i + lane // 16) * 16
        for matrix in range(4):
            assert len({a // 16 % 8 for a in address[8 * matrix : 8 * matrix + 8]}) == 8
            for row in range(8):  # whose address lane 8 · matrix + row has, and whose numbers lanes 4 · row … hold
                at = address[8 * matrix + row] // 2
                memory[at : at + 8] = registers[matrix][4 * row : 4 * row + 4].flatten()
    for row in range(16):
        assert np.array_equal(memory[row * pitch // 2 :][:dim], rows[row])


def test_a_thread_needs_one_scale_of_q_and_one_of_k():
    """Its columns are those of the K group that its place in the quad names; its rows share a Q group."""
    geometry, per_thread = MACHINES["sm_90a"].geometry, PerThread()
    row, column = accumulator_place(geometry.b_k)
    k_group = per_thread.k_group(torch.from_numpy(column), geometry).numpy()
    q_group = per_thread.q_group(torch.from_numpy(row), geometry).numpy()
    assert np.array_equal(k_group, np.broadcast_to(LANE % 4, k_group.shape))
    assert np.array_equal(q_group, np.broadcast_to(8 * WARP + LANE // 4, q_group.shape))
    assert geometry.b_q == 64
    assert geometry.warp_rows == 16
    assert TILE_KEYS % geometry.b_k == 0


# ---- reading packed tiles back: packers written from the comments in pack.cu and swizzle.cuh alone


def packed_keys(k):
    """K ``[N, D]`` of bytes to tiles ``[T, 128 · D]``: rows of D bytes, 16-byte chunks exchanged, zeros at the end."""
    length, dim = k.shape
    tiles = np.zeros((-(-length // 128), 128 * dim), dtype=np.uint8)
    for key in range(length):
        row = key % 128
        for chunk in range(dim // 16):
            moved = chunk ^ (row & 7) if dim == 128 else chunk ^ (row >> 1 & 3)
            at = row * dim + 16 * moved
            tiles[key // 128, at : at + 16] = k[key, 16 * chunk : 16 * chunk + 16]
    return tiles


def packed_values(v):
    """V ``[N, D]`` of bytes to tiles ``[T, D · 128]``: a channel's 128 tokens a row, in the order of P's registers."""
    length, dim = v.shape
    tiles = np.zeros((-(-length // 128), 128 * dim), dtype=np.uint8)
    for token in range(length):
        chunk, inside = token % 128 // 16, token % 16
        e, q, r = inside >> 3, inside >> 1 & 3, inside & 1
        for channel in range(dim):
            moved = chunk ^ (channel & 7)
            tiles[token // 128, channel * 128 + 16 * moved + 4 * q + 2 * e + r] = v[token, channel]
    return tiles


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [1, 128, 300])
def test_unpacking_inverts_packing(length, dim):
    generator = np.random.default_rng(length)
    k, v = (generator.integers(0, 256, (2, 3, length, dim), dtype=np.uint8) for _ in range(2))

    def tiles(pack, x):
        return torch.from_numpy(np.stack([np.stack([pack(head) for head in batch]) for batch in x]))

    keys = unpack_keys(tiles(packed_keys, k), dim)
    values = unpack_values(tiles(packed_values, v), dim)
    assert keys.dtype == torch.int8
    assert values.dtype == torch.float8_e4m3fn
    assert keys.shape == values.shape == (2, 3, -(-length // 128) * 128, dim)
    for plain, unpacked in ((k, keys), (v, values)):
        codes = unpacked.view(torch.uint8).numpy()
        assert np.array_equal(codes[:, :, :length], plain)
        assert not codes[:, :, length:].any()

"""attention_mma's packed tiles and registers lie where mma.sync looks for them, shown by models of the hardware.

The models come from the PTX manual: which thread holds what of the operands and results of mma.m16n8k16 (16-bit),
m16n8k32 (8-bit) and m16n8k64 (4-bit), and what ldmatrix brings. Tiles are written by packers made from the comments in
pack.cu and swizzle.cuh; what a lane asks ldmatrix for follows the comments in mma/mainloop.cuh. Nothing of
`lowbit_attention.backends.cuda.layout` is used to build them.
"""

import numpy as np
import pytest
import torch

from lowbit_attention.backends.cuda.instances import PackFormat
from lowbit_attention.backends.cuda.layout import swizzled_offsets, unpack_keys, unpack_values
from lowbit_attention.recipes.granularity import PerThread
from lowbit_attention.recipes.machine import MACHINES

KEYS = 64  # of a tile
LANE = np.arange(32)
QUAD, TURN = LANE // 4, LANE % 4  # a lane's quad, and its place in it
BASE = 1024  # where shared memory begins; every swizzle's pattern repeats there


# ---- what the hardware does


def a_place(bits):
    """Row and depth of number i of register r of lane l in A of m16n8k(256 / bits), each ``[32, 4, 32 / bits]``."""
    count = 32 // bits
    r, i = np.arange(4)[:, None], np.arange(count)
    row = np.broadcast_to((QUAD[:, None] + 8 * (np.arange(4) % 2))[..., None], (32, 4, count))
    return row, r // 2 * (4 * count) + TURN[:, None, None] * count + i


def b_place(bits):
    """Depth and column of number i of register r of lane l in B, each ``[32, 2, 32 / bits]``."""
    count = 32 // bits
    r, i = np.arange(2)[:, None], np.arange(count)
    depth = r * (4 * count) + TURN[:, None, None] * count + i
    return depth, np.broadcast_to(QUAD[:, None, None], depth.shape)


def c_place():
    """Row and column of register r of lane l in C and D, each ``[32, 4]``."""
    r = np.arange(4)
    return QUAD[:, None] + 8 * (r // 2), 2 * TURN[:, None] + r % 2


def numbers(registers, bits):
    """The signed numbers in 32-bit registers ``[...]``, the lowest bits first: ``[..., 32 / bits]``."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    unsigned = (registers[..., None].astype(np.uint32) >> shifts & np.uint32((1 << bits) - 1)).astype(np.int64)
    return np.where(unsigned >= 1 << (bits - 1), unsigned - (1 << bits), unsigned)


def mma(a, b, bits):
    """D ``[16, 8]`` of registers A ``[32, 4]`` and B ``[32, 2]``."""
    depth = 256 // bits
    left, right = np.full((16, depth), 1 << 40), np.full((depth, 8), 1 << 40)
    left[a_place(bits)] = numbers(a, bits)
    right[b_place(bits)] = numbers(b, bits)
    return left @ right


def ldmatrix(memory, addresses, trans=False):
    """Registers ``[32, 4]``: lane l addresses row l % 8 of matrix l / 8; of each matrix it gets two 16-bit elements.

    Without ``trans`` those of row l / 4, columns 2 · (l % 4) and + 1; with it rows and columns change places.
    """
    assert (addresses % 16 == 0).all()
    rows = memory[(addresses[:, None] + np.arange(16)) - BASE].reshape(4, 8, 16)  # [matrix, row, byte]
    elements = np.ascontiguousarray(rows).view(np.uint16)  # [matrix, row, 8]
    if trans:
        low, high = elements[:, 2 * TURN, QUAD], elements[:, 2 * TURN + 1, QUAD]
    else:
        low, high = elements[:, QUAD, 2 * TURN], elements[:, QUAD, 2 * TURN + 1]
    return (low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)).T


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_models_cover_every_element_once(bits):
    depth = 256 // bits
    row, at = a_place(bits)
    assert sorted((row * depth + at).ravel()) == list(range(16 * depth))
    at, column = b_place(bits)
    assert sorted((at * 8 + column).ravel()) == list(range(8 * depth))
    row, column = c_place()
    assert sorted((row * 8 + column).ravel()) == list(range(128))


# ---- tiles, as the comments say


def place(row, chunk, row_bytes):
    """Where a row's 16-byte chunk lies: exchanged so that eight rows' equal chunks fill 128 bytes."""
    bits = {32: row >> 2 & 1, 64: row >> 1 & 3, 128: row & 7, 256: row & 7}[row_bytes]
    return row * row_bytes + 16 * (chunk ^ bits)


def tile_of_rows(rows):
    """Bytes ``[R, row_bytes]`` as a tile ``[R · row_bytes]``."""
    count, row_bytes = rows.shape
    tile = np.zeros(count * row_bytes, dtype=np.uint8)
    for row in range(count):
        for chunk in range(row_bytes // 16):
            at = place(row, chunk, row_bytes)
            tile[at : at + 16] = rows[row, 16 * chunk : 16 * chunk + 16]
    return tile


def lanes(x, bits):
    """Signed numbers ``[..., D]`` to bytes ``[..., D · bits / 8]``, of two nibbles the first one lowest."""
    if bits == 8:
        return x.astype(np.int8).view(np.uint8)
    nibbles = (x & 15).astype(np.uint8)
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def position(token):
    """Where a token's number lies among its tile's 64, in E4M3: in the order of P's registers."""
    e, q, r = token >> 3 & 1, token >> 1 & 3, token & 1
    return token // 16 * 16 + 4 * q + 2 * e + r


def channels_of_values(v):
    """V ``[64, D]`` of bytes to a row a channel: ``[D, 64]``."""
    rows = np.empty((v.shape[1], KEYS), dtype=np.uint8)
    for token in range(KEYS):
        rows[:, position(token)] = v[token]
    return rows


# ---- shared memory

ROW_BYTES = {"INT4 of 64": 32, "INT4 of 128, INT8 of 64, E4M3": 64, "INT8 of 128, FP16 of 64": 128, "FP16 of 128": 256}


@pytest.mark.parametrize("row_bytes", ROW_BYTES.values(), ids=ROW_BYTES)
def test_eight_rows_equal_chunks_fill_all_banks_once(row_bytes):
    """What ldmatrix reads at once, eight rows' 16 bytes: 32 banks of 4 bytes, each once."""
    for first in range(0, 128, 8):
        for chunk in range(row_bytes // 16):
            banks = {place(row, chunk, row_bytes) % 128 // 16 for row in range(first, first + 8)}
            assert len(banks) == 8


@pytest.mark.parametrize("rows", [32, 64, 128])
@pytest.mark.parametrize("row_bytes", ROW_BYTES.values(), ids=ROW_BYTES)
def test_the_host_knows_where_chunks_lie(row_bytes, rows):
    offsets = swizzled_offsets(rows, row_bytes)
    expected = [[place(row, chunk, row_bytes) for chunk in range(row_bytes // 16)] for row in range(rows)]
    assert offsets.tolist() == expected
    assert sorted(offsets.flatten().tolist()) == list(range(0, rows * row_bytes, 16))


# ---- Q·K


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_ldmatrix_and_the_mma_give_q_times_k(bits, dim):
    """A warp's 32 rows by 64 keys: what a lane of number s[block][4n + c] has is the score of its row and key."""
    generator, largest = np.random.default_rng(dim + bits), (1 << bits - 1) - 1
    q, k = (generator.integers(-largest, largest + 1, (count, dim)) for count in (32, KEYS))
    row_bytes = dim * bits // 8
    memory = np.concatenate([tile_of_rows(lanes(x, bits)) for x in (k, q)])  # K first, Q behind it
    matrix, row = LANE // 8, LANE % 8
    start_q = BASE + KEYS * row_bytes
    q_at = start_q + np.array([place(m % 2 * 8 + r, m // 2, row_bytes) for m, r in zip(matrix, row, strict=True)])
    k_at = BASE + np.array([place(m // 2 * 8 + r, m % 2, row_bytes) for m, r in zip(matrix, row, strict=True)])

    scores = np.zeros((2, 8, 16, 8), dtype=np.int64)  # [block, n, row, key]
    for step in range(row_bytes // 32):
        a = [ldmatrix(memory, (q_at ^ 32 * step) + block * 16 * row_bytes) for block in range(2)]
        for n in range(0, 8, 2):
            b = ldmatrix(memory, (k_at ^ 32 * step) + n * 8 * row_bytes)
            for j in range(2):
                for block in range(2):
                    scores[block, n + j] += mma(a[block], b[:, 2 * j : 2 * j + 2], bits)
    whole = scores.transpose(0, 2, 1, 3).reshape(32, KEYS)
    assert np.array_equal(whole, q @ k.T)


def test_a_thread_needs_one_scale_of_q_and_one_of_k():
    """Its four rows share a Q group, its 16 keys a K group: what the fast way scales with a single factor."""
    geometry, per_thread = MACHINES["sm_89"].geometry, PerThread()
    assert (geometry.warp_rows, geometry.b_k) == (32, KEYS)
    row, column = c_place()
    rows = torch.from_numpy(np.concatenate([row, row + 16], axis=1))
    keys = torch.from_numpy(np.concatenate([column + 8 * n for n in range(8)], axis=1))
    q_group = per_thread.q_group(rows, geometry).numpy()
    k_group = per_thread.k_group(keys, geometry).numpy()
    assert np.array_equal(q_group, np.broadcast_to(QUAD[:, None], q_group.shape))
    assert np.array_equal(k_group, np.broadcast_to(TURN[:, None], k_group.shape))


# ---- P·V


def probability_registers(scores, half):
    """A lane's P of 16 rows by 64 keys ``[16, 64]`` as A fragments: ``[32, registers]``, from the lane's own scores.

    Numbers 8g + 4e + 2h + i of a lane are, of 16 keys, half h's (rows l / 4 and + 8) keys 8e + 2 · (l % 4) + i. E4M3:
    register 2g + h holds both e, four bytes; FP16: register 4g + 2e + h holds one.
    """
    row, column = c_place()
    mine = np.concatenate([scores[row, column + 8 * n] for n in range(8)], axis=1).reshape(32, 4, 2, 2, 2)  # g e h i
    if half:
        bits = mine.astype(np.float16).view(np.uint16).astype(np.uint32)
        return (bits[..., 0] | bits[..., 1] << np.uint32(16)).reshape(32, 16)
    bytes_ = mine.transpose(0, 1, 3, 2, 4).reshape(32, 8, 4).astype(np.uint32)  # [lane, (g, h), (e, i)]
    return (bytes_ << np.arange(0, 32, 8, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)


def float_mma(a, b):
    """m16n8k16 of FP16 registers."""
    left, right = np.full((16, 16), np.nan), np.full((16, 8), np.nan)
    for to, place_of, registers in ((left, a_place(16), a), (right, b_place(16), b)):
        halves = np.stack([registers & np.uint32(0xFFFF), registers >> np.uint32(16)], axis=-1).astype(np.uint16)
        to[place_of] = halves.view(np.float16).astype(np.float64)
    return left @ right


@pytest.mark.parametrize("dim", [64, 128])
def test_p_in_e4m3_times_v(dim):
    """Bytes stand for E4M3 numbers (0 … 127, so that no sign is in the way): two MMAs for 64 keys, eight channels."""
    generator = np.random.default_rng(dim)
    p, v = generator.integers(0, 128, (16, KEYS)), generator.integers(0, 128, (KEYS, dim))
    memory = tile_of_rows(channels_of_values(v.astype(np.uint8)))
    registers = probability_registers(p, half=False)
    v_at = BASE + np.array([place(lane % 8, lane // 8, 64) for lane in LANE])
    out = np.zeros((16, dim), dtype=np.int64)
    for channel in range(0, dim, 8):
        b = ldmatrix(memory, v_at + channel * 64)
        for step in range(2):
            out[:, channel : channel + 8] += mma(
                registers[:, 4 * step : 4 * step + 4], b[:, 2 * step : 2 * step + 2], 8
            )
    assert np.array_equal(out, p @ v)


@pytest.mark.parametrize("dim", [64, 128])
def test_p_in_fp16_times_v(dim):
    """Whole numbers, exact in FP16: four MMAs for 64 keys; ldmatrix turns V around, 16 channels at a time."""
    generator = np.random.default_rng(dim)
    p, v = generator.integers(0, 2048, (16, KEYS)), generator.integers(-2048, 2049, (KEYS, dim))
    row_bytes = 2 * dim
    memory = tile_of_rows(v.astype(np.float16).view(np.uint8).reshape(KEYS, row_bytes))
    registers = probability_registers(p, half=True)
    matrix, row = LANE // 8, LANE % 8
    v_at = BASE + np.array([place(m % 2 * 8 + r, m // 2, row_bytes) for m, r in zip(matrix, row, strict=True)])
    out = np.zeros((16, dim))
    for channel in range(0, dim, 16):
        for step in range(4):
            b = ldmatrix(memory, (v_at ^ 2 * channel) + step * 16 * row_bytes, trans=True)
            for j in range(2):
                part = float_mma(registers[:, 4 * step : 4 * step + 4], b[:, 2 * j : 2 * j + 2])
                out[:, channel + 8 * j : channel + 8 * j + 8] += part
    assert np.array_equal(out, (p @ v).astype(np.float64))


def test_rows_of_ones_sum_p():
    """The row sum's B is ones throughout: column 0, which a lane's first sums are of, is every row's sum."""
    p = np.random.default_rng(0).integers(0, 128, (16, KEYS))
    registers = probability_registers(p, half=False)
    ones = np.full((32, 2), 0x01010101, dtype=np.uint32)
    total = sum(mma(registers[:, 4 * step : 4 * step + 4], ones, 8) for step in range(2))
    assert np.array_equal(total, np.repeat(p.sum(axis=1, keepdims=True), 8, axis=1))


# ---- reading packed tiles back

FORMS = [PackFormat(KEYS, bits, half) for bits in (8, 4) for half in (False, True)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [1, 64, 150])
def test_unpacking_inverts_packing(length, dim, form):
    generator, tiles = np.random.default_rng(length), -(-length // KEYS)
    largest = 7 if form.k_lanes == 4 else 127
    k = np.zeros((2, 3, tiles * KEYS, dim), dtype=np.int64)
    k[:, :, :length] = generator.integers(-largest, largest + 1, (2, 3, length, dim))
    v = np.zeros(k.shape, dtype=np.uint16 if form.v_half else np.uint8)
    v[:, :, :length] = generator.integers(0, 0x7C00 if form.v_half else 0x7F, (2, 3, length, dim))

    def tile_by_tile(x, pack):
        by_tile = x.reshape(2, 3, tiles, KEYS, dim)
        packed = [[[pack(by_tile[b, h, t]) for t in range(tiles)] for h in range(3)] for b in range(2)]
        return torch.from_numpy(np.array(packed))

    k_tiles = tile_by_tile(k, lambda x: tile_of_rows(lanes(x, form.k_lanes)))
    if form.v_half:
        v_tiles = tile_by_tile(v, lambda x: tile_of_rows(x.view(np.uint8)))
    else:
        v_tiles = tile_by_tile(v, lambda x: tile_of_rows(channels_of_values(x)))
    assert k_tiles.shape[-1] == form.k_bytes(dim)
    assert v_tiles.shape[-1] == form.v_bytes(dim)
    keys, values = unpack_keys(k_tiles, dim, form), unpack_values(v_tiles, dim, form)
    assert keys.dtype == torch.int8
    assert np.array_equal(keys.numpy(), k)
    assert values.dtype == (torch.float16 if form.v_half else torch.float8_e4m3fn)
    codes = values.contiguous().view(torch.int16 if form.v_half else torch.uint8).numpy()
    assert np.array_equal(codes.astype(np.int64), v.astype(np.int64))

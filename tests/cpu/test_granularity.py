"""Who shares a scale, against explicit sets of tokens (algorithm notes, section 3) and against the MMA's fragments."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lowbit_attention.recipes.granularity import (
    TOKEN_GRANULARITIES,
    PerBlock,
    PerTensor,
    PerThread,
    PerToken,
    PerWarp,
    TokenGranularity,
)
from lowbit_attention.recipes.machine import Geometry

ADA = Geometry(b_q=128, b_k=64, warp_rows=32)
HOPPER = Geometry(b_q=64, b_k=128, warp_rows=16)


def partition(groups: torch.Tensor) -> set[frozenset[int]]:
    """Tokens 0, 1, … as sets that share a group."""
    sets: dict[int, set[int]] = {}
    for token, group in enumerate(groups.tolist()):
        sets.setdefault(group, set()).add(token)
    return {frozenset(tokens) for tokens in sets.values()}


def q_sets(granularity: TokenGranularity, length: int, geometry: Geometry) -> set[frozenset[int]]:
    return partition(granularity.q_group(torch.arange(length), geometry))


def k_sets(granularity: TokenGranularity, length: int, geometry: Geometry) -> set[frozenset[int]]:
    return partition(granularity.k_group(torch.arange(length), geometry))


def runs(*bounds: int) -> set[frozenset[int]]:
    """The sets {bounds[0], …, bounds[1] − 1}, {bounds[1], …, bounds[2] − 1}, …"""
    return {frozenset(range(a, b)) for a, b in pairwise(bounds)}


ADA_ROWS_OF_A_THREAD = {
    frozenset({warp + row, warp + row + 8, warp + row + 16, warp + row + 24})
    for warp in (0, 32, 64, 96, 128, 160, 192, 224)  # two tiles of four warps
    for row in range(8)
}
HOPPER_ROWS_OF_A_THREAD = {
    frozenset({warp + row, warp + row + 8})
    for warp in (0, 16, 32, 48, 64, 80, 96, 112)  # two tiles of four warps
    for row in range(8)
}


@pytest.mark.parametrize(
    ("granularity", "geometry", "length", "expected"),
    [
        (PerTensor(), ADA, 300, runs(0, 300)),
        (PerBlock(), ADA, 300, runs(0, 128, 256, 300)),
        (PerBlock(), HOPPER, 150, runs(0, 64, 128, 150)),
        (PerWarp(), ADA, 150, runs(0, 32, 64, 96, 128, 150)),
        (PerWarp(), HOPPER, 70, runs(0, 16, 32, 48, 64, 70)),
        (PerThread(), ADA, 256, ADA_ROWS_OF_A_THREAD),
        (PerThread(), HOPPER, 128, HOPPER_ROWS_OF_A_THREAD),
        # a ragged end: warp 0 whole, then rows 32…41 of warp 1, where only rows 0 and 1 mod 8 come twice
        (PerThread(), ADA, 42, {frozenset({r, r + 8, r + 16, r + 24}) for r in range(8)}
         | {frozenset({32, 40}), frozenset({33, 41})} | {frozenset({r}) for r in range(34, 40)}),
        (PerToken(), ADA, 5, runs(0, 1, 2, 3, 4, 5)),
    ],
    ids=lambda x: str(x) if isinstance(x, TokenGranularity | Geometry | int) else "",
)  # fmt: skip
def test_queries_that_share_a_scale(
    granularity: TokenGranularity, geometry: Geometry, length: int, expected: set[frozenset[int]]
) -> None:
    assert q_sets(granularity, length, geometry) == expected


# Columns {2g, 2g + 1} of every 8, g = 0…3, within a key tile, written out for Ada's tile of 64 keys.
ADA_COLUMNS_OF_A_THREAD = {
    frozenset({0, 1, 8, 9, 16, 17, 24, 25, 32, 33, 40, 41, 48, 49, 56, 57}),
    frozenset({2, 3, 10, 11, 18, 19, 26, 27, 34, 35, 42, 43, 50, 51, 58, 59}),
    frozenset({4, 5, 12, 13, 20, 21, 28, 29, 36, 37, 44, 45, 52, 53, 60, 61}),
    frozenset({6, 7, 14, 15, 22, 23, 30, 31, 38, 39, 46, 47, 54, 55, 62, 63}),
}


def shifted(sets: set[frozenset[int]], by: int) -> set[frozenset[int]]:
    return {frozenset(token + by for token in tokens) for tokens in sets}


@pytest.mark.parametrize(
    ("granularity", "geometry", "length", "expected"),
    [
        (PerTensor(), ADA, 300, runs(0, 300)),
        (PerBlock(), ADA, 150, runs(0, 64, 128, 150)),
        (PerBlock(), HOPPER, 300, runs(0, 128, 256, 300)),
        (PerWarp(), ADA, 150, runs(0, 64, 128, 150)),  # keys have no warps: the key tile
        (PerWarp(), HOPPER, 300, runs(0, 128, 256, 300)),
        (PerThread(), ADA, 128, ADA_COLUMNS_OF_A_THREAD | shifted(ADA_COLUMNS_OF_A_THREAD, 64)),
        # Hopper's tile of 128 keys joins the same columns of both halves
        (PerThread(), HOPPER, 128, {s | frozenset(t + 64 for t in s) for s in ADA_COLUMNS_OF_A_THREAD}),
        (PerThread(), ADA, 67, ADA_COLUMNS_OF_A_THREAD | {frozenset({64, 65}), frozenset({66})}),
        (PerToken(), ADA, 5, runs(0, 1, 2, 3, 4, 5)),
    ],
    ids=lambda x: str(x) if isinstance(x, TokenGranularity | Geometry | int) else "",
)
def test_keys_that_share_a_scale(
    granularity: TokenGranularity, geometry: Geometry, length: int, expected: set[frozenset[int]]
) -> None:
    assert k_sets(granularity, length, geometry) == expected


@pytest.mark.parametrize("geometry", [ADA, HOPPER, Geometry(192, 96, 48)], ids=str)
def test_a_thread_needs_one_q_scale_a_warp_and_one_k_scale_a_tile(geometry: Geometry) -> None:
    """The C fragment of mma.m16n8: lane L holds rows L/4 and L/4 + 8, columns 2·(L mod 4) and the next, of every tile.

    Lanes that hold the same rows share their scale; no two others do. Hence 8 scales a warp and 4 a key tile.
    """
    q, k = q_sets(PerThread(), geometry.b_q, geometry), k_sets(PerThread(), geometry.b_k, geometry)
    rows_of, columns_of = set(), set()
    for lane in range(32):
        columns_of.add(frozenset(n + 2 * (lane % 4) + i for n in range(0, geometry.b_k, 8) for i in (0, 1)))
        for warp in range(0, geometry.b_q, geometry.warp_rows):
            m16 = range(warp, warp + geometry.warp_rows, 16)
            rows_of.add(frozenset(m + lane // 4 + i for m in m16 for i in (0, 8)))
    assert q == rows_of
    assert k == columns_of
    assert len(q) == 8 * geometry.b_q // geometry.warp_rows
    assert len(k) == 4


# name: (Q scales, K scales) of one head with these tiles; whole tiles are counted, so warps past the end have scales.
COUNTS = {
    (ADA, 1, 1): {
        "per_tensor": (1, 1),
        "per_block": (1, 1),
        "per_warp": (4, 1),
        "per_thread": (32, 4),
        "per_token": (128, 64),
    },
    (ADA, 128, 64): {
        "per_tensor": (1, 1),
        "per_block": (1, 1),
        "per_warp": (4, 1),
        "per_thread": (32, 4),
        "per_token": (128, 64),
    },
    (ADA, 129, 65): {
        "per_tensor": (1, 1),
        "per_block": (2, 2),
        "per_warp": (8, 2),
        "per_thread": (64, 8),
        "per_token": (256, 128),
    },
    (HOPPER, 200, 300): {
        "per_tensor": (1, 1),
        "per_block": (4, 3),
        "per_warp": (16, 3),
        "per_thread": (128, 12),
        "per_token": (256, 384),
    },
}


@pytest.mark.parametrize(
    ("geometry", "queries", "keys", "name", "expected"),
    [(*case, name, counts) for case, table in COUNTS.items() for name, counts in table.items()],
    ids=str,
)
def test_number_of_scales(geometry: Geometry, queries: int, keys: int, name: str, expected: tuple[int, int]) -> None:
    granularity = TOKEN_GRANULARITIES[name]
    assert (granularity.q_groups(queries, geometry), granularity.k_groups(keys, geometry)) == expected


@pytest.mark.parametrize("granularity", TOKEN_GRANULARITIES.values(), ids=str)
@pytest.mark.parametrize("geometry", [ADA, HOPPER], ids=str)
def test_groups_of_whole_tiles_are_numbered_without_gaps(granularity: TokenGranularity, geometry: Geometry) -> None:
    q = granularity.q_group(torch.arange(3 * geometry.b_q), geometry)
    k = granularity.k_group(torch.arange(3 * geometry.b_k), geometry)
    assert sorted(set(q.tolist())) == list(range(granularity.q_groups(3 * geometry.b_q, geometry)))
    assert sorted(set(k.tolist())) == list(range(granularity.k_groups(3 * geometry.b_k, geometry)))


@pytest.mark.parametrize("granularity", TOKEN_GRANULARITIES.values(), ids=str)
def test_groups_have_the_tokens_shape_and_type_whatever_their_order(granularity: TokenGranularity) -> None:
    tokens = torch.tensor([[130, 5], [64, 0]])
    for group in (granularity.q_group, granularity.k_group):
        got = group(tokens, ADA)
        assert got.shape == tokens.shape
        assert got.dtype == torch.int64
        one_by_one = [[int(group(torch.tensor([t]), ADA)) for t in row] for row in tokens.tolist()]
        assert got.tolist() == one_by_one


def test_no_tokens_have_no_scales() -> None:
    assert PerThread().q_groups(0, ADA) == 0
    assert PerThread().k_groups(0, ADA) == 0

"""The order of work: the blocks of the tail wave are cut between warpgroups, and every row is worked on once."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowbit_attention.backends.cuda.schedule import WorkTiles, work_tiles

ROWS = 64  # of a warpgroup


def work_tile(item, work, warpgroups, tiles):
    """Block, rows within it and key tiles that `work_of` in csrc/hopper/block.cuh gives an item."""
    rows, first, keys = warpgroups * ROWS, 0, range(tiles)
    if item >= work.whole:
        number_of_cut, count = item - work.whole, work.count - work.whole
        if work.key_splits > 1:
            split, n = number_of_cut // work.tail, work.key_splits
            keys = range(tiles * split // n, tiles * (split + 1) // n)
            return item - split * work.tail, range(rows), keys
        number = sum(number_of_cut >= n * work.tail for n in range(1, warpgroups))
        if warpgroups > 2 and count == 2 * work.tail:
            rows = 2 * ROWS
        elif count > work.tail:
            rows = ROWS
        first = number * rows
        item -= number * work.tail
    return item, range(first, min(first + rows, warpgroups * ROWS)), keys


SIZES = {
    "blocks": st.integers(1, 1000),
    "sms": st.integers(1, 140),
    "warpgroups": st.sampled_from([2, 3, 4]),
    "tiles": st.one_of(st.just(0), st.integers(1, 60)),
}
"""Tiles: 0 where keys cannot be split."""


@settings(deadline=None, derandomize=True)
@given(**SIZES)
@example(blocks=576, sms=132, warpgroups=3, tiles=36)
@example(blocks=40, sms=132, warpgroups=3, tiles=0)
@example(blocks=132, sms=132, warpgroups=2, tiles=5)
@example(blocks=1, sms=132, warpgroups=3, tiles=1000)
@example(blocks=40, sms=132, warpgroups=4, tiles=0)  # SMs for three work tiles each, but two are made
@example(blocks=30, sms=132, warpgroups=4, tiles=0)
def test_every_row_meets_every_key_once(blocks, sms, warpgroups, tiles):
    work = work_tiles(blocks, sms, warpgroups, tiles)
    of_block = {}
    for item in range(work.count):
        block, rows, keys = work_tile(item, work, warpgroups, max(tiles, 1))
        assert len(rows) > 0
        assert len(keys) > 0
        of_block.setdefault(block, []).append((rows, keys))
    assert sorted(of_block) == list(range(blocks))
    for parts in of_block.values():
        if len({keys for _, keys in parts}) > 1:  # all rows, some keys
            assert {rows for rows, _ in parts} == {range(warpgroups * ROWS)}
            assert sorted(t for _, keys in parts for t in keys) == list(range(tiles))
        else:
            assert parts[0][1] == range(max(tiles, 1))
            assert sorted(r for rows, _ in parts for r in rows) == list(range(warpgroups * ROWS))


@settings(deadline=None, derandomize=True)
@given(**SIZES)
def test_cutting_adds_no_wave_of_whole_blocks(blocks, sms, warpgroups, tiles):
    work = work_tiles(blocks, sms, warpgroups, tiles)
    assert work.whole % sms == 0
    waves = -(-(work.count - work.whole) // sms) / work.key_splits
    assert work.whole // sms + waves <= -(-blocks // sms)


@pytest.mark.parametrize(("blocks", "count"), [(576, 528 + 2 * 48), (44, 3 * 44), (67, 67), (66, 132), (132, 132)])
def test_as_many_work_tiles_as_there_are_sms_for(blocks, count):
    assert work_tiles(blocks, 132, 3).count == count


@pytest.mark.parametrize(("blocks", "count"), [(33, 4 * 33), (34, 2 * 34), (44, 2 * 44), (66, 2 * 66), (67, 67)])
def test_four_warpgroups_are_cut_in_two_or_four(blocks, count):
    assert work_tiles(blocks, 132, 4).count == count


def test_keys_are_split_where_there_are_many():
    assert [work_tiles(576, 132, 3, tiles).key_splits for tiles in (4, 8, 36)] == [1, 1, 2]
    assert work_tiles(40, 132, 3, 36).key_splits == 3
    in_three_shorter_waves = WorkTiles(whole=0, tail=72, count=72 * 5, key_splits=5)
    assert work_tiles(72, 132, 3, 256) == in_three_shorter_waves
    # 1000 / 32 + 32: a split costs more than it saves from there on
    assert work_tiles(1, 132, 3, 1000).key_splits == 32
    assert work_tiles(132, 132, 3, 1000).key_splits == 1  # there is no tail wave

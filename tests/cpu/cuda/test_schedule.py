"""The order of work: the blocks of the last turn are cut between warpgroups, and every row is worked on once."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowbit_attention.cuda.schedule import cut

ROWS = 64  # of a warpgroup


def rows_of(item, pieces, warpgroups):
    """Block and rows within it that `work_of` in csrc/wgmma/block.cuh gives an item."""
    rows, first = warpgroups * ROWS, 0
    if item >= pieces.whole:
        number_of_cut, count = item - pieces.whole, pieces.count - pieces.whole
        number = (number_of_cut >= pieces.rest) + (warpgroups == 3 and number_of_cut >= 2 * pieces.rest)
        if warpgroups == 3 and count == 2 * pieces.rest:
            rows = 2 * ROWS
        elif count > pieces.rest:
            rows = ROWS
        first = number * rows
        item -= number * pieces.rest
    return item, range(first, min(first + rows, warpgroups * ROWS))


@settings(deadline=None, derandomize=True)
@given(blocks=st.integers(1, 3000), places=st.integers(1, 140), warpgroups=st.sampled_from([2, 3]))
@example(blocks=576, places=132, warpgroups=3)
@example(blocks=40, places=132, warpgroups=3)
@example(blocks=132, places=132, warpgroups=2)
def test_every_row_is_worked_on_once(blocks, places, warpgroups):
    pieces = cut(blocks, places, warpgroups)
    seen = {}
    for item in range(pieces.count):
        block, rows = rows_of(item, pieces, warpgroups)
        assert len(rows) > 0
        for row in rows:
            assert (block, row) not in seen
            seen[block, row] = item
    assert len(seen) == blocks * warpgroups * ROWS


@settings(deadline=None, derandomize=True)
@given(blocks=st.integers(1, 3000), places=st.integers(1, 140), warpgroups=st.sampled_from([2, 3]))
def test_cutting_adds_no_turn(blocks, places, warpgroups):
    pieces = cut(blocks, places, warpgroups)
    assert pieces.whole % places == 0
    assert -(-pieces.count // places) == -(-blocks // places)


@pytest.mark.parametrize(("blocks", "count"), [(576, 528 + 2 * 48), (44, 3 * 44), (67, 67), (66, 132), (132, 132)])
def test_as_many_pieces_as_find_a_place(blocks, count):
    assert cut(blocks, 132, 3).count == count

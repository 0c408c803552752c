"""V's means by key tile where rows end at different tiles: each row gets back the means of the tiles that it saw.

The columns of ones are used again after an interval, so a later tile's mean stands in a column that an earlier row
filled. (Found by tools/fuzz.py on a card, where the kernel was right and the emulation was not.)
"""

import pytest
import torch

from lowbit_attention import compare, recipe
from lowbit_attention.call.masks import Masking
from lowbit_attention.recipes.machine import MACHINES
from lowbit_attention.reference.attention import emulate
from lowbit_attention.reference.exact import exact


@pytest.mark.parametrize(
    ("name", "tiles", "key_splits", "offset"),
    [("sm_90a", 11, 1, 0), ("sm_90a", 11, 2, -70), ("sm_90a", 11, 1, None), ("sm_89", 19, 1, 40)],
)  # (more tiles than columns of ones: 8 there, 16 here)
def test_rows_get_the_means_of_their_own_tiles(name, tiles, key_splits, offset):
    machine, g = MACHINES[name], torch.Generator().manual_seed(0)
    length = (tiles - 1) * machine.geometry.b_k + 9
    q, k, v = (torch.randn(1, 1, length, 32, generator=g) for _ in range(3))
    # every tile has a mean of its own, far from the others'
    v = 0.1 * v + 3 * torch.randn(tiles, generator=g).repeat_interleave(machine.geometry.b_k)[:length, None]
    masking = Masking(offset, None)
    want, _ = exact(q, k, v, sm_scale=0.2, masking=masking)
    errors = {
        r: compare(want, emulate(
            q, k, v, recipe(r), sm_scale=0.2, masking=masking, machine=machine, key_splits=key_splits
        ).out).l1
        for r in ("fast_8b", "sage2_8b")
    }  # fmt: skip
    assert errors["fast_8b"] < 1.05 * errors["sage2_8b"] + 2e-3

"""Masks in the emulation: what is listed, which tiles are visited, and that what nobody sees counts for nothing."""

import itertools
import math

import pytest
import torch

from lowbit_attention import attention, recipe
from lowbit_attention.call.masks import Masking, lists_keys, seeing_rows, seen_keys
from lowbit_attention.recipes.machine import MACHINES
from lowbit_attention.reference.attention import emulate
from lowbit_attention.reference.quantize import Means

NAMES = {"fast_8b": "sm_90a", "sage2_8b": "sm_90a", "sage2_4b": "sm_89", "rotated_4b": "sm_89", "sage1": "sm_89"}
EVERY_RECIPE = pytest.mark.parametrize("name", NAMES)
WORK_ROWS = 128
DIM = 16


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """(On tensors as small as these, more would only wait for each other.)"""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(batch=2, q_heads=4, kv_heads=4, q_len=90, kv_len=210, dim=DIM, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, q_heads, q_len, dim, generator=g)
    k = torch.randn(batch, kv_heads, kv_len, dim, generator=g) + 2 * torch.randn(dim, generator=g)
    v = torch.randn(batch, kv_heads, kv_len, dim, generator=g) + torch.randn(dim, generator=g)
    return q, k, v


def some(*shape, share=0.5, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def run(name, q, k, v, mask=None, offset=None, work_rows=WORK_ROWS, **options):
    found = emulate(
        q, k, v, recipe(name), sm_scale=1 / math.sqrt(q.shape[3]), masking=Masking(offset, mask),
        machine=MACHINES[NAMES[name]], work_rows=work_rows, **options,
    )  # fmt: skip
    return found.out, found.lse


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- a mask that is the same for all rows


def test_which_masks_list_keys():
    for shape, q_heads, kv_heads, causal in itertools.product(
        [(1, 1, 1, 9), (2, 1, 1, 9), (2, 4, 1, 9), (1, 4, 1, 1), (1, 1, 7, 9), (2, 1, 7, 1)], [4], [4, 2], [False, True]
    ):
        alike = shape[2] == 1 and not causal and not (shape[1] > 1 and q_heads > kv_heads)
        assert lists_keys(shape, q_heads, kv_heads, causal) == alike


@EVERY_RECIPE
@pytest.mark.parametrize("work_rows", [None, WORK_ROWS])
def test_of_all_batches_it_is_attention_of_the_keys_that_are_left(name, work_rows):
    q, k, v = inputs(kv_heads=2)
    mask = some(1, 1, 1, 210)
    left = mask[0, 0, 0]
    want = run(name, q, k[:, :, left], v[:, :, left])
    assert same(run(name, q, k, v, mask, work_rows=work_rows), want)


@EVERY_RECIPE
def test_by_batch_too(name):
    q, k, v = inputs(kv_heads=2)
    mask = some(2, 1, 1, 210, share=0.4)
    mask[1, ..., :120] = False
    out, lse = run(name, q, k, v, mask)
    for b in range(2):
        left, of = mask[b, 0, 0], slice(b, b + 1)
        want = run(name, q[of], k[of][:, :, left], v[of][:, :, left])
        assert same((out[of], lse[of]), want)


@EVERY_RECIPE
@pytest.mark.parametrize("batches", [1, 2])
def test_by_head_too(name, batches):
    q, k, v = inputs()
    mask = some(batches, 4, 1, 210)
    out, lse = run(name, q, k, v, mask)
    for b, h in itertools.product(range(2), range(4)):
        left, at = mask[b % batches, h, 0], (slice(b, b + 1), slice(h, h + 1))
        want = run(name, q[at], k[at][:, :, left], v[at][:, :, left])
        assert same((out[at], lse[at]), want)


# ---- any other: work tiles visit the tiles that some of their rows see


@EVERY_RECIPE
def test_blocks_of_rows_visit_their_own_tiles(name):
    """Two blocks of rows that see different tiles, and in them random keys, are two calls.

    (Means are given, and V's largest is the same in both, so that its scale is.)
    """
    machine = MACHINES[NAMES[name]]
    tile = machine.geometry.b_k
    q, k, v = inputs(batch=1, q_heads=2, kv_heads=1, q_len=WORK_ROWS + 70, kv_len=4 * tile - 20)
    of_rows = [slice(0, WORK_ROWS), slice(WORK_ROWS, None)]
    key = torch.arange(k.shape[2])
    of_keys = [(key // tile == 0) | (key // tile == 3), (key // tile == 1) | (key // tile == 2)]
    mask = torch.zeros(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
    for rows, keys in zip(of_rows, of_keys, strict=True):
        first = int(keys.nonzero()[0])
        v[:, :, first], v[:, :, first + 1] = 30, -30
        part = some(q[:, :, rows].shape[2], int(keys.sum()))
        part[0] = True
        mask[0, 0, rows, keys.nonzero()[:, 0]] = part
    means = Means(k=k.mean(dim=2), v=v.mean(dim=2))
    out, lse = run(name, q, k, v, mask, means=means)
    for rows, keys in zip(of_rows, of_keys, strict=True):
        want = run(
            name, q[:, :, rows], k[:, :, keys], v[:, :, keys], mask[:, :, rows][..., keys], means=means, work_rows=None
        )  # fmt: skip
        assert same((out[:, :, rows], lse[:, :, rows]), want)


@pytest.mark.parametrize("name", ["sage2_8b", "sage2_4b", "rotated_4b", "sage1"])
def test_where_every_tile_is_promoted_it_is_all_one_which_are_left_out(name):
    q, k, v = inputs(q_len=300)
    row, key = torch.arange(300)[:, None], torch.arange(210)
    mask = (row // 100 == key // 70) & some(300, 210)
    assert same(run(name, q, k, v, mask[None, None]), run(name, q, k, v, mask[None, None], work_rows=None))


@EVERY_RECIPE
@pytest.mark.parametrize(("batches", "heads"), [(1, 4), (2, 1), (2, 4)])
def test_a_batch_or_a_head_with_its_own_mask_is_a_call_of_its_own(name, batches, heads):
    q, k, v = inputs(q_len=150)
    mask = some(batches, heads, 150, 210, share=0.02)
    mask[:, :, :, 128:] &= torch.arange(150)[:, None] < 20
    out, lse = run(name, q, k, v, mask)
    for b, h in itertools.product(range(2), range(4)):
        at, of = (slice(b, b + 1), slice(h, h + 1)), mask[b % batches, h % heads][None, None]
        assert same((out[at], lse[at]), run(name, q[at], k[at], v[at], of))


# ---- what nobody sees counts for nothing

Q_LEN, KV_LEN = 150, 210


def with_holes(*shape):
    mask = some(*shape)
    if shape[2] > 1:
        mask[:, :, 10:30] = False  # blind rows
    mask[..., 40:60] = False  # unseen keys
    mask[..., 128:192] = False
    return mask


HOLES = {  # mask, causal offset, heads of K
    "listed": (lambda: with_holes(1, 1, 1, KV_LEN), None, 2),
    "listed by batch": (lambda: with_holes(2, 1, 1, KV_LEN), None, 2),
    "listed by head": (lambda: with_holes(2, 4, 1, KV_LEN), None, 4),
    "bits": (lambda: with_holes(1, 1, Q_LEN, KV_LEN), None, 2),
    "bits by batch and head": (lambda: with_holes(2, 4, Q_LEN, KV_LEN), None, 4),
    "heads that share K see different keys": (lambda: with_holes(2, 4, 1, KV_LEN), None, 2),
    "causal besides": (lambda: with_holes(2, 1, 1, KV_LEN), -20, 2),
    "causal, keys unseen": (lambda: None, 0, 2),
    "causal, rows blind": (lambda: None, -25, 2),
}


def visible_of(mask, offset):
    visible = torch.ones(2, 4, Q_LEN, KV_LEN, dtype=torch.bool)
    visible = visible if mask is None else visible & mask
    return visible if offset is None else visible.tril(offset)


@EVERY_RECIPE
@pytest.mark.parametrize("case", HOLES)
@pytest.mark.parametrize("poison", [1e4, math.inf, math.nan])
def test_garbage_that_nobody_sees_changes_nothing(name, case, poison):
    make, offset, kv_heads = HOLES[case]
    mask = make()
    q, k, v = inputs(kv_heads=kv_heads, q_len=Q_LEN)
    visible = visible_of(mask, offset)
    unseen = ~visible.reshape(2, kv_heads, -1, KV_LEN).any(dim=2)
    blind = ~visible.any(dim=3)
    assert unseen.any()
    want, want_lse = run(name, q, k, v, mask, offset)
    assert want.isfinite().all()
    assert torch.equal(want_lse == -math.inf, blind)
    assert not want[blind].any()
    q[blind], k[unseen], v[unseen] = poison, poison, poison
    out, lse = run(name, q, k, v, mask, offset)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 9), (1, 13))))
@pytest.mark.parametrize("offset", [None, -3, 0, 4, 11])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_what_is_seen_is_what_a_written_out_mask_says(shape, offset, kv_heads):
    q, k, _ = inputs(kv_heads=kv_heads, q_len=9, kv_len=13)
    for share in (0.2, 0.9):
        mask = some(*shape, share=share)
        visible = mask.expand(2, 4, 9, 13)
        visible = visible if offset is None else visible.tril(offset)
        masking = Masking(offset, mask)
        keys, rows = seen_keys(masking, q, k), seeing_rows(masking, q, k)
        every_key, every_row = torch.ones(2, kv_heads, 13, dtype=torch.bool), torch.ones(2, 4, 9, dtype=torch.bool)
        of_groups = visible.reshape(2, kv_heads, -1, 13).any(dim=2)
        assert torch.equal(every_key if keys is None else keys, of_groups)
        assert torch.equal((every_row if rows is None else rows).expand(2, 4, 9), visible.any(dim=3))
        written = masking.written_out(9, 13)
        assert torch.equal(written.expand(2, 4, 9, 13), visible)


@pytest.mark.parametrize(("q_len", "kv_len"), [(5, 9), (9, 5), (7, 7)])
@pytest.mark.parametrize("bottom_right", [True, False])
def test_causality_alone_says_what_is_seen(q_len, kv_len, bottom_right):
    q, k, _ = inputs(q_len=q_len, kv_len=kv_len)
    offset = kv_len - q_len if bottom_right else 0
    visible = torch.ones(q_len, kv_len, dtype=torch.bool).tril(offset)
    keys, rows = seen_keys(Masking(offset), q, k), seeing_rows(Masking(offset), q, k)
    assert (keys is None) == bool(visible.any(dim=0).all())
    assert (rows is None) == bool(visible.any(dim=1).all())
    assert keys is None or torch.equal(keys, visible.any(dim=0).expand_as(keys))
    assert rows is None or torch.equal(rows, visible.any(dim=1).expand_as(rows))


@EVERY_RECIPE
@pytest.mark.parametrize(("q_len", "kv_len", "offset"), [(150, 210, 0), (278, 150, -128)])
def test_causality_alone_is_attention_of_what_it_leaves(name, q_len, kv_len, offset):
    """What kernels are given: without the rows in front that see nothing, and without the keys behind.

    (A mean's additions come in another order where keys are left out: its last bit may differ.)
    """
    q, k, v = inputs(q_len=q_len, kv_len=kv_len)
    first, keys = -offset, min(kv_len, q_len + offset)
    out, lse = run(name, q, k, v, None, offset)
    assert not out[:, :, :first].any()
    assert bool((lse[:, :, :first] == -math.inf).all())
    want, want_lse = run(name, q[:, :, first:], k[:, :, :keys], v[:, :, :keys], None, offset + first)
    torch.testing.assert_close(out[:, :, first:], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[:, :, first:], want_lse, rtol=1e-5, atol=1e-5)


# ---- edges


@EVERY_RECIPE
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 9, 1), (2, 4, 1, 1), (2, 1, 9, 1), (1, 4, 9, 1)])
def test_masks_of_one_key_are_those_written_out(name, shape):
    q, k, v = inputs(q_len=9, kv_len=70)
    mask = some(*shape)
    assert same(run(name, q, k, v, mask), run(name, q, k, v, mask.expand(*shape[:3], 70).contiguous()))


@EVERY_RECIPE
@pytest.mark.parametrize("offset", [None, 0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 70), (2, 4, 1, 70), (1, 1, 9, 70), (2, 4, 9, 70)])
def test_where_all_is_hidden_there_are_zeros(name, shape, offset):
    q, k, v = inputs(q_len=9, kv_len=70)
    for work_rows in (None, WORK_ROWS):
        out, lse = run(name, q, k, v, torch.zeros(*shape, dtype=torch.bool), offset, work_rows)
        assert not out.any()
        assert bool((lse == -math.inf).all())


@EVERY_RECIPE
@pytest.mark.parametrize("shape", [(1, 1, 1, 70), (2, 4, 9, 70)])
def test_a_mask_that_hides_nothing_is_none(name, shape):
    q, k, v = inputs(q_len=9, kv_len=70)
    assert same(run(name, q, k, v, torch.ones(*shape, dtype=torch.bool)), run(name, q, k, v))


@EVERY_RECIPE
@pytest.mark.parametrize(
    ("batch", "heads", "q_len", "kv_len"), [(0, 4, 9, 7), (2, 0, 9, 7), (2, 4, 0, 7), (2, 4, 9, 0), (2, 4, 0, 0)]
)
@pytest.mark.parametrize("shape", ["all", "batch", "rows", "own"])
def test_empty_calls(name, batch, heads, q_len, kv_len, shape):
    q, k, v = inputs(batch, heads, heads, q_len, kv_len)
    masks = {"all": (1, 1, 1), "batch": (batch, 1, 1), "rows": (1, 1, q_len), "own": (batch, heads, q_len)}
    mask = torch.ones(*masks[shape], kv_len, dtype=torch.bool)
    out, lse = run(name, q, k, v, mask)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert not out.any()
    assert bool((lse == -math.inf).all())


@EVERY_RECIPE
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_the_function_is_the_emulation(name, layout):
    """`attention` with a bool mask of fewer dimensions, on a CPU."""
    q, k, v = inputs(q_len=50, kv_len=70)
    mask = some(50, 70)
    want = run(name, q, k, v, mask[None, None], work_rows=None)
    given = (x.transpose(1, 2) if layout == "NHD" else x for x in (q, k, v))
    out, lse = attention(
        *given, recipe=name, attn_mask=mask, like=NAMES[name], return_lse=True, layout=layout
    )  # fmt: skip
    torch.testing.assert_close(out.transpose(1, 2) if layout == "NHD" else out, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want[1], rtol=1e-5, atol=1e-5)

"""Scores of a call: on everything they are the plain comparison, on a sample those of the chosen rows."""

import pytest
import torch

from lowbit_attention import InvalidArgumentError, attention, compare, recipe
from lowbit_attention.adaptive import Sample
from lowbit_attention.adaptive.scoring import ScoredCall, score, slices, spread, take
from lowbit_attention.call.torch_call import TorchCall
from lowbit_attention.evaluation.synthetic import make
from lowbit_attention.recipes.machine import MACHINES

ADA = MACHINES["sm_89"]
RECIPES = [recipe(name) for name in ("sage2_8b", "sage2_4b", "int8_u8")]
EVERYTHING = Sample(heads=None, tiles=None)


def tensors(batch=2, heads=4, length=300, head_dim=32, family="qk_bias"):
    return make(family, batch=batch, heads=heads, length=length, head_dim=head_dim)


def call_of(*args, **kwargs):
    return ScoredCall.of(TorchCall.of(*args, **kwargs))


def plain(call_q, k, v, name, mask=None, is_causal=False, scale=None, rows=None):
    causal = "top_left" if is_causal else None
    options = {"attn_mask": mask, "is_causal": is_causal, "causal_alignment": causal, "sm_scale": scale}
    exact = attention(call_q.double(), k.double(), v.double(), recipe="exact", **options)
    return compare(exact, attention(call_q, k, v, recipe=name, like="sm_89", **options), rows)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_of_everything_it_is_the_plain_comparison(is_causal, scale):
    q, k, v = tensors()
    found = score(take(call_of(q, k, v, None, 0.0, is_causal, scale=scale), EVERYTHING, 128, 0), RECIPES, ADA)
    assert list(found) == [r.name for r in RECIPES]
    for name, metrics in found.items():
        wanted = plain(q, k, v, name, is_causal=is_causal, scale=scale)
        assert metrics.l1 == pytest.approx(wanted.l1, rel=1e-9)
        assert metrics.cos_sim == pytest.approx(wanted.cos_sim, rel=1e-9)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_of_a_sample_it_is_the_comparison_of_its_heads_and_rows(is_causal, turn):
    q, k, v = tensors(length=700)
    sampled = take(call_of(q, k, v, is_causal=is_causal), Sample(heads=3, tiles=2), 128, turn)
    tiles = spread(2, 6, turn)
    rows = torch.cat([torch.arange(700)[t * 128 : (t + 1) * 128] for t in tiles])
    chosen = torch.zeros(2, 4, 700, dtype=torch.bool)
    for entry, head in slices(3, 2, 4, turn):
        chosen[entry, head, rows] = True
    is_lent = is_causal and 5 not in tiles  # (the last row, so that every key is seen)
    assert sampled.call.q.shape == (1, 3, len(rows) + is_lent, 32)
    found = score(sampled, RECIPES, ADA)
    for name, metrics in found.items():
        wanted = plain(q, k, v, name, is_causal=is_causal, rows=chosen)
        # matrix products of other shapes add in another order, and a number of P may then be rounded the other way
        assert metrics.l1 == pytest.approx(wanted.l1, rel=1e-5)
        assert metrics.rmse == pytest.approx(wanted.rmse, rel=1e-5)


def test_grouped_heads_share_keys():
    q, k, v = tensors(batch=1, heads=8)
    k, v = k[:, :2], v[:, :2]
    sampled = take(call_of(q, k, v, enable_gqa=True), Sample(heads=3, tiles=None), 128, 0)
    assert torch.equal(sampled.call.k[0], k[0, [s // 4 for s in spread(3, 8, 0)]])
    found = score(take(call_of(q, k, v, enable_gqa=True), EVERYTHING, 128, 0), RECIPES, ADA)
    assert found["sage2_4b"].l1 == pytest.approx(plain(q, k, v, "sage2_4b").l1, rel=1e-9)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(kind):
    q, k, v = tensors(length=300)
    allowed = torch.rand(2, 1, 300, 300, generator=torch.Generator().manual_seed(1)) < 0.7
    mask = allowed if kind == "bool" else torch.where(allowed, 0.1, -torch.inf)
    for is_causal in (False, True):
        call = call_of(q, k, v, mask, is_causal=is_causal)
        found = score(take(call, EVERYTHING, 128, 0), RECIPES[:1], ADA)["sage2_8b"]
        assert found.l1 == pytest.approx(plain(q, k, v, "sage2_8b", mask, is_causal).l1, rel=1e-9)
        rows = torch.cat([torch.arange(300)[t * 128 : (t + 1) * 128] for t in spread(2, 3, 1)])
        chosen = torch.zeros(2, 4, 300, dtype=torch.bool)
        for entry, head in slices(2, 2, 4, 1):
            chosen[entry, head, rows] = True
        found = score(take(call, Sample(heads=2, tiles=2), 128, 1), RECIPES[:1], ADA)["sage2_8b"]
        assert found.l1 == pytest.approx(plain(q, k, v, "sage2_8b", mask, is_causal, rows=chosen).l1, rel=1e-6)


def test_padding_counts_neither_as_key_nor_as_query():
    q, k, v = tensors(batch=2, heads=2, length=200)
    real = torch.arange(200) < torch.tensor([[120], [200]])
    mask = real[:, None, None]
    k = torch.where(mask.mT, k, 1e4)  # junk in the padding
    q = torch.where(mask.mT, q, -50.0)
    found = score(take(call_of(q, k, v, mask), EVERYTHING, 128, 0), RECIPES[:1], ADA)["sage2_8b"]
    wanted = plain(q, k, v, "sage2_8b", mask, rows=real[:, None].expand(2, 2, 200))
    assert found.l1 == pytest.approx(wanted.l1, rel=1e-9)


def test_rows_that_see_nothing_do_not_count():
    q, k, v = tensors(batch=1, heads=1, length=64)
    mask = torch.ones(64, 64, dtype=torch.bool)
    mask[10] = False
    found = score(take(call_of(q, k, v, mask), EVERYTHING, 128, 0), RECIPES[:1], ADA)["sage2_8b"]
    rows = torch.arange(64) != 10
    assert found.l1 == pytest.approx(plain(q, k, v, "sage2_8b", mask, rows=rows).l1, rel=1e-9)
    nothing = score(take(call_of(q, k, v, mask & False), EVERYTHING, 128, 0), RECIPES[:1], ADA)["sage2_8b"]
    assert nothing.l1 != nothing.l1


def test_three_dimensions_and_broadcast():
    q, k, v = (t[0] for t in tensors(batch=1))
    found = score(take(call_of(q, k, v), EVERYTHING, 128, 0), RECIPES[:1], ADA)["sage2_8b"]
    assert found.l1 == pytest.approx(plain(q[None], k[None], v[None], "sage2_8b").l1, rel=1e-6)


def test_spread_is_even_and_moves_on():
    for of in (3, 8, 40):
        for count in (1, 2, 3):
            seen = set()
            for turn in range(60):
                chosen = spread(count, of, turn)
                assert chosen == sorted(set(chosen))
                assert len(chosen) == min(count, of)
                assert 0 <= chosen[0] <= chosen[-1] < of
                seen |= set(chosen)
            assert seen == set(range(of))


@pytest.mark.parametrize(("batch", "heads"), [(1, 24), (2, 24), (8, 3), (8, 4), (32, 16), (3, 5)])
def test_a_sample_sees_different_heads_and_inputs(batch, heads):
    everything = [(b, h) for b in range(batch) for h in range(heads)]
    assert slices(None, batch, heads, 7) == everything
    seen = set()
    for turn in range(12 * batch * heads):
        for count in (1, 4, heads + 1, batch * heads - 1):
            chosen = slices(count, batch, heads, turn)
            assert chosen == sorted(set(chosen))
            assert len(chosen) == min(count, batch * heads)
            assert len({h for _, h in chosen}) == min(count, heads)
        seen |= set(slices(4, batch, heads, turn))
    assert seen == set(everything)
    if batch > 1:
        assert len({b for b, _ in slices(4, batch, heads, 0)}) > 1


@pytest.mark.parametrize("options", [{"heads": 0}, {"tiles": 1.5}, {"tokens": None}, {"heads": True}])
def test_a_sample_that_is_none(options):
    with pytest.raises(InvalidArgumentError, match="a positive number"):
        Sample(**options)

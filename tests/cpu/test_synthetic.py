"""Each synthetic family is reproducible and has the property that its summary claims."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit_attention import InvalidArgumentError
from lowbit_attention.evaluation.synthetic import FAMILIES, make, rope

ALL = pytest.mark.parametrize("family", FAMILIES)
LENGTH, DIM = 512, 64
# A mean of 512 N(0, 1) numbers has σ = .044; the largest of the few hundred channel means here stays within 5 σ.
MEAN_NOISE = 5 / math.sqrt(LENGTH)


def sample(family: str, **changes: int) -> tuple[Tensor, Tensor, Tensor]:
    return make(family, **{"batch": 2, "heads": 3, "length": LENGTH, "head_dim": DIM, **changes})


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    return (q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)


@ALL
def test_reproducible(family: str) -> None:
    first, again, other = sample(family, seed=7), sample(family, seed=7), sample(family, seed=8)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@ALL
def test_leaves_the_global_generator_alone(family: str) -> None:
    state = torch.get_rng_state()
    sample(family)
    assert torch.equal(torch.get_rng_state(), state)


@ALL
@pytest.mark.parametrize(("batch", "heads", "length", "dim"), [(1, 1, 1, 2), (2, 3, 5, 6), (1, 2, 700, 16)])
def test_shapes(family: str, batch: int, heads: int, length: int, dim: int) -> None:
    for t in make(family, batch=batch, heads=heads, length=length, head_dim=dim):
        assert t.shape == (batch, heads, length, dim)
        assert t.dtype == torch.float32
        assert t.isfinite().all()


@ALL
def test_batches_and_heads_are_different(family: str) -> None:
    for t in sample(family):
        flat = t.flatten(0, 1)
        assert not any(torch.equal(flat[0], other) for other in flat[1:])


def test_summaries_and_names() -> None:
    assert all(family.name == name and family.summary for name, family in FAMILIES.items())


def test_unknown_family() -> None:
    with pytest.raises(InvalidArgumentError, match=r"'bias'.*k_bias"):
        make("bias")


def test_normal() -> None:
    """Means 0 and variances 1 of each channel; a variance of 512 has σ = √(2 / 512) = .063."""
    for t in sample("normal"):
        assert t.mean(dim=2).abs().max() < MEAN_NOISE
        assert (t.var(dim=2) - 1).abs().max() < 5 * math.sqrt(2 / LENGTH)


BIASES = {"normal": (0, 0, 0), "k_bias": (0, 8, 0), "qk_bias": (4, 8, 0), "qkv_bias": (4, 8, 8)}


@pytest.mark.parametrize("family", BIASES)
def test_channel_biases(family: str) -> None:
    """On 1 / 16 of each head's channels, signs and channels differing between heads; around them N(0, 1)."""
    for t, size in zip(sample(family), BIASES[family], strict=True):
        mean = t.mean(dim=2)
        biased = mean.abs() > 1
        assert (biased.sum(dim=-1) == (DIM // 16 if size else 0)).all()
        if size:
            assert (mean[biased].abs() - size).abs().max() < MEAN_NOISE
            assert (mean[biased] > 0).any()
            assert (mean[biased] < 0).any()
            assert len({tuple(row.tolist()) for row in biased.flatten(0, 1)}) > 1
        assert mean[~biased].abs().max() < MEAN_NOISE
        assert (t.var(dim=2) - 1).abs().max() < 5 * math.sqrt(2 / LENGTH)


def test_rope_bias_is_a_turned_bias() -> None:
    """Turning every token back by its position gives the means of qk_bias; as it is, fast channels' means are gone."""
    q, k, v = sample("rope_bias")
    for t, size in ((q, 4), (k, 8)):
        mean = turn(t, -1).mean(dim=2)
        biased = mean.abs() > 1
        assert (biased.sum(dim=-1) == DIM // 16).all()
        assert (mean[biased].abs() - size).abs().max() < MEAN_NOISE
        assert (t.double().mean(dim=2) - mean).abs().max() > 1
    assert v.mean(dim=2).abs().max() < MEAN_NOISE


def turn(x: Tensor, sign: int) -> Tensor:
    """Rotary embedding as multiplication of complex numbers (channel c, channel c + D/2), in float64."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2]).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones_like(angle), sign * angle
    )
    return torch.cat([z.real, z.imag], dim=-1)


def test_rope() -> None:
    """The float32 angle of token 511 is off by up to 511 · 2⁻²⁴ = 3e-5, times values below 5."""
    x = torch.randn(2, LENGTH, DIM, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rope(x).double(), turn(x, 1), rtol=0, atol=5e-4)
    assert torch.equal(rope(x)[:, 0], x[:, 0])
    with pytest.raises(InvalidArgumentError, match="3"):
        rope(torch.zeros(4, 3))


@pytest.mark.parametrize(("length", "count"), [(100, 1), (512, 1), (1500, 3)])
def test_outlier_tokens(length: int, count: int) -> None:
    """Lengths of N(0, 1) vectors of 64 channels are 8 ± .7 (6 σ: below 12.5); ten times that is above 37."""
    q, k, v = sample("outlier_tokens", length=length)
    assert q.norm(dim=-1).max() < 12.5
    k_outliers, v_outliers = (t.norm(dim=-1) > 25 for t in (k, v))
    assert (k_outliers.sum(dim=-1) == count).all()
    assert torch.equal(k_outliers, v_outliers)
    for t in (k, v):
        norms = t.norm(dim=-1)
        assert norms[k_outliers].min() > 37
        assert norms[~k_outliers].max() < 12.5


def test_peaked() -> None:
    """Logits of σ = 4: the largest of 512 is near e¹²; with σ = 1 it has about 5 % of the mass."""
    q, k, _ = sample("peaked")
    top8 = probabilities(q, k).topk(8, dim=-1).values.sum(dim=-1).mean()
    plain8 = probabilities(*sample("normal")[:2]).topk(8, dim=-1).values.sum(dim=-1).mean()
    assert top8 > 0.7
    assert plain8 < 0.2
    assert q.std() == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("length", [128, 512, 2048])
@pytest.mark.parametrize("dim", [64, 128])
def test_sink(length: int, dim: int) -> None:
    """Log-odds of σ = (log(9 n) + 1) / √d ≈ 1 around log 9: their median is 90 %, the mean a few per cent lower."""
    q, k, v = sample("sink", length=length, head_dim=dim)
    mass = probabilities(q, k)[..., 0]
    assert 0.8 < mass.mean() < 0.95
    assert mass.median() == pytest.approx(0.9, abs=0.03)
    assert (v[:, :, 0].norm(dim=-1) < 0.3 * v[:, :, 1:].norm(dim=-1).mean(dim=-1)).all()


def test_v_mean() -> None:
    q, k, v = sample("v_mean")
    assert (v.mean(dim=2) - 4).abs().max() < MEAN_NOISE
    assert (v.var(dim=2) - 1).abs().max() < 5 * math.sqrt(2 / LENGTH)
    for t in (q, k):
        assert t.mean(dim=2).abs().max() < MEAN_NOISE


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_local(dim: int) -> None:
    """Logits, averaged over rings of distances (rotary embedding oscillates within them), fall on both sides alike."""
    q, k, _ = sample("local", head_dim=dim)
    logits = (q.double() @ k.double().transpose(-1, -2) / math.sqrt(dim)).mean(dim=(0, 1))
    offset = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    rings = [(0, 1), (1, 8), (8, 32), (32, 128), (128, 512)]
    behind, ahead = (torch.stack([logits[(o >= a) & (o < b)].mean() for a, b in rings]) for o in (offset, -offset))
    for by_distance in (behind, ahead):
        assert by_distance[0] == pytest.approx(16, abs=1)
        assert (by_distance.diff() < -0.5).all()
    near = probabilities(q, k)[..., offset.abs() <= 16].sum(dim=-1) / LENGTH
    assert near.min() > 0.5  # 33 keys of 512

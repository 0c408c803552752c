"""The families whose tokens are not exchangeable have the property that their summaries claim."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit_attention.evaluation.synthetic import CHANNEL_FAMILIES, FAMILIES, make
from lowbit_attention.evaluation.synthetic_sequences import BLOCK_TOKENS, GRID_STEP, SEEING_TOKENS, TEXT_TOKENS

HEADS, LENGTH, DIM = 8, 1024, 64
SEQUENCES = [name for name in FAMILIES if name not in CHANNEL_FAMILIES]


def sample(family: str, length: int = LENGTH, dim: int = DIM, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Rounded to bfloat16, as models have them: the property must survive it."""
    return [t.to(dtype).double() for t in make(family, heads=HEADS, length=length, head_dim=dim, seed=3)]


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)


def test_every_function_says_what_it_stands_for() -> None:
    assert SEQUENCES
    assert all(FAMILIES[name].make.__doc__ for name in SEQUENCES)
    assert set(CHANNEL_FAMILIES) | set(SEQUENCES) == set(FAMILIES)


# ---- neighbours


def test_drift() -> None:
    """The mean over the first eighth is −⅞ of the end, over the last +⅞, of some sign; over all it is 0."""
    q, k, v = sample("drift", length=4096)
    for t, end in ((k, 1.0), (v, 3.0)):
        first, last = t[:, :, :512].mean(dim=2), t[:, :, -512:].mean(dim=2)
        noise = 5 / math.sqrt(512)
        assert (first + last).abs().max() < 2 * noise
        assert (last.abs() - 0.875 * end).abs().max() < noise
        assert {bool(s) for s in (last > 0).flatten()} == {True, False}
        assert t.mean(dim=2).abs().max() < 5 * math.sqrt(1 + end**2 / 3) / 64
        ends = (t[:, :, -64:].mean(dim=2) - t[:, :, :64].mean(dim=2)).abs()
        assert ends.mean() == pytest.approx(2 * end * (1 - 64 / 4096), abs=0.2)
    assert q[:, :, :512].mean(dim=2).abs().max() < 5 / math.sqrt(512)


def test_blocky() -> None:
    """Within a block V varies by a tenth, between blocks by 1; key tiles so have means as large as V itself."""
    v = sample("blocky", length=9 * BLOCK_TOKENS + 7)[2]
    blocks = v[:, :, : 9 * BLOCK_TOKENS].unflatten(2, (9, BLOCK_TOKENS))
    assert blocks.std(dim=3).mean() == pytest.approx(0.1, rel=0.05)
    assert blocks.mean(dim=3).std() == pytest.approx(1.0, rel=0.1)
    tile_means = v[:, :, :128].mean(dim=2).abs().mean()
    assert tile_means > 5 * sample("normal")[2][:, :, :128].mean(dim=2).abs().mean()


# ---- sizes and kinds of tokens


def test_heavy_tokens() -> None:
    """Logarithms of the lengths: σ = ½ (and the χ's own 1/√(2 · 64) = .09); K's and V's are independent."""
    _, k, v = sample("heavy_tokens")
    sizes = [t.norm(dim=-1).log() for t in (k, v)]
    for size in sizes:
        assert size.std() == pytest.approx(math.hypot(0.5, 0.09), rel=0.05)
        assert size.max() - size.median() > 1.5
    assert abs(float(torch.corrcoef(torch.stack([s.flatten() for s in sizes]))[0, 1])) < 0.06


def test_grid() -> None:
    _, k, v = sample("grid")
    on_grid = torch.arange(LENGTH) % GRID_STEP == 0
    biased = k[:, :, on_grid].mean(dim=2).abs() > 4
    assert (biased.sum(dim=-1) == DIM // 16).all()
    assert k[:, :, on_grid].mean(dim=2).abs()[biased].mean() == pytest.approx(8, abs=0.2)
    assert k[:, :, ~on_grid].mean(dim=2).abs().max() < 5 / math.sqrt(LENGTH * 15 / 16)
    assert v[:, :, on_grid].std() == pytest.approx(3, rel=0.05)
    assert v[:, :, ~on_grid].std() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("length", [1024, 4096])
def test_two_segments(length: int) -> None:
    q, k, v = sample("two_segments", length=length)
    text = min(TEXT_TOKENS, length // 4)
    noise = 5 / math.sqrt(text)
    for t, of_text, of_image, size in ((q, 4, 0, 1), (k, 8, 4, 1), (v, 4, 0, 0.5)):
        for part, bias, std in ((t[:, :, :text], of_text, size), (t[:, :, text:], of_image, 1)):
            mean = part.mean(dim=2).abs()
            biased = mean > 2
            assert (biased.sum(dim=-1) == (DIM // 16 if bias else 0)).all()
            assert not bias or (mean[biased] - bias).abs().max() < noise
            assert (part - part.mean(dim=2, keepdim=True)).std() == pytest.approx(std, rel=0.03)
    of_text, of_image = (part.mean(dim=2).abs() > 2 for part in (k[:, :, :text], k[:, :, text:]))
    assert not torch.equal(of_text, of_image)


# ---- sinks

PLACES = {
    "sink": [0],
    "sink_whole": [0],
    "sink_zero": [0],
    "sink_last": [LENGTH - 1],
    "sink_middle": list(range(LENGTH // 2, LENGTH // 2 + 4)),
    "sink_v_bias": list(range(LENGTH // 2, LENGTH // 2 + 4)),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_a_sink_takes(name: str) -> None:
    """The median row gives the sinks their share together: log-odds are spread evenly around the share's."""
    q, k, v = sample(name)
    at = torch.tensor(PLACES[name])
    mass = probabilities(q, k)[..., at].sum(dim=-1)
    assert mass.median() == pytest.approx(*((0.999, 3e-4) if name == "sink_whole" else (0.9, 0.02)))
    sizes = v.norm(dim=-1)
    others = sizes.median()
    assert (sizes[:, :, at] < 0.2 * others).all()
    assert (sizes[:, :, at] == 0).all() == (name == "sink_zero")
    rest = torch.ones(LENGTH, dtype=torch.bool)
    rest[at] = False
    assert sizes[:, :, rest].min() > 0.4 * others
    assert k[:, :, rest].mean(dim=2).abs().max() < 5 / math.sqrt(LENGTH)
    assert k[:, :, rest].std() == pytest.approx(1, rel=0.02)


def test_several_sinks() -> None:
    q, k, v = sample("sinks")
    small = v.norm(dim=-1) < 0.3 * math.sqrt(DIM)
    assert (small.sum(dim=-1) == 8).all()
    assert len({tuple(row.nonzero().flatten().tolist()) for row in small[0]}) == HEADS
    mass = (probabilities(q, k) * small[:, :, None]).sum(dim=-1)
    assert mass.median() == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("length", [LENGTH, 2048])
def test_a_sink_for_one_tile_in_eight(length: int) -> None:
    """Of any 8 heads one sees it at a given run; elsewhere key 0 is a key like others."""
    q, k, _ = sample("sink_eighth", length=length)
    mass = probabilities(q, k)[..., 0].unflatten(-1, (-1, SEEING_TOKENS)).median(dim=-1).values[0]
    sees = mass > 0.5
    assert (sees.sum(dim=0) == 1).all()
    assert (sees.sum(dim=1) == length // SEEING_TOKENS // 8).all()
    assert mass[sees].mean() == pytest.approx(0.9, abs=0.03)
    assert mass[~sees].max() < 0.02


def test_a_v_bias_spares_the_sinks() -> None:
    v = sample("sink_v_bias")[2]
    mean = v.mean(dim=2).abs()
    assert ((mean > 6).sum(dim=-1) == DIM // 16).all()
    assert v[:, :, LENGTH // 2 : LENGTH // 2 + 4].abs().max() < 0.6


def test_lengths_far_above_a_tile_keep_the_share() -> None:
    """20,000 keys: a sink's logit grows with their number."""
    q, k, _ = make("sink_middle", heads=4, length=20_000, head_dim=128)
    q = q[:, :, ::200]
    mass = probabilities(q.double(), k.double())[..., 10_000:10_004].sum(dim=-1)
    assert mass.median() == pytest.approx(0.9, abs=0.03)

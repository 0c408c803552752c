"""What the tests of the packing kernels share. A helper, not a test."""

import dataclasses

import torch
from kernel_cases import inputs

from lowbit_attention.backends.cuda.instances import WGMMA_FORMAT, wgmma_format
from lowbit_attention.backends.cuda.packing import pack_kv
from lowbit_attention.recipes.machine import MACHINES
from lowbit_attention.recipes.options import AllTokens
from lowbit_attention.reference.quantize import pack
from lowbit_attention.reference.smoothing import sampled


def kv(*args, heads=3, batch=2, length=300, head_dim=64, **options):
    return inputs(
        *args, batch=batch, heads=(heads, heads), lengths=(length, length), head_dims=(head_dim, head_dim), **options
    )[1:]


def geometry_of(form):
    """The tiles of the kernel that a form is packed for."""
    return MACHINES["sm_89" if form.is_record else "sm_90a"].geometry


def referenced(k, v, r, packed, form=WGMMA_FORMAT):
    """The reference's numbers with the kernels' means."""
    k, v = k.float().contiguous(), v.float().contiguous()
    return pack(k, k, v, r.replace(smooth_q=False), geometry_of(form), None, packed.means())


def assert_same_bits(k, v, r, form=None):
    """Packs (as wgmma wants it by default), and compares integers, FP8 or FP16 numbers and scales with the reference's.

    Returns:
        What was packed.
    """
    form = form or wgmma_format(r)
    packed = pack_kv(k, v, r, form, "sm_90" if form.is_record else "sm_90a")
    ref = referenced(k, v, r, packed, form)
    for name, ours, theirs in (
        ("k", packed.k, ref.k),
        ("k_scale", packed.k_scale, ref.k_scale),
        ("v", packed.v, ref.v),
        ("v_scale", packed.v_scale, ref.v_scale[:, :, 0]),
    ):
        assert torch.equal(ours.float(), theirs), (name, int((ours.float() != theirs).sum()))
    assert packed.padding_is_zero
    of_tokens = ref.k.abs().amax(dim=-1)  # a group that is scaled has a token with the largest integer
    of_groups = torch.zeros_like(ref.k_scale).scatter_reduce_(2, ref.k_group.expand_as(of_tokens), of_tokens, "amax")
    largest = torch.where(of_groups > 0, ref.k_scale, 0.0).amax(dim=-1)
    assert torch.equal(torch.where(largest > 0, packed.k_largest_scale, 0.0), largest)
    assert (packed.k_largest_scale > 0).all()
    return packed


def assert_means(packed, k, v, r):
    """Within what float32 sums err by, of the largest magnitude; K's of the reference's choice of tokens.

    A thread adds up every 64th token or fewer in fours, then 32 threads' sums are added, then 8 splits'; each sum errs
    by up to 2⁻²⁴ of what it has, which is at most as many times the largest as there are tokens.
    """
    tolerance = (2 + k.shape[2] / 64 + 32 + 8) * 2.0**-24
    for x, mean, smoothed, sample in (
        (k, packed.k_mean, r.smooth_k, r.k_sample),
        (v, packed.v_mean, r.smooth_v, AllTokens()),
    ):
        chosen = sampled(None, sample, x)
        counted = x.double() if chosen is None else x.double() * chosen[..., None]
        count = x.shape[2] if chosen is None else int(chosen[0, 0].sum())
        exact = counted.sum(dim=2) / count * smoothed
        largest = counted.abs().amax(dim=2)
        assert ((mean - exact).abs() <= tolerance * largest * smoothed).all()


def assert_tile_means(packed, k, v, r):
    """V's means by tile are the reference's, by sums in float64, but for the last digit and where a rule is close.

    A thread sums 16 tokens, then 8 threads' sums are added: float32's errors are below 24 · 2⁻²⁴ of Σ|x|.
    """
    tile = geometry_of(WGMMA_FORMAT).b_k
    ref = referenced(k, v, r, dataclasses.replace(packed, v_tile_means=None))
    ours, theirs = packed.v_tile_means.float(), ref.v_tile_means
    assert ours.shape == theirs.shape
    both = (ours != 0) & (theirs != 0)
    assert ((ours - theirs).abs()[both] <= 2.0**-10 * theirs.abs()[both] + 2.0**-24).all()
    # where only one takes a mean: mean² is within float32's error of σ² / 4, or what is left of V_r
    tiles = ours.shape[2]
    scale = packed.v_scale[:, :, None].double()
    x = torch.nn.functional.pad(v.double() / scale, (0, 0, 0, tiles * tile - v.shape[2]))
    x = x.reshape(*v.shape[:2], tiles, tile, v.shape[3])
    count = torch.full((tiles, 1), tile, device=v.device)
    count[-1] = v.shape[2] - (tiles - 1) * tile
    total, squares = x.sum(dim=3), x.square().sum(dim=3)
    close = (5 * total.square() - count * squares).abs() <= 1e-4 * count * squares
    mean = total / count
    left = torch.maximum(x.amax(dim=3) - mean, mean - x.amin(dim=3))
    close |= (left - r.v_max).abs() <= 2.0**-9 * r.v_max
    one = (ours != 0) != (theirs != 0)
    assert close[one].all(), int((one & ~close).sum())


def same(a, b):
    """Two results of packing, all fields, bit for bit."""
    pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)

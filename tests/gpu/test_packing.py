"""The packing kernels give the reference's K and V bit for bit, given the kernels' means, and nothing leaks in."""

import pytest
import torch

pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")

import wgmma_cases
from kernel_cases import DEVICE, DTYPES, hopper_only, inputs, views
from packing_cases import assert_means, assert_same_bits, assert_tile_means, kv, referenced, same
from wgmma_cases import GEOMETRY

from lowbit_attention import recipe
from lowbit_attention.backends.cuda.packing import PackPlan, pack_kv
from lowbit_attention.recipes.options import SampledTokens
from lowbit_attention.reference.quantize import TINY
from lowbit_attention.reference.smoothing import sampled

pytestmark = hopper_only

PLAIN = recipe("sage2_8b")
RAW = recipe("sage2_8b:smooth_k=false")
SMOOTH = recipe("sage2_8b:smooth_v=true")
SAMPLED = recipe("sage2_8b:smooth_v=true,k_sample=sampled(64)")
TILE_MEANS = recipe("fast_8b")
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
WIDE_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])  # beyond 2¹⁶


@pytest.fixture(scope="module", autouse=True)
def compiled():
    wgmma_cases.compile_everything()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 1000, 4097])
@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [64, 128, 40, 72, 80, 96])
@pytest.mark.parametrize("family", ["normal", "qkv_bias", "sink", "outlier_tokens"])
def test_packed_bits(family, head_dim, dtype, length):
    """K̂, δ_K, V̂, δ_V and the means, smoothing K alone."""
    k, v = (t[:, :, :length].contiguous() for t in kv(family, dtype, length=4097, head_dim=head_dim))
    assert_means(assert_same_bits(k, v, PLAIN), k, v, PLAIN)


@pytest.mark.parametrize("spec", ["smooth_k=false", "smooth_v=true", "v_max=4.5", "v_max=2.25,smooth_v=true"])
@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [64, 128, 36])
@pytest.mark.parametrize("family", ["qkv_bias", "v_mean", "outlier_tokens"])
def test_packed_bits_of_other_recipes(family, head_dim, dtype, spec):
    r = recipe(f"sage2_8b:{spec}")
    k, v = kv(family, dtype, head_dim=head_dim, length=1000)
    packed = assert_same_bits(k, v, r)
    assert_means(packed, k, v, r)
    assert packed.k_mean.any() == r.smooth_k
    assert packed.v_mean.any() == r.smooth_v
    assert float(packed.v.abs().max()) == r.v_max


@pytest.mark.parametrize("dims", [(64, 128), (128, 40), (1, 7), (33, 65)])
def test_packed_bits_of_k_and_v_of_different_widths(dims):
    """Odd numbers of channels, too, which are copied to rows of a multiple of 8."""
    *_, v = inputs("qkv_bias", heads=(2, 2), lengths=(200, 200), head_dims=(dims[1], dims[1]))
    _, k, _ = inputs("qkv_bias", heads=(2, 2), lengths=(200, 200), head_dims=(dims[0], dims[0]))
    assert_means(assert_same_bits(k, v, SMOOTH), k, v, SMOOTH)


@pytest.mark.parametrize(
    ("batch", "heads", "length", "dtype"),
    [
        (1, 1, 200_003, torch.float32),  # 32 splits of one head's statistics
        (1, 3, 20_000, torch.bfloat16),
        (8, 128, 1100, torch.bfloat16),  # 8 tiles a block, and a head's last block has fewer
        (4, 128, 1025, torch.float16),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_bits_of_long_and_of_many_sequences(batch, heads, length, dtype, head_dim):
    generator = torch.Generator(DEVICE).manual_seed(length)
    k, v = (
        torch.randn(batch, heads, length, head_dim, generator=generator, device=DEVICE, dtype=dtype) for _ in range(2)
    )
    k += 3
    assert_means(assert_same_bits(k, v, SMOOTH), k, v, SMOOTH)


@pytest.mark.parametrize("count", [1, 3, 64, 128, 1000, 1024])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 129, 1000, 4097])
@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [64, 128, 40, 72])
def test_packed_bits_with_a_sample_of_k(head_dim, dtype, length, count):
    """k̄ over the reference's choice of tokens, all of them where there are no more; the rest as ever."""
    r = SMOOTH.replace(k_sample=SampledTokens(count))
    family = ("qkv_bias", "normal", "sink", "outlier_tokens")[(length + count) % 4]
    k, v = (t[:, :, :length].contiguous() for t in kv(family, dtype, length=4097, head_dim=head_dim))
    packed = assert_same_bits(k, v, r)
    assert_means(packed, k, v, r)
    if count >= length:
        assert same(packed, pack_kv(k, v, SMOOTH))


@pytest.mark.parametrize(
    ("batch", "heads", "length", "dtype"),
    [(1, 1, 200_003, torch.float32), (1, 24, 4608, torch.bfloat16), (8, 128, 1100, torch.bfloat16)],
)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("count", [64, 128, 1024])
def test_a_sample_of_long_and_of_many_sequences(batch, heads, length, dtype, head_dim, count):
    generator = torch.Generator(DEVICE).manual_seed(length)
    shape = (batch, heads, length, head_dim)
    k, v = (torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype) for _ in range(2))
    k += 3
    r = SMOOTH.replace(k_sample=SampledTokens(count))
    packed = assert_same_bits(k, v, r)
    assert_means(packed, k, v, r)
    assert all(same(pack_kv(k, v, r), packed) for _ in range(3))


@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_a_sample_leaves_out_is_not_read_for_the_mean(head_dim, dtype):
    """NaN in every token but the sample's: the mean has the same bits."""
    k, v = kv("qkv_bias", dtype, head_dim=head_dim, length=1000)
    clean = pack_kv(k, v, SAMPLED)
    k[~sampled(None, SAMPLED.k_sample, k)] = torch.nan
    assert torch.equal(pack_kv(k, v, SAMPLED).k_mean, clean.k_mean)


@WIDE_DTYPES
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_sample_that_knows_nothing_of_the_largest(head_dim, dtype):
    """The largest numbers outside the sample, of the other sign than its mean: finite, and the reference's bits."""
    k, v = kv("qkv_bias", dtype, head_dim=head_dim, length=1000)
    chosen = sampled(None, SAMPLED.k_sample, k)[0, 0]
    token = int((~chosen).nonzero()[70])
    limit = float(torch.tensor(2.0**103).to(dtype))
    below = limit * (1 - 2.0**-6)
    for channel, size in ((2, below), (3, limit), (4, 2.0**126), (5, 1.0)):
        k[..., channel] = size
        k[:, :, token, channel] = -torch.finfo(dtype).max
    packed = assert_same_bits(k, v, SAMPLED)
    assert ((packed.k_mean[..., 2] - below).abs() <= 2.0**-20 * below).all()
    assert not packed.k_mean[..., 3:5].any()
    assert (packed.k_mean[..., 5] == 1).all()
    assert packed.k_scale.isfinite().all()
    assert packed.k_largest_scale.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@EVERY_DTYPE
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_not_finite_beside_and_in_a_sample(inside, dtype, bad):
    """Its group's scale is NaN and the largest one; in the sample it takes its channel's mean away, and no other."""
    k, v = kv("qkv_bias", dtype, head_dim=128)
    clean = pack_kv(k, v, SAMPLED)
    chosen = sampled(None, SAMPLED.k_sample, k)[0, 0]
    token = int((chosen == inside).nonzero()[40])
    k[0, 1, token, 2] = bad
    packed = pack_kv(k, v, SAMPLED)
    mean = clean.k_mean.clone()
    if inside:
        mean[0, 1, 2] = 0
    assert torch.equal(packed.k_mean, mean)
    wrong = torch.zeros_like(packed.k_scale, dtype=torch.bool)
    wrong[0, 1, token // GEOMETRY.b_k * 4 + token % 8 // 2] = True
    assert torch.equal(packed.k_scale.isnan(), wrong)
    assert packed.k_largest_scale.isnan().nonzero().tolist() == [[0, 1]]
    ref = referenced(k, v, SAMPLED, packed)
    assert torch.equal(packed.k_scale[~wrong], ref.k_scale[~wrong])
    good = ~wrong[..., ref.k_group]
    assert torch.equal(packed.k.float()[good], ref.k[good])


def test_keys_of_zeros_with_a_sample():
    """A head of zeros has a largest scale all the same, no more than any group's."""
    k, v = kv("normal", head_dim=64)
    k[1, 2] = 0
    packed = assert_same_bits(k, v, SAMPLED)
    assert not packed.k[1, 2].any()
    assert (packed.k_scale[1, 2] == 1).all()
    assert 0 < float(packed.k_largest_scale[1, 2]) <= TINY / 127 * (1 + 2**-23)


# ---- V's means by tile


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 127, 128, 129, 255, 1000, 4097])
@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [64, 128, 40, 72])
@pytest.mark.parametrize("family", ["normal", "qkv_bias", "drift", "blocky", "sink_v_bias", "outlier_tokens"])
def test_packed_bits_with_means_by_tile(family, head_dim, dtype, length):
    k, v = kv(family, dtype, length=length, head_dim=head_dim)
    packed = assert_same_bits(k, v, TILE_MEANS)
    assert_means(packed, k, v, TILE_MEANS)
    assert_tile_means(packed, k, v, TILE_MEANS)
    assert not packed.v_mean.any()
    if family in ("drift", "blocky") and length >= 255:
        assert (packed.v_tile_means != 0).float().mean() > 0.3


@pytest.mark.parametrize("v_max", [4.5, 9.0, 448.0])
@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_tile_with_a_token_of_tiny_v_keeps_its_means(head_dim, dtype, v_max):
    """The rule is the whole tile's; an eighth of V_r in one channel is enough to be not tiny."""
    r = recipe("sage2_8b:v_tile_means=true").replace(v_max=v_max)  # (the packing takes it, attention does not)
    k, v = kv("normal", dtype, head_dim=head_dim, length=1000)
    v = v.clamp(-3, 3) + 4
    v[:, :, 0] = 7  # every channel's largest
    v[:, :, 200] = 0.01
    v[:, :, 300] = 0.01
    v[:, :, 300, 3] = -0.9  # above 7 / 8
    v[:, :, 999] = 0.01  # in the last tile, which is cut
    packed = assert_same_bits(k, v, r)
    assert_tile_means(packed, k, v, r)
    taken = (packed.v_tile_means != 0).any(dim=-1)
    assert not taken[:, :, 1].any()
    assert not taken[:, :, 7].any()
    assert taken[:, :, [0, 2, 3, 4, 5, 6]].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_is_not_finite_spoils_the_means_of_its_channel_alone(head_dim, dtype, bad):
    k, v = kv("qkv_bias", dtype, head_dim=head_dim)
    v = v + 3
    clean = pack_kv(k, v, TILE_MEANS)
    v[1, 2, 137, 9] = bad
    packed = pack_kv(k, v, TILE_MEANS)
    good = torch.ones_like(packed.v_scale, dtype=torch.bool)
    good[1, 2, 9] = False
    assert torch.equal(packed.v_scale.isnan(), ~good)
    assert not packed.v_tile_means[1, 2, :, 9].any()
    for ours, theirs in ((packed.v_tile_means, clean.v_tile_means), (packed.v, clean.v)):
        where = good[:, :, None].expand_as(ours)
        assert torch.equal(ours[where], theirs[where])
    assert packed.v[1, 2, 137, 9].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("head_dim", [64, 128, 33])
def test_means_by_tile_of_any_strides_and_again(head_dim, dtype):
    k, v = kv("drift", dtype, head_dim=head_dim, length=1100)
    expected = assert_same_bits(k, v, TILE_MEANS)
    k_views, v_views = views(k), views(v)
    for name in k_views:
        assert same(pack_kv(k_views[name], v_views[name], TILE_MEANS), expected), name
    assert all(same(pack_kv(k, v, TILE_MEANS), expected) for _ in range(10))


@pytest.mark.parametrize(("batch", "heads", "length"), [(1, 3, 20_000), (8, 128, 1100), (1, 1, 131_073)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_means_by_tile_of_long_and_of_many_sequences(batch, heads, length, head_dim):
    generator = torch.Generator(DEVICE).manual_seed(length)
    shape = (batch, heads, length, head_dim)
    k, v = (torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    v += torch.linspace(-3, 3, length, device=DEVICE, dtype=torch.bfloat16)[:, None]
    packed = assert_same_bits(k, v, TILE_MEANS)
    assert_tile_means(packed, k, v, TILE_MEANS)


# ---- memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("head_dim", [64, 128, 40, 33])
@pytest.mark.parametrize("r", [SMOOTH, SAMPLED], ids=str)
def test_strides_change_nothing(r, head_dim, dtype):
    """Every view of the same numbers packs to the same bits, also between numbers that are NaN."""
    k, v = kv("qkv_bias", dtype, head_dim=head_dim)
    expected = assert_same_bits(k, v, r)
    k_views, v_views = views(k), views(v)
    for name in k_views:
        assert same(pack_kv(k_views[name], v_views[name], r), expected), name
        assert same(pack_kv(k_views[name], v, r), expected), f"{name}, K only"
        assert same(pack_kv(k, v_views[name], r), expected), f"{name}, V only"


def test_expanded_tensors():
    """A stride of 0: one batch entry for all, one head for all, one token for all."""
    k, v = kv("qkv_bias", head_dim=128)
    for index in ((slice(1),), (slice(None), slice(1)), (slice(None), slice(None), slice(1))):
        expanded = [t[index].expand(t.shape) for t in (k, v)]
        assert same(pack_kv(*expanded, SMOOTH), pack_kv(*(t.contiguous() for t in expanded), SMOOTH))


@pytest.mark.parametrize(("heads", "blocks"), [(1, 8), (12, 8), (24, 4), (64, 2), (150, 1)])
def test_packing_repeats_bit_for_bit(heads, blocks):
    """In clusters of any size."""
    assert PackPlan.of(2, heads, 3001, 128, 128, SMOOTH).statistics.splits == blocks
    generator = torch.Generator(DEVICE).manual_seed(heads)
    shape = (2, heads, 3001, 128)
    k, v = (torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) + 1 for _ in range(2))
    for r in (SMOOTH, SAMPLED):
        first = assert_same_bits(k, v, r)
        assert_means(first, k, v, r)
        assert all(same(pack_kv(k, v, r), first) for _ in range(20))


# ---- numbers at the edges


@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [64, 128])
def test_nothing_to_scale(head_dim, dtype):
    """A channel of zeros in V and a group of zeros in K get the scale 1, never 0 / 0."""
    k, v = kv("normal", dtype, head_dim=head_dim)
    k[:, :, 2:128:8], k[:, :, 3:128:8] = 0, 0  # group 1 of the first 128 keys
    v[:, 1, :, 5] = 0
    packed = assert_same_bits(k, v, RAW)
    assert (packed.k_scale[:, :, 1] == 1).all()
    assert (packed.v_scale[:, 1, 5] == 1).all()
    assert not packed.k[:, :, 2:128:8].any()
    assert not packed.v[:, 1, :, 5].any()


def test_constant_tensors_are_their_means():
    """K and V the same for every token: nothing is left to scale."""
    k, v = (t[:, :, :1].expand(t.shape).contiguous() for t in kv("qkv_bias", length=256))
    packed = assert_same_bits(k, v, SMOOTH)
    assert torch.equal(packed.k_mean, k[:, :, 0].float())  # 256 equal numbers: every sum on the way is exact
    assert torch.equal(packed.v_mean, v[:, :, 0].float())
    assert not packed.k.any()
    assert not packed.v.any()


@WIDE_DTYPES
@pytest.mark.parametrize("head_dim", [64, 128])
def test_groups_too_small_to_scale(head_dim, dtype):
    """Below 2⁻¹¹² a group counts as zeros, from there on it is scaled: 1 / δ would overflow otherwise."""
    k, v = kv("normal", dtype, head_dim=head_dim)
    below = TINY * (1 - torch.finfo(dtype).eps)
    for first, largest in ((0, below), (2, TINY)):  # groups 0 and 1 of the first 128 keys, channels 0 and 1
        for token in (first, first + 1):
            k[:, :, token:128:8] = (k[:, :, token:128:8].float() / 8).clamp(-1, 1).to(dtype) * below
        k[:, :, first, 3] = -largest
        channel = first // 2
        v[..., channel] = (v[..., channel].float() / 8).clamp(-1, 1).to(dtype) * below
        v[:, :, 7, channel] = largest
    packed = assert_same_bits(k, v, RAW)
    assert (packed.k_scale[:, :, 0] == 1).all()
    assert not packed.k[:, :, 0:128:8].any()
    assert (packed.k_scale[:, :, 1] < TINY).all()
    assert (packed.k[:, :, 2, 3] == -127).all()
    assert (packed.v_scale[:, :, 0] == 1).all()
    assert not packed.v[..., 0].any()
    assert (packed.v[:, :, 7, 1] == 448).all()


@WIDE_DTYPES
@pytest.mark.parametrize("r", [SMOOTH, recipe("sage2_8b:smooth_v=true,v_max=2.25")], ids=str)
def test_channels_too_large_to_smooth(r, dtype):
    """From 2¹⁰³ on a mean could make a difference overflow: none is taken, and every number stays finite."""
    k, v = kv("qkv_bias", dtype, head_dim=128)
    for x in (k, v):
        x[..., 3] = 2.0**126
        x[..., 4] = torch.finfo(dtype).max
        x[..., 5] = torch.finfo(dtype).max * (1 - 2 * (torch.arange(x.shape[2], device=x.device) % 2).to(dtype))
        x[..., 6] = 2.0**125  # its sum overflows
        x[..., 7] = 2.0**103
        x[..., 8] = 2.0**102
    packed = assert_same_bits(k, v, r)
    for mean in (packed.k_mean, packed.v_mean):
        assert mean.isfinite().all()
        assert not mean[..., 3:8].any()
        assert (mean[..., 8] == 2.0**102).all()
    assert packed.k_scale.isfinite().all()
    assert packed.v_scale.isfinite().all()
    assert packed.v.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("r", [RAW, SMOOTH], ids=str)
def test_what_is_not_finite_shows_in_its_scale_alone(r, head_dim, dtype, bad):
    """A bad number of K makes its group's scale NaN, one of V its channel's; every other bit is as it should be."""
    k, v = kv("normal", dtype, head_dim=head_dim)
    clean = pack_kv(k, v, r)
    group, channel = 200 // GEOMETRY.b_k * 4 + 200 % 8 // 2, 9
    k[0, 1, 200, 2], v[1, 2, 137, channel] = bad, bad
    packed = pack_kv(k, v, r)
    ref = referenced(k, v, r, packed)

    wrong = torch.zeros_like(packed.k_scale, dtype=torch.bool)
    wrong[0, 1, group] = True
    assert torch.equal(packed.k_scale.isnan(), wrong)
    assert torch.equal(packed.k_scale[~wrong], ref.k_scale[~wrong])
    good_tokens = ~wrong[..., ref.k_group]
    assert torch.equal(packed.k.float()[good_tokens], ref.k[good_tokens])

    wrong = torch.zeros_like(packed.v_scale, dtype=torch.bool)
    wrong[1, 2, channel] = True
    assert torch.equal(packed.v_scale.isnan(), wrong)
    assert torch.equal(packed.v_scale[~wrong], ref.v_scale[:, :, 0][~wrong])
    good = ~wrong[:, :, None].expand_as(packed.v)
    assert torch.equal(packed.v[good], ref.v[good])

    for head in ((0, 0), (0, 2), (1, 0), (1, 1)):  # K and V are clean there
        assert torch.equal(packed.k[head], clean.k[head])
        assert torch.equal(packed.v[head], clean.v[head])
        assert torch.equal(packed.k_mean[head], clean.k_mean[head])

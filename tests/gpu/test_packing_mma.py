"""attention_mma's packed K and V: the reference's bit for bit, in every form, and nothing leaks in."""

import pytest
import torch

pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")

import mma_cases
from kernel_cases import DTYPES, hopper_only, inputs, views
from mma_cases import GEOMETRY
from packing_cases import assert_means, assert_same_bits, kv, referenced, same

from lowbit_attention import recipe
from lowbit_attention.backends.cuda.instances import PackFormat
from lowbit_attention.backends.cuda.packing import pack_kv
from lowbit_attention.reference.quantize import TINY

pytestmark = hopper_only

# (recipe, form) of every kind of tile: bits of a lane, V in E4M3 or FP16, rotated or not
FORMS = {
    "int8 e4m3": ("sage2_8b:smooth_v=true", PackFormat(64, 8, False, False)),
    "int8 fp16": ("int8_fp16:smooth_v=true", PackFormat(64, 8, True, False)),
    "sage1": ("sage1", PackFormat(64, 8, True, False)),
    "int8 rotated": ("sage2_8b:rotation=hadamard", PackFormat(64, 8, False, True)),
    "4 bits in int8": ("sage2_4b", PackFormat(64, 8, False, False)),
    "4 bits in int8, rotated": ("rotated_4b", PackFormat(64, 8, False, True)),
    "int4": ("sage2pp_4b:smooth_v=true", PackFormat(64, 4, False, False)),
    "int4 per block": ("sage2_v1_4b", PackFormat(64, 4, False, False)),
    "int4 rotated": ("rotated_4b:smooth_v=true", PackFormat(64, 4, False, True)),
    "int4 unsmoothed": ("hadamard_attn", PackFormat(64, 4, False, True)),
    "int8 e4m3, a sample": ("sage2_8b:k_sample=sampled(64)", PackFormat(64, 8, False, False)),
    "int4 rotated, a sample": ("rotated_4b:k_sample=sampled(64)", PackFormat(64, 4, False, True)),
}
EVERY_FORM = pytest.mark.parametrize("name", FORMS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
WIDE_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])  # beyond 2¹⁶
# raw: neither K nor V smoothed, so that a test knows what is scaled
RAW = {
    "int8": (recipe("sage2_8b:smooth_k=false"), FORMS["int8 e4m3"][1]),
    "int8 fp16": (recipe("int8_fp16:smooth_k=false"), FORMS["int8 fp16"][1]),
    "int4": (recipe("sage2_4b:smooth_q=false,smooth_k=false"), FORMS["int4"][1]),
}
EVERY_RAW = pytest.mark.parametrize(("r", "form"), RAW.values(), ids=RAW)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    mma_cases.compile_everything()


def form_of(name):
    """The recipe and the form of a name in `FORMS`."""
    spec, form = FORMS[name]
    r = recipe(spec)
    assert form.rotate == (r.rotation == "hadamard")
    assert form.v_half == (r.pv_format == "fp16")
    return r, form


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129, 1000, 4097])
@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [64, 128, 40, 72])
@EVERY_FORM
def test_packed_bits(name, head_dim, dtype, length):
    """K̂, δ_K, V̂, δ_V and the means."""
    r, form = form_of(name)
    family = ("normal", "qkv_bias", "sink", "outlier_tokens")[(length + head_dim) % 4]
    k, v = (t[:, :, :length].contiguous() for t in kv(family, dtype, length=4097, head_dim=head_dim))
    packed = assert_same_bits(k, v, r, form)
    assert_means(packed, k, v, r)
    assert int(packed.k.abs().max()) <= r.qk_max
    assert packed.k_scale.shape[2] == -(-length // 64) * (1 if r.name in ("sage1", "sage2_v1_4b") else 4)


@pytest.mark.parametrize("dims", [(64, 128), (128, 40), (1, 7), (33, 65)])
@pytest.mark.parametrize("name", [n for n, (_, form) in FORMS.items() if not form.rotate])
def test_packed_bits_of_k_and_v_of_different_widths(name, dims):
    """Odd numbers of channels, too, which are copied to rows of a multiple of 8."""
    r, form = form_of(name)
    *_, v = inputs("qkv_bias", heads=(2, 2), lengths=(200, 200), head_dims=(dims[1], dims[1]))
    _, k, _ = inputs("qkv_bias", heads=(2, 2), lengths=(200, 200), head_dims=(dims[0], dims[0]))
    assert_means(assert_same_bits(k, v, r, form), k, v, r)


@pytest.mark.parametrize("head_dim", [36, 65, 127])
@pytest.mark.parametrize("name", ["int8 rotated", "int4 rotated"])
def test_a_rotation_fills_the_padding(name, head_dim):
    """Channels that are padding before the rotation are not after it."""
    r, form = form_of(name)
    k, v = kv("qkv_bias", head_dim=head_dim)
    packed = assert_same_bits(k, v, r, form)
    assert packed.k.shape[3] == (64 if head_dim <= 64 else 128)
    assert packed.k[..., head_dim:].any()


@pytest.mark.parametrize(
    ("batch", "heads", "length", "dtype"),
    [
        (1, 1, 200_003, torch.float32),  # 32 splits of one head's statistics
        (8, 128, 1100, torch.bfloat16),  # several tiles a block, and a head's last block has fewer
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["int8 e4m3", "int8 fp16", "int4 rotated"])
def test_packed_bits_of_long_and_of_many_sequences(name, batch, heads, length, dtype, head_dim):
    r, form = form_of(name)
    generator = torch.Generator(mma_cases.kernel_cases.DEVICE).manual_seed(length)
    shape = (batch, heads, length, head_dim)
    k, v = (torch.randn(shape, generator=generator, device=generator.device, dtype=dtype) for _ in range(2))
    k += 3
    assert_means(assert_same_bits(k, v, r, form), k, v, r)


# ---- memory


@WIDE_DTYPES
@pytest.mark.parametrize("head_dim", [64, 128, 40, 33])
@EVERY_FORM
def test_strides_change_nothing(name, head_dim, dtype):
    """Every view of the same numbers packs to the same bits, also between numbers that are NaN."""
    r, form = form_of(name)
    k, v = kv("qkv_bias", dtype, head_dim=head_dim)
    expected = assert_same_bits(k, v, r, form)
    k_views, v_views = views(k), views(v)
    for view in k_views:
        assert same(pack_kv(k_views[view], v_views[view], r, form, "sm_90"), expected), view


@EVERY_FORM
def test_packing_repeats_bit_for_bit(name):
    r, form = form_of(name)
    k, v = kv("qkv_bias", heads=8, length=3001, head_dim=128)
    first = pack_kv(k, v, r, form, "sm_90")
    assert all(same(pack_kv(k, v, r, form, "sm_90"), first) for _ in range(20))


# ---- numbers at the edges


@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [64, 128])
@EVERY_RAW
def test_nothing_to_scale(r, form, head_dim, dtype):
    """A channel of zeros in V and a group of zeros in K get the scale 1, never 0 / 0."""
    k, v = kv("normal", dtype, head_dim=head_dim)
    k[:, :, 2:64:8], k[:, :, 3:64:8] = 0, 0  # group 1 of the first 64 keys
    v[:, 1, :, 5] = 0
    packed = assert_same_bits(k, v, r, form)
    assert (packed.k_scale[:, :, 1] == 1).all()
    assert (packed.v_scale[:, 1, 5] == 1).all()
    assert not packed.k[:, :, 2:64:8].any()
    assert not packed.v[:, 1, :, 5].any()


@EVERY_FORM
def test_constant_tensors_are_their_means(name):
    """K and V the same for every token: nothing is left to scale."""
    r, form = form_of(name)
    k, v = (t[:, :, :1].expand(t.shape).contiguous() for t in kv("qkv_bias", length=256))
    packed = assert_same_bits(k, v, r, form)
    if r.smooth_k:  # 256 equal numbers: every sum on the way is exact
        assert torch.equal(packed.k_mean, k[:, :, 0].float())
        assert not packed.k.any()
    if r.smooth_v:
        assert torch.equal(packed.v_mean, v[:, :, 0].float())
        assert not packed.v.any()


@WIDE_DTYPES
@pytest.mark.parametrize("head_dim", [64, 128])
@EVERY_RAW
def test_groups_too_small_to_scale(r, form, head_dim, dtype):
    """Below 2⁻¹¹² a group counts as zeros, from there on it is scaled: 1 / δ would overflow otherwise."""
    k, v = kv("normal", dtype, head_dim=head_dim)
    below = TINY * (1 - torch.finfo(dtype).eps)
    for first, largest in ((0, below), (2, TINY)):  # groups 0 and 1 of the first 64 keys, channels 0 and 1
        for token in (first, first + 1):
            k[:, :, token:64:8] = (k[:, :, token:64:8].float() / 8).clamp(-1, 1).to(dtype) * below
        k[:, :, first, 3] = -largest
        channel = first // 2
        v[..., channel] = (v[..., channel].float() / 8).clamp(-1, 1).to(dtype) * below
        v[:, :, 7, channel] = largest
    packed = assert_same_bits(k, v, r, form)
    assert (packed.k_scale[:, :, 0] == 1).all()
    assert not packed.k[:, :, 0:64:8].any()
    assert (packed.k_scale[:, :, 1] < TINY).all()
    assert (packed.k[:, :, 2, 3] == -r.qk_max).all()
    assert (packed.v_scale[:, :, 0] == 1).all()
    assert not packed.v[..., 0].any()
    assert packed.v[:, :, 7, 1].all()


@WIDE_DTYPES
@pytest.mark.parametrize("name", ["int8 e4m3", "int8 fp16", "int4", "int8 rotated", "int4 rotated"])
def test_channels_too_large_to_smooth(name, dtype):
    """From 2¹⁰³ on a mean could make a difference overflow: none is taken, and every number stays finite."""
    r, form = form_of(name)
    r = r.replace(smooth_v=True)
    k, v = kv("qkv_bias", dtype, head_dim=128)
    for x in (k, v):
        x[..., 3] = 2.0**126
        x[..., 4] = torch.finfo(dtype).max
        x[..., 5] = torch.finfo(dtype).max * (1 - 2 * (torch.arange(x.shape[2], device=x.device) % 2).to(dtype))
        x[..., 6] = 2.0**125  # its sum overflows
        x[..., 7] = 2.0**103
        x[..., 8] = 2.0**102
    packed = assert_same_bits(k, v, r, form)
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
@pytest.mark.parametrize("name", ["int8 e4m3", "int8 fp16", "sage1", "int8 rotated", "int4", "int4 rotated"])
def test_what_is_not_finite_shows_in_its_scale_alone(name, head_dim, dtype, bad):
    """A bad number of K makes its group's scale NaN, one of V its channel's; every other bit is as it should be."""
    r, form = form_of(name)
    k, v = kv("normal", dtype, head_dim=head_dim)
    clean = pack_kv(k, v, r, form, "sm_90")
    group = int(r.k_granularity.k_group(torch.tensor([200]), GEOMETRY))
    channel = 9
    k[0, 1, 200, 2], v[1, 2, 137, channel] = bad, bad
    packed = pack_kv(k, v, r, form, "sm_90")
    ref = referenced(k, v, r, packed, form)

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

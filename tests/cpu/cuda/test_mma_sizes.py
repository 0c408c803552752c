"""What attention_mma's host and device must agree on, and what a card must have room for."""

import itertools
import math
from fractions import Fraction

import c_structs
import pytest
import torch
from c_structs import layout, read
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_attention import RECIPES
from lowbit_attention.backends.cuda import smooth_q
from lowbit_attention.backends.cuda.configs import SHARED_KIB
from lowbit_attention.backends.cuda.instances import (
    DTYPE_CODES,
    HEAD_DIMS,
    MANIFEST,
    MMA_ARCHS,
    MMA_GEOMETRY,
    MMA_RECIPES,
    MmaConfig,
    PackFormat,
    mask_instance,
    mma_config,
    mma_recipes,
    pack_instance,
    sequences_instance,
    smooth_q_instance,
)
from lowbit_attention.backends.cuda.packing import PackPlan
from lowbit_attention.backends.cuda.schedule import divisor, log2_rounded_down
from lowbit_attention.backends.cuda.smooth_q import delta_chunk

FILE = "mma/block.cuh"


def configs():
    """Every configuration that a named recipe, or one with another option, can ask for, by arch."""
    changes = ({}, {"smooth_q": True}, {"smooth_q": False}, {"rotation": "hadamard"})
    found = {}
    for arch, dim, change, int4 in itertools.product(MMA_ARCHS, HEAD_DIMS, changes, (None, True)):
        for name in mma_recipes(arch):
            config = mma_config(RECIPES[name].replace(**change), dim, arch, int4)
            found[config] = None
    return list(found)


CONFIGS = configs()


def constants_of(config):
    """The device's constants with the macros of an instance."""
    constants = c_structs.constants_of(config.instance())
    for part in ("tile/swizzle.cuh", "tile/strided.cuh", FILE):
        read(part, constants)
    return constants


# ---- shared memory


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.arch == "sm_89"], ids=str)
def test_shared_memory_is_what_the_kernels_struct_takes(config):
    constants = constants_of(config)
    flat, size, _ = layout(FILE, "Shared", constants)
    offsets = {member: offset for member, offset, _ in flat}
    assert config.shared_bytes == constants["kSharedBytes"] == size
    assert config.q_rows == constants["kRows"]
    assert config.threads == constants["kThreads"]
    assert config.groups == constants["kGroups"]
    # an exclusive or of an address with up to 224 bytes stays inside a tile only if that begins at a multiple of 256
    stage, stage_bytes, _ = layout(FILE, "Stage", constants)
    starts = {member: offset for member, offset, _ in stage}
    assert starts["k"] % 256 == starts["v"] % 256 == stage_bytes % 256 == 0
    assert offsets["q"] % 256 == 0
    assert stage_bytes == config.form.k_bytes(config.head_dim) + config.form.v_bytes(config.head_dim) + (
        4 * MMA_GEOMETRY.b_k * config.groups if config.smooth_q else 0
    )


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_as_many_thread_blocks_fit_as_the_kernel_is_compiled_for(config):
    """Two of 128 threads, or one of 256: eight warps a multiprocessor by registers, so by shared memory, too."""
    room = SHARED_KIB[config.arch] * 1024
    blocks = 2 if config.threads == 128 else 1
    assert config.threads * blocks == 256
    assert config.shared_bytes <= room - 1024
    assert blocks * (config.shared_bytes + 1024) <= room
    assert constants_of(config)["kBlocks"] == blocks


# ---- packed tiles


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.arch == "sm_89"], ids=str)
def test_a_record_is_the_kernels_struct(config):
    constants = constants_of(config)
    flat, size, _ = layout(FILE, "PackedTile", constants)
    offsets = {member: offset for member, offset, _ in flat}
    form, dim = config.form, config.head_dim
    assert form == PackFormat(64, config.qk_lanes, config.v_half, config.rotate)
    assert form.is_record
    assert offsets == {
        "k": 0,
        "v": form.k_bytes(dim),
        "k_scale": form.k_bytes(dim) + form.v_bytes(dim),
        "unused": form.k_bytes(dim) + form.v_bytes(dim) + 16,
    }
    assert form.record_bytes(dim) == size
    assert size % 128 == 0
    assert form.k_bytes(dim) == 64 * dim * config.qk_lanes // 8
    assert form.v_bytes(dim) == 64 * dim * (2 if config.v_half else 1)


FORMS = [PackFormat(64, bits, half) for bits in (8, 4) for half in (False, True)]
SIZES = {
    "batch": st.integers(1, 16),
    "kv_heads": st.integers(1, 128),
    "form": st.sampled_from(FORMS),
}


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    kv_len=st.one_of(st.integers(1, 1500), st.integers(1, 300_000)),
    head_dim=st.integers(1, 128),
    v_head_dim=st.integers(1, 128),
    **SIZES,
)
def test_a_plan_holds_everything_and_nothing_twice(batch, kv_heads, kv_len, head_dim, v_head_dim, form):
    plan, heads = (
        PackPlan.of(batch, kv_heads, kv_len, head_dim, v_head_dim, RECIPES["sage2_8b"], form),
        batch * kv_heads,
    )
    assert plan.dim in HEAD_DIMS
    assert plan.dim >= max(head_dim, v_head_dim)
    assert plan.tiles == -(-kv_len // 64)
    record = form.record_bytes(plan.dim)
    layout, statistics = plan.layout, plan.statistics
    assert layout.k_stride == layout.v_stride == 4 * layout.k_scale_stride == record
    assert layout.v_tiles - layout.k_tiles == form.k_bytes(plan.dim)
    assert layout.k_scales - layout.v_tiles == form.v_bytes(plan.dim)
    channels = heads * plan.dim * 4
    parts = {
        "k_tiles": heads * plan.tiles * record,
        "k_mean": channels,
        "k_largest_scale": heads * 4,
        "v_scale": channels,
        "v_mean": channels,
        "partials": 2 * heads * statistics.splits * 3 * plan.dim * 4,
    }
    spans = sorted((getattr(layout, name), getattr(layout, name) + size) for name, size in parts.items())
    assert spans[0][0] == 0
    assert all(start % 256 == 0 for start, _ in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1][1] <= layout.size
    # statistics: every token in one split, none empty
    assert (statistics.splits - 1) * statistics.tokens_a_split < kv_len <= statistics.splits * statistics.tokens_a_split
    # packing: every tile in one block, none empty; the threads of a block pack so many tiles of E4M3 at once
    blocks, *rest = plan.grid
    assert rest == [heads, 2]
    assert (blocks - 1) * plan.tiles_a_block < plan.tiles <= blocks * plan.tiles_a_block
    assert plan.tiles_a_block % (128 * 16 * 8 // (plan.dim * 64)) == 0


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    kv_len=st.one_of(st.integers(1024, 5000), st.integers(1024, 300_000)), head_dim=st.sampled_from(HEAD_DIMS), **SIZES
)
def test_a_workspace_is_little_more_than_packed_k_and_v(batch, kv_heads, kv_len, head_dim, form):
    """At most a fifth more than K's and V's own numbers: the last tile's padding, scales, partial sums."""
    plan = PackPlan.of(batch, kv_heads, kv_len, head_dim, head_dim, RECIPES["sage2_8b"], form)
    numbers = batch * kv_heads * kv_len * head_dim * (form.k_lanes + (16 if form.v_half else 8)) // 8
    assert plan.layout.size <= 1.2 * numbers


# ---- ΔS in pieces


@settings(deadline=None, derandomize=True, max_examples=1000)
@given(
    heads=st.integers(1, 5000),
    q_blocks=st.integers(1, 5000),
    block_bytes=st.integers(256, 1 << 26),
    most_bytes=st.integers(1, 1 << 34),
)
def test_a_chunk_of_delta_is_as_large_as_may_be(heads, q_blocks, block_bytes, most_bytes):
    """Whole heads, or a part of one; within the limit, if one block is; and no head or block more would be."""
    many, levels = delta_chunk(heads, q_blocks, block_bytes, most_bytes)
    assert 1 <= many <= heads
    assert 1 <= levels <= q_blocks
    assert many == 1 or levels == q_blocks
    held = many * levels * block_bytes
    assert held <= max(most_bytes, block_bytes)
    if levels < q_blocks:
        assert held + block_bytes > most_bytes
    elif many < heads:
        assert held + q_blocks * block_bytes > most_bytes


@pytest.mark.parametrize(("heads", "length"), [(24, 119_056), (1, 1_000_000), (32, 4096), (64, 131_072)])
@pytest.mark.parametrize("bits", [4, 8])
def test_delta_of_real_sizes(heads, length, bits):
    """At most max(64 MiB, a quarter of packed K and V); 24 heads × 119,056 tokens would take 10.6 GB at once."""
    config = MmaConfig("sm_89", 128, qk_lanes=bits, smooth_q=True)
    pack = PackPlan.of(1, heads, length, 128, 128, RECIPES["sage2_4b"], config.form)
    q_blocks, block_bytes = -(-length // config.q_rows), config.groups * pack.tiles * 64 * 4
    most = max(smooth_q._MOST_DELTA_BYTES, pack.layout.size // 4)
    assert smooth_q._MOST_DELTA_BYTES == 64 << 20
    many, levels = delta_chunk(heads, q_blocks, block_bytes, most)
    held, whole = many * levels * block_bytes, heads * q_blocks * block_bytes
    assert held <= most
    assert most <= max(64 << 20, 1.01 * heads * pack.tiles * config.form.record_bytes(128) / 4)
    if (heads, length) == (24, 119_056):
        assert round(whole / 1e9, 1) == 10.6
    assert held * 2 > min(whole, most)  # (no more launches than that takes)


# ---- divisions by multiplication


def check_division(d, n):
    by = divisor(d)
    multiplier, shift = by.multiplier, by.shift
    assert 0 <= multiplier < 1 << 32
    assert n * multiplier < 1 << 64  # (the device multiplies 64-bit numbers)
    assert n * multiplier >> shift == n // d


@settings(deadline=None, derandomize=True, max_examples=3000)
@given(
    d=st.one_of(st.integers(1, 1 << 12), st.integers(1, (1 << 31) - 1)),
    n=st.one_of(st.integers(0, 1 << 12), st.integers(0, (1 << 31) - 1)),
)
def test_a_division_is_a_multiplication(d, n):
    check_division(d, n)


@pytest.mark.parametrize("d", [1, 2, 3, 5, 7, 127, 128, 129, 641, (1 << 16) - 1, 1 << 30, (1 << 30) + 1, (1 << 31) - 1])
def test_a_division_is_a_multiplication_at_its_edges(d):
    """Beside every multiple's edge, where a quotient changes."""
    largest = (1 << 31) - 1
    for quotient in {0, 1, 2, largest // d // 2, largest // d - 1, largest // d}:
        for n in (quotient * d - 1, quotient * d, quotient * d + 1):
            if 0 <= n <= largest:
                check_division(d, n)
    check_division(d, largest)


@pytest.mark.parametrize("p_max", [1.0, 28.0, 56.0, 112.0, 224.0, 431.5, 448.0, 2.0**15])
def test_log2_is_never_above(p_max):
    """2^(log2 P_r) ≤ P_r, and less than an ulp of the logarithm below."""
    found = log2_rounded_down(p_max)
    assert found == float(torch.tensor(found))  # a float32
    assert found <= math.log2(p_max)
    assert math.log2(p_max) - found < 2.0**-20
    if p_max in (1.0, 2.0**15):
        assert Fraction(found) == round(math.log2(p_max))


# ---- the manifest


def expected_instances():
    """By arch: every named recipe's attention, packing and smooth-Q kernels, with every mask and for sequences."""
    found = set()
    for arch in MMA_ARCHS:
        names = [n for n in MMA_RECIPES if not (arch in ("sm_80", "sm_86") and RECIPES[n].pv_format == "e4m3")]
        dtypes = DTYPE_CODES if arch == "sm_90" else (torch.float16, torch.bfloat16)
        found |= {mask_instance(MMA_GEOMETRY.b_k, arch), sequences_instance(arch)}
        int4s, masks = (None, True) if arch == "sm_90" else (None,), ("none", "keys", "bits", "bias", "sequences")
        for name, dim, int4, mask in itertools.product(names, HEAD_DIMS, int4s, masks):
            if mask == "sequences" and RECIPES[name].smooth_q:
                continue  # (they go one by one)
            config = mma_config(RECIPES[name], dim, arch, int4, mask)
            found.add(config.instance())
            found |= {pack_instance(dim, dtype, arch, config.form) for dtype in dtypes}
            if RECIPES[name].smooth_q:
                found |= {smooth_q_instance(dim, dtype, arch, config.form.mask) for dtype in dtypes}
    return found


def test_the_manifest_has_what_named_recipes_ask_for_and_no_more():
    ours = [i for i in MANIFEST if i.arch in MMA_ARCHS]
    assert len(ours) == len(set(ours))
    expected = expected_instances()
    missing, extra = sorted(map(str, expected - set(ours))), sorted(map(str, set(ours) - expected))
    assert not missing
    assert not extra


def test_the_manifest_covers_every_recipe_where_it_runs():
    """Written out: an arch without FP8 has the two recipes that need none."""
    by_arch = {arch: set(mma_recipes(arch)) for arch in MMA_ARCHS}
    assert by_arch["sm_80"] == by_arch["sm_86"] == {"sage1", "int8_fp16"}
    for arch in ("sm_89", "sm_90", "sm_100", "sm_120"):
        assert by_arch[arch] == {
            "sage1", "sage2_v1_4b", "sage2_8b", "sage2_4b", "sage2pp_8b", "sage2pp_4b", "hadamard_attn", "rotated_4b",
            "int8_fp16",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "name", "lanes", "mma_names"),
    [
        ("sm_80", "sage1", 8, ("IMMA.16832.S8.S8", "HMMA.16816.F16")),
        ("sm_86", "int8_fp16", 8, ("IMMA.16832.S8.S8", "HMMA.16816.F32")),
        ("sm_89", "sage2_8b", 8, ("IMMA.16832.S8.S8", "QMMA.16832.F32.E4M3.E4M3")),
        ("sm_89", "sage2pp_8b", 8, ("IMMA.16832.S8.S8", "QMMA.16832.F16.E4M3.E4M3")),
        ("sm_89", "rotated_4b", 4, ("IMMA.16864.S4.S4", "QMMA.16832.F16.E4M3.E4M3")),
        ("sm_90", "sage2_4b", 8, ("IMMA.16832.S8.S8", "HMMA.16816.F32")),
        ("sm_100", "sage2pp_4b", 8, ("IMMA.16832.S8.S8", "HMMA.16816.F16")),
        ("sm_120", "sage2pp_4b", 8, ("IMMA.16832.S8.S8", "QMMA.16832.F16.E4M3.E4M3")),
    ],
)
def test_the_instructions_are_the_cards_own_where_it_has_them(arch, name, lanes, mma_names):
    """INT4 on Ampere and Ada alone; FP8 on Ada and consumer Blackwell; elsewhere others, which `explain` says."""
    config = mma_config(RECIPES[name], 128, arch)
    assert config.qk_lanes == lanes
    assert config.instance().mma == mma_names
    limit = config.instance().spill_limit
    assert limit == 0 or arch in ("sm_90", "sm_100")

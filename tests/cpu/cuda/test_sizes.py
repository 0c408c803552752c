"""Sizes that host and device must agree on: shared memory, and the parts of a workspace."""

import itertools
import re

import pytest
import torch
from c_structs import constants_of, layout, read
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_attention import RECIPES, recipe
from lowbit_attention.backends.cuda import hopper, packing
from lowbit_attention.backends.cuda.instances import (
    HEAD_DIMS,
    TILE_KEYS,
    WGMMA_FORMAT,
    PackFormat,
    WgmmaConfig,
    pack_instance,
    wgmma_config,
)
from lowbit_attention.backends.cuda.packing import PackPlan, statistics_bytes
from lowbit_attention.recipes.options import AllTokens, SampledTokens
from lowbit_attention.reference.smoothing import sampled


def pack_constants(head_dim=128, dtype=torch.float16, form=WGMMA_FORMAT):
    """What an instance of the packing kernels knows."""
    return constants_of(pack_instance(head_dim, dtype, "sm_90a", form))


PACK_MEANS = pack_constants(form=PackFormat(v_tile_means=True))


def wgmma_constants(config):
    """What an instance of the Hopper kernel knows."""
    return constants_of(config.instance())


WITH_MEANS = wgmma_config(recipe("fast_8b"), 128, torch.float16)
WITHOUT = wgmma_config(recipe("sage2_8b"), 128, torch.float16)


@pytest.mark.parametrize(
    ("file", "name", "constants", "more"),
    [
        ("pack/statistics.cuh", "PackArgs", pack_constants(), PACK_MEANS),
        ("hopper/block.cuh", "AttentionArgs", wgmma_constants(WITHOUT), wgmma_constants(WITH_MEANS)),
    ],
)
def test_arguments_for_means_by_tile_come_last(file, name, constants, more):
    """An instance without them reads the same bytes."""
    without, _, _ = layout(file, name, dict(constants))
    whole, _, _ = layout(file, name, constants | more)
    assert whole[: len(without)] == without
    jumps = ["jump", "jump_bits"] if name == "AttentionArgs" else []
    assert [member for member, _, _ in whole[len(without) :]] == ["v_tile_means", *jumps]


SUPPORTED = [name for name, r in RECIPES.items() if not hopper._recipe_reasons(r)]
SUPPORTED += ["fast_8b:keys_per_promotion=256", "fast_8b:smooth_v=true,v_tile_means=false"]


@pytest.mark.parametrize("mask", ["none", "keys", "bits"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", SUPPORTED)
def test_shared_memory_is_what_the_kernels_struct_takes(name, head_dim, dtype, mask):
    config, file = wgmma_config(recipe(name), head_dim, dtype, mask), "hopper/block.cuh"
    constants = wgmma_constants(config)
    for part in ("tile/swizzle.cuh", "tile/strided.cuh"):
        read(part, constants)
    flat, size, alignment = layout(file, "Shared", constants)
    offsets = {}
    for member, offset, _ in flat:
        offsets.setdefault(member.partition(".")[0], offset)  # (of a struct: its first member's)
    assert config.shared_bytes == constants["kSharedBytes"] == size
    first = {"barriers": "full"}  # (of several members)
    assert config.shared.offsets == {name: offsets[first.get(name, name)] for name in config.shared.offsets}
    assert size <= 227 * 1024  # an SM's 228 KiB less the 1 KiB that every thread block pays
    assert alignment == 1024
    assert all(offsets[member] % 1024 == 0 for member in ("k", "v", "q"))  # where a swizzle's pattern begins
    assert TILE_KEYS * head_dim % 1024 == 0  # … and of the stages that follow, and of Q's second warpgroup
    assert constants["kRows"] * head_dim % 1024 == 0
    for member in ("k_scale", "v_scale", "v_mean", "tile_means"):
        assert offsets.get(member, 0) % 16 == 0  # a bulk copy's destination
    assert ("tile_means" in offsets) == config.tile_means
    assert ("tile_block" in offsets) == (mask == "bits")
    assert config.q_rows == constants["kConsumers"] * constants["kRows"]
    assert config.threads == constants["kThreads"]
    assert config.geometry.b_q == constants["kRows"]
    assert constants["kTileKeys"] == TILE_KEYS


# ---- the plan of packing

RECIPE = RECIPES["sage2_8b"]
PARTS = (
    *("k_tiles", "v_tiles", "k_scales", "k_mean", "k_largest_scale", "v_scale", "v_mean", "v_inverse", "v_tile_means"),
)


CONSTANTS = pack_constants()
read("pack/statistics.cuh", CONSTANTS)


def part_sizes(plan, heads):
    """Bytes that the kernels' comments give each part."""
    tiles, channels = heads * plan.tiles * TILE_KEYS * plan.dim, heads * plan.dim * 4
    scales = heads * plan.tiles * (TILE_KEYS // WgmmaConfig.geometry.b_k) * 4 * 4  # four a key tile of the geometry
    means = heads * plan.tiles * plan.dim * 2 * plan.recipe.v_tile_means
    sizes = (tiles, tiles, scales, channels, heads * 4, channels, channels, channels, means)
    return dict(zip(PARTS, sizes, strict=True))


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    batch=st.integers(1, 16),
    kv_heads=st.integers(1, 128),
    kv_len=st.one_of(st.integers(1, 1500), st.integers(1, 300_000)),
    head_dim=st.integers(1, 128),
    v_head_dim=st.integers(1, 128),
    used=st.sampled_from((RECIPE, recipe("fast_8b").replace(k_sample=AllTokens()))),
)
def test_a_plan_holds_everything_and_nothing_twice(batch, kv_heads, kv_len, head_dim, v_head_dim, used):
    plan = PackPlan.of(batch, kv_heads, kv_len, head_dim, v_head_dim, used)
    heads = batch * kv_heads
    assert plan.dim in HEAD_DIMS
    assert plan.dim >= max(head_dim, v_head_dim)

    sizes = part_sizes(plan, heads)
    spans = sorted((getattr(plan.layout, name), getattr(plan.layout, name) + sizes[name]) for name in PARTS)
    assert plan.form.v_tile_means == used.v_tile_means
    assert all(start % 256 == 0 for start, _ in spans)
    assert spans[0][0] == 0
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1][1] <= plan.layout.size

    # statistics: every token in one split, none empty; the splits are a cluster, whose first block has room for all
    statistics = plan.statistics
    assert statistics.blocks == 2 * heads * statistics.splits
    assert statistics.cluster == statistics.splits
    assert (statistics.splits - 1) * statistics.tokens_a_split < kv_len <= statistics.splits * statistics.tokens_a_split
    assert statistics.k_tokens == kv_len
    assert statistics.splits in (1, 2, 4, 8)
    assert statistics.splits <= CONSTANTS["kMostClusterSplits"] == packing._MOST_CLUSTER_SPLITS
    # packing: every tile in one block, none empty; V's threads pack 128 / dim tiles at once
    assert plan.tiles == -(-kv_len // TILE_KEYS)
    blocks, *rest = plan.grid
    assert rest == [heads, 2]
    assert (blocks - 1) * plan.tiles_a_block < plan.tiles <= blocks * plan.tiles_a_block
    assert plan.tiles_a_block % (128 // plan.dim) == 0


# ---- a sample of K

(PLACE,) = re.findall(
    r"int sampled_token\(int i, int tokens, int step, int rest\) \{\s*return (.+) \+ u32\((.+)\) / u32\((.+)\);\s*\}",
    read("pack/statistics.cuh", None),
)
"""The terms a, b, c of a + b / c, the kernel's place of a sample's i-th token."""


def place(i, kv_len, tokens):
    """`PLACE` with numbers, none beyond 31 bits."""
    step, rest = divmod(kv_len, tokens)
    names = {"i": i, "tokens": tokens, "step": step, "rest": rest}
    first, above, below = (eval(term, {"__builtins__": {}}, names) for term in PLACE)
    assert max(first, above, below) < 1 << 31
    return first + above // below


@settings(deadline=None, derandomize=True, max_examples=2000)
@given(data=st.data(), kv_len=st.one_of(st.integers(1, 3000), st.integers(1, 1 << 30)), count=st.integers(1, 1024))
def test_the_kernels_place_of_a_sampled_token(data, kv_len, count):
    tokens = min(count, kv_len)
    i = data.draw(st.one_of(st.sampled_from((0, tokens - 1)), st.integers(0, tokens - 1)))
    assert place(i, kv_len, tokens) == (2 * i + 1) * kv_len // (2 * tokens)


@pytest.mark.parametrize("kv_len", [1, 2, 63, 64, 65, 127, 128, 129, 1000, 4608])
@pytest.mark.parametrize("count", [1, 3, 64, 128, 1024])
@pytest.mark.parametrize("heads", [1, 3, 40, 600])
def test_a_sample_is_the_references(kv_len, count, heads):
    """Every token that the reference takes, at the kernel's place; and a block for every head, in whole clusters."""
    of_some = RECIPE.replace(k_sample=SampledTokens(count))
    plan = PackPlan.of(1, heads, kv_len, 128, 128, of_some)
    statistics = plan.statistics
    tokens = statistics.k_tokens
    found = [i if tokens == kv_len else place(i, kv_len, tokens) for i in range(tokens)]
    expected = sampled(None, of_some.k_sample, torch.zeros(1, 1, kv_len, 1))[0, 0].nonzero().flatten().tolist()
    assert found == expected
    of_k = statistics.blocks - heads * statistics.splits
    assert statistics.blocks % statistics.cluster == 0
    assert heads <= of_k < heads + statistics.cluster if tokens < kv_len else of_k == heads * statistics.splits


@pytest.mark.parametrize("kv_len", [1, 64, 129, 1000])
@pytest.mark.parametrize("count", [1, 3, 128, 1024])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_a_sample_of_seen_keys_is_the_references(kv_len, count, share):
    """Of the keys that some query sees, listed in their order (`Keys::counted`)."""
    seen = torch.rand(kv_len, generator=torch.Generator().manual_seed(kv_len)) < share
    listed = seen.nonzero().flatten().tolist()
    tokens = min(count, kv_len, len(listed))
    found = [listed[place(i, len(listed), tokens)] for i in range(tokens)]
    expected = sampled(seen[None, None], SampledTokens(count), torch.zeros(1, 1, kv_len, 1))
    assert found == expected[0, 0].nonzero().flatten().tolist()
    source = read("pack/statistics.cuh", None)
    assert "tokens = min(args.k_tokens, keys.count)" in source
    assert "keys.counted(sampled_token(i, tokens, step, rest))" in source


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shared_memory_of_the_statistics(dtype, head_dim):
    constants = pack_constants(head_dim, dtype)
    for part in ("tile/strided.cuh", "pack/statistics.cuh"):
        read(part, constants)
    batch, batches, threads = (constants[name] for name in ("kBatch", "kBatches", "kStatisticsThreads"))
    copies = batches * batch * threads * 8 * dtype.itemsize
    lanes = 3 * constants["kLanes"] * head_dim * 4
    of_splits = 3 * constants["kMostClusterSplits"] * head_dim * 4
    assert statistics_bytes(head_dim, dtype) == max(copies, lanes) + of_splits <= 48 * 1024


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    batch=st.integers(1, 16),
    kv_heads=st.integers(1, 128),
    kv_len=st.one_of(st.integers(1024, 5000), st.integers(1024, 300_000)),
    head_dim=st.sampled_from(HEAD_DIMS),
)
def test_a_workspace_is_little_more_than_packed_k_and_v(batch, kv_heads, kv_len, head_dim):
    """One byte an element of K and of V, and at most a fifth more: the last tile's padding, scales, partial sums."""
    plan = PackPlan.of(batch, kv_heads, kv_len, head_dim, head_dim, RECIPE)
    assert plan.layout.size <= 1.2 * 2 * batch * kv_heads * kv_len * head_dim

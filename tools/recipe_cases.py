"""Random recipes that a kernel accepts, each with a call to try it on: cases of (kernel, seed, number) alone.

A recipe begins as a named one; some of its options are drawn anew from all that the rules know, those that no kernel
has included, and it is kept if the kernel's host code accepts it. So what a kernel comes to accept is tried without
being listed here. Of some candidates a case is the one that brings most pairs of values that are new.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from lowbit_attention import RECIPES, Recipe
from lowbit_attention.backends.cuda import hopper, mma
from lowbit_attention.backends.cuda.instances import (
    TILE_KEYS,
    Instance,
    WgmmaConfig,
    mma_config,
    pack_instance,
    padded_head_dim,
    smooth_q_instance,
    wgmma_config,
    wgmma_format,
)
from lowbit_attention.backends.cuda.schedule import work_tiles
from lowbit_attention.errors import InvalidRecipeError
from lowbit_attention.recipes.granularity import TOKEN_GRANULARITIES, VALUE_GRANULARITIES
from lowbit_attention.recipes.options import AllTokens, RestartedMax, RunningMax, SampledTokens, TileMax
from lowbit_attention.reference.rotation import hadamard_size

KERNELS = ("attention_wgmma", "attention_mma")
MMA_ARCH = "sm_90"  # where it is tested
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = ((64, 64), (128, 128), (40, 40), (72, 72), (96, 96), (64, 128), (128, 40), (36, 36))
HEADS = ((2, 1), (2, 2), (4, 2))
FAMILIES = ("normal", "qkv_bias", "sink", "outlier_tokens")
CAUSAL = ("none", "none", "bottom_right", "top_left")
MIN_LENGTH = 129
"""Keys: two tiles of either kernel."""

GPU_CASES, GPU_LENGTH = 40, 4096
"""What tests/gpu/test_recipe_fuzz.py runs of each kernel (tests/cpu/cuda/test_recipe_cases.py: that it is enough)."""

_E4M3 = [(8 + m) * 2.0 ** (e - 3) for e in range(9) for m in range(8) if m or e][:-1]
"""E4M3 numbers from 1.125 to 448: P_r and V_r as they usually are. (`mma_cases` tries P_r 4 % smaller, too.)"""
_CANDIDATES = 13
_KIND_WEIGHT = 10.0
"""What chooses the kernel's code counts so many times."""
_MOST_LOGITS = 4_000_000
"""Of a call; the emulation follows each product."""


# ---- recipes


def _one_of(values: Any) -> Callable[[random.Random], Any]:
    return lambda r: r.choice(values)


def _smooth_k(r: random.Random) -> dict[str, Any]:
    count = r.choice((None, None, 1, 16, 128, 1024, 5000))
    smooth = r.random() < 0.7
    return {"smooth_k": smooth, "k_sample": AllTokens() if count is None or not smooth else SampledTokens(count)}


def _softmax_max(r: random.Random) -> dict[str, Any]:
    if r.random() < 0.5:
        return {"softmax_max": r.choice((RunningMax(), RunningMax(), RunningMax(), TileMax()))}
    slack = r.choice((0.5, 4.0, 12.0, 20.0, 20.0, 40.0, 60.0))
    headroom = r.choice((0.0, 0.0, min(4.0, slack), slack * r.random(), slack))
    return {"softmax_max": RestartedMax(slack, headroom, r.choice((None, None, 1.0, 4.0, 10.0)))}


def _sums(r: random.Random) -> dict[str, Any]:
    """P's and V's format and ranges, and the sums: drawn together, since FP16 sums bound the ranges."""
    pv_format = r.choice(("e4m3",) * 8 + ("fp16", "fp16", "e5m2", "u8"))
    accumulator = r.choice(("fp8_f32", "fp8_f32", "fp8_f16", "fp8_f16", "fp16", "fp32"))
    keys = r.choice(("tile", "tile", "never", 64, 64, 128, 128, 256, 256, 384, 512, 1024, 2048, 4096, 96, 192, 1 << 20))
    product = 2.0**40  # of P_r and V_r: more than any format has
    if accumulator in ("fp8_f16", "fp16"):
        product = 65504 / (keys if isinstance(keys, int) else 128) * r.choice((1.0, 1.0, 0.5, r.random()))
    if pv_format == "fp16":
        p_max = 2.0 ** r.randint(0, 15) if r.random() < 0.7 else math.exp(r.uniform(0, 11))
        v_max = min(2.0 ** r.randint(0, 15), 2.0 ** math.floor(math.log2(max(product / p_max, 1))))
    else:
        p_max = r.choice([x for x in _E4M3 if x <= max(product, 2)])
        v_max = max(x for x in (1.0, *_E4M3) if x <= max(product / p_max, 1))
        if r.random() < 0.3:
            v_max = r.choice([x for x in (1.0, *_E4M3) if x <= v_max])
        if r.random() < 0.2:  # no E4M3 number, but far from the middle between two: there P_r falls either way
            p_max *= 1 + r.uniform(-0.02, 0.02)
    return {
        "pv_format": pv_format,
        "accumulator": accumulator,
        "keys_per_promotion": keys,
        "promote_first_tile": isinstance(keys, int) and r.random() < 0.5,
        "p_max": p_max,
        "v_max": v_max,
    }


_OPTIONS: dict[str, Callable[[random.Random], Any]] = {
    "qk_bits": _one_of((8, 4)),
    "q_granularity": _one_of(tuple(TOKEN_GRANULARITIES.values())),
    "k_granularity": _one_of(tuple(TOKEN_GRANULARITIES.values())),
    "smooth_q": _one_of((False, True)),
    "smooth_k and its sample": _smooth_k,
    "rotation": _one_of(("none", "hadamard")),
    "smoothquant_alpha": _one_of((None, 0.5)),
    "sums and ranges": _sums,
    "softmax_max": _softmax_max,
    "v_granularity": _one_of(tuple(VALUE_GRANULARITIES.values())),
    "v_headroom": _one_of((1.0, 1.0, 2.0)),
    "v_scale_power_of_two": _one_of((False, True)),
    "smooth_v": _one_of((False, True)),
    "v_sample": _one_of((AllTokens(), AllTokens(), SampledTokens(64))),
    "row_sum": _one_of(("unrounded", "accumulator", "rounded")),
}
"""What is drawn; a function gives an option's value, or several options'."""
_OFTEN = ("sums and ranges", "softmax_max", "row_sum")
"""They choose the kernels' code more than the others do."""


def reasons_of(kernel: str, recipe: Recipe) -> tuple[str, ...]:
    """Why a kernel does not take a recipe, whatever the call."""
    if kernel == "attention_wgmma":
        return hopper._recipe_reasons.__wrapped__(recipe)
    return mma._recipe_reasons.__wrapped__(recipe, MMA_ARCH)


@lru_cache(maxsize=8)
def bases(kernel: str) -> tuple[Recipe, ...]:
    """The named recipes that a kernel takes."""
    return tuple(recipe for recipe in RECIPES.values() if not reasons_of(kernel, recipe))


def drawn_recipe(kernel: str, r: random.Random) -> Recipe | None:
    """A named recipe with other options; ``None`` if they contradict each other, or are the same."""
    base = r.choice(bases(kernel))
    if base.v_tile_means:  # (which contradict much: `with_tile_means`)
        base = base.replace(v_tile_means=False, smooth_v=True)
    changes: dict[str, Any] = {}
    others = [name for name in _OPTIONS if name not in _OFTEN]
    for name in (*(name for name in _OFTEN if r.random() < 0.5), *r.sample(others, r.choice((0, 1, 2, 3)))):
        value = _OPTIONS[name](r)
        changes |= value if isinstance(value, dict) else {name: value}
    changed = {name: value for name, value in changes.items() if value != getattr(base, name)}
    try:
        return base.replace(**changed) if changed else None  # (the named ones have tests of their own)
    except InvalidRecipeError:
        return None


def accepted_recipe(kernel: str, r: random.Random) -> Recipe:
    """A recipe that the kernel takes."""
    while True:
        recipe = drawn_recipe(kernel, r)
        if recipe is not None and not reasons_of(kernel, recipe):
            return with_tile_means(kernel, recipe)


def with_tile_means(kernel: str, recipe: Recipe) -> Recipe:
    """The same with V's means by tile, for half of the recipes that the kernel takes with them."""
    try:
        other = recipe.replace(smooth_v=False, v_tile_means=True)
    except InvalidRecipeError:
        return recipe
    accepted = not reasons_of(kernel, other) and other not in RECIPES.values()
    return other if accepted and random.Random(recipe.name).random() < 0.5 else recipe


# ---- cases


@dataclass(frozen=True)
class Case:
    """A recipe and a call; the call's values are those of the GPU tests' own cases."""

    kernel: str
    seed: int
    number: int
    max_length: int
    recipe: Recipe
    dtype: str
    head_dims: tuple[int, int]
    heads: tuple[int, int]
    lengths: tuple[int, int]
    causal: str
    family: str

    @property
    def dim(self) -> int:
        """Channels that the kernel is compiled for."""
        dim = padded_head_dim(max(self.head_dims))
        assert dim is not None
        return dim

    def call(self) -> dict[str, Any]:
        """The call's values by name."""
        return {name: getattr(self, name) for name in ("dtype", "head_dims", "heads", "lengths", "causal", "family")}

    def kind(self) -> dict[str, Any]:
        """What chooses the kernel's code."""
        r = self.recipe
        if self.kernel == "attention_wgmma":
            c = wgmma_config(r, self.dim, DTYPES[self.dtype])
            keys = min(c.promotion_keys, 2 * WgmmaConfig.geometry.b_k)
            sums = f"{'f16' if c.sums_f16 else 'f32'}, {keys} keys" + (", first tile" if c.promote_first else "")
            return {"sums": sums, "restart": c.restart, "jump": c.jump, "sum_in_mma": c.sum_in_mma, "dim": self.dim}
        m = mma_config(r, self.dim, MMA_ARCH)
        sums = f"{'half' if m.v_half else 'e4m3'}, {'f16' if m.sums_f16 else 'f32'}" + ("" if m.promote else ", never")
        q = {"bits": r.qk_bits, "smooth_q": m.smooth_q, "rotate": m.rotate}
        return {"sums": f"{sums}, {'ones' if m.sum_in_mma else 'floats'}", **q, "dim": self.dim}

    @property
    def splits_keys(self) -> bool:
        """Whether `attention_wgmma` shares some rows' keys out between an H200's SMs."""
        config = wgmma_config(self.recipe, self.dim, DTYPES[self.dtype])
        if not config.output_in_shared or self.causal != "none":
            return False
        blocks = -(-self.lengths[0] // config.q_rows) * self.heads[0]
        return work_tiles(blocks, 132, config.consumers, -(-self.lengths[1] // TILE_KEYS)).key_splits > 1

    def fields(self) -> dict[str, Any]:
        """Its kind, and what else changes what the kernel does."""
        r = self.recipe
        options = {
            "q_granularity": r.q_granularity,
            "k_granularity": r.k_granularity,
            "smooth_k": r.smooth_k,
            "samples": r.k_sample != AllTokens(),
            "smooth_v": r.smooth_v,
            "v_tile_means": r.v_tile_means,
            "power_of_two": r.v_scale_power_of_two,
            "headroom": getattr(r.softmax_max, "headroom", 0.0) > 0,
        }
        call: dict[str, Any] = {"dtype": self.dtype, "causal": self.causal, "family": self.family, "heads": self.heads}
        if self.kernel == "attention_wgmma":
            call["splits_keys"] = self.splits_keys
        return self.kind() | options | call

    def instances(self) -> list[Instance]:
        """What its call compiles."""
        dtype = DTYPES[self.dtype]
        if self.kernel == "attention_wgmma":
            packing = pack_instance(self.dim, dtype, "sm_90a", wgmma_format(self.recipe))
            return [packing, wgmma_config(self.recipe, self.dim, dtype).instance()]
        found: list[Instance] = []
        for int4 in (False, True) if self.recipe.qk_bits == 4 else (False,):
            config = mma_config(self.recipe, self.dim, MMA_ARCH, int4)
            found += [config.instance(), pack_instance(self.dim, dtype, MMA_ARCH, config.form)]
        return found + [smooth_q_instance(self.dim, dtype, MMA_ARCH)] * self.recipe.smooth_q

    def command(self) -> str:
        """How to see it again."""
        options = f"--kernel {self.kernel} --seed {self.seed} --max-length {self.max_length} --only {self.number}"
        return f"python tools/fuzz_recipes.py {options}"

    def __str__(self) -> str:
        pairs = ("x".join(map(str, pair)) for pair in (self.head_dims, self.heads, self.lengths))
        return " ".join((str(self.recipe), self.dtype, *pairs, self.causal, self.family))


def _drawn_case(kernel: str, seed: int, number: int, max_length: int, r: random.Random) -> Case:
    recipe = accepted_recipe(kernel, r)
    fitting = [d for d in HEAD_DIMS if recipe.rotation == "none" or hadamard_size(d[0]) == padded_head_dim(max(d))]
    heads = r.choice(HEADS)
    shortest = r.choice((MIN_LENGTH, max(MIN_LENGTH, max_length // 2)))
    keys = round(math.exp(r.uniform(math.log(shortest), math.log(max_length))))
    most = max(1, _MOST_LOGITS // (heads[0] * keys))
    queries = min(most, r.choice((1, r.randint(1, 64), r.randint(65, 400), r.randint(129, 1000), keys)))
    causal = r.choice(CAUSAL)
    if causal == "top_left" and queries < MIN_LENGTH:
        causal = "bottom_right"  # (else no row sees a second tile)
    return Case(
        kernel,
        seed,
        number,
        max_length,
        recipe,
        dtype=r.choice(tuple(DTYPES)),
        head_dims=r.choice(fitting),
        heads=heads,
        lengths=(queries, keys),
        causal=causal,
        family=r.choice(FAMILIES),
    )


def _pairs(values: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Every two of a case's values."""
    return list(itertools.combinations(((name, str(value)) for name, value in values.items()), 2))


def cases(kernel: str, seed: int, max_length: int) -> Iterator[Case]:
    """Case 0, case 1, …"""
    met: Counter[tuple[Any, Any]] = Counter()

    def novelty(case: Case) -> float:
        kind = sum(1 / (1 + met[pair]) ** 2 for pair in _pairs(case.kind()))
        return _KIND_WEIGHT * kind + sum(1 / (1 + met[pair]) ** 2 for pair in _pairs(case.fields()))

    for number in itertools.count():
        r = random.Random(f"{kernel}-{seed}-{number}")
        drawn = [_drawn_case(kernel, seed, number, max_length, r) for _ in range(_CANDIDATES)]
        best = max(drawn, key=novelty)
        met.update(_pairs(best.fields()))
        yield best


@lru_cache(maxsize=8)
def first_cases(kernel: str, seed: int, count: int, max_length: int) -> tuple[Case, ...]:
    """The first ``count``."""
    return tuple(itertools.islice(cases(kernel, seed, max_length), count))

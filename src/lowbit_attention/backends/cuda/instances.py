"""Which instances there are: a recipe's configuration, and `MANIFEST`, which CI compiles; a row there adds a check."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from ...recipes.definition import Recipe
from ...recipes.named import RECIPES
from ...recipes.options import RestartedMax
from .compilation import CSRC, Instance
from .configs import (
    DTYPE_CODES,
    HEAD_DIMS,
    INT4_MMA_ARCHS,
    MMA_ARCHS,
    MMA_GEOMETRY,
    TILE_KEYS,
    WGMMA_FORMAT,
    MaskForm,
    MmaConfig,
    PackFormat,
    WgmmaConfig,
    mask_instance,
    pack_instance,
    packed_mask,
    sequences_instance,
    smooth_q_instance,
)

__all__ = [
    "CSRC", "DTYPE_CODES", "HEAD_DIMS", "INT4_MMA_ARCHS", "MANIFEST", "MMA_ARCHS", "MMA_GEOMETRY", "MMA_RECIPES",
    "TILE_KEYS", "WGMMA_FORMAT", "WGMMA_RECIPES", "Instance", "MaskForm", "MmaConfig", "PackFormat", "WgmmaConfig",
    "mask_instance", "mma_config", "mma_recipes", "pack_instance", "packed_mask", "padded_head_dim",
    "sequences_instance", "smooth_q_instance", "wgmma_config", "wgmma_format",
]  # fmt: skip


def wgmma_format(recipe: Recipe, mask: MaskForm = "none") -> PackFormat:
    """How K and V are packed for `attention_wgmma`."""
    return PackFormat(v_tile_means=recipe.v_tile_means, mask=packed_mask(mask))


_MOST_KEYS = 1 << 30
"""The longest sequence that kernels take. A longer promotion interval never ends, and the kernel counts in 32 bits."""


def wgmma_config(recipe: Recipe, head_dim: int, dtype: torch.dtype, mask: MaskForm = "none") -> WgmmaConfig:
    """The configuration that runs a recipe which `attention_wgmma` supports, for channels padded to ``head_dim``."""
    keys = recipe.promotion_keys(WgmmaConfig.geometry)
    if keys is None:
        raise ValueError(f"recipe {recipe} never promotes, and attention_wgmma has no such instance")
    return WgmmaConfig(
        head_dim,
        dtype,
        sums_f16=recipe.accumulator == "fp8_f16",
        promotion_keys=min(keys, _MOST_KEYS),
        promote_first=recipe.promote_first_tile and keys > WgmmaConfig.geometry.b_k,
        restart=isinstance(recipe.softmax_max, RestartedMax),
        sum_in_mma=recipe.row_sum == "accumulator",
        tile_means=recipe.v_tile_means,
        jump=recipe.jump_bits(WgmmaConfig.geometry) is not None,
        mask=mask,
    )


def mma_config(
    recipe: Recipe, head_dim: int, arch: str, int4_mma: bool | None = None, mask: MaskForm = "none"
) -> MmaConfig:
    """The configuration that runs a recipe which `attention_mma` supports, for channels padded to ``head_dim``.

    ``int4_mma``: whether 4-bit numbers go through the INT4 MMA; by default where the card has one.
    """
    int4 = arch in INT4_MMA_ARCHS if int4_mma is None else int4_mma
    return MmaConfig(
        arch,
        head_dim,
        qk_lanes=4 if recipe.qk_bits == 4 and int4 else 8,
        v_half=recipe.pv_format == "fp16",
        sums_f16=recipe.accumulator in ("fp8_f16", "fp16"),
        # FP32 sums lose nothing in an MMA that a promotion would keep
        promote=recipe.accumulator != "fp32" and recipe.promotion_keys(MMA_GEOMETRY) is not None,
        sum_in_mma=recipe.row_sum == "accumulator",
        smooth_q=recipe.smooth_q,
        rotate=recipe.rotation == "hadamard",
        mask=mask,
    )


def padded_head_dim(head_dim: int) -> int | None:
    """The smallest compiled head dimension that holds ``head_dim`` channels; ``None`` if none does."""
    return next((d for d in HEAD_DIMS if head_dim <= d), None)


MASKS: tuple[MaskForm, ...] = ("none", "keys", "bits", "bias")


def _manifest() -> Iterable[Instance]:
    yield mask_instance(TILE_KEYS, "sm_90a")
    yield sequences_instance("sm_90a")
    for head_dim in HEAD_DIMS:
        for dtype, mask in itertools.product(DTYPE_CODES, (*MASKS, "sequences")):
            forms = dict.fromkeys(wgmma_format(RECIPES[name], mask) for name in WGMMA_RECIPES)
            yield from (pack_instance(head_dim, dtype, "sm_90a", form) for form in forms)
            yield from (wgmma_config(RECIPES[name], head_dim, dtype, mask).instance() for name in WGMMA_RECIPES)
    for arch in MMA_ARCHS:
        yield mask_instance(MMA_GEOMETRY.b_k, arch)
        yield sequences_instance(arch)
        for head_dim, mask in itertools.product(HEAD_DIMS, (*MASKS, "sequences")):
            configs = [mma_config(RECIPES[name], head_dim, arch, mask=mask) for name in mma_recipes(arch)]
            if arch == "sm_90":  # the INT4 MMA is tested there
                four_bits = (RECIPES[n] for n in MMA_RECIPES if RECIPES[n].qk_bits == 4)
                configs += [mma_config(r, head_dim, arch, True, mask) for r in four_bits]
            if mask == "sequences":  # (with smooth Q they go one by one)
                configs = [config for config in configs if not config.smooth_q]
            yield from (config.instance() for config in dict.fromkeys(configs))
            dtypes = DTYPE_CODES if arch == "sm_90" else (torch.float16, torch.bfloat16)  # (tests use float32, too)
            for form in dict.fromkeys(config.form for config in configs):
                yield from (pack_instance(head_dim, dtype, arch, form) for dtype in dtypes)
            if any(config.smooth_q for config in configs):
                yield from (smooth_q_instance(head_dim, dtype, arch, packed_mask(mask)) for dtype in dtypes)


WGMMA_RECIPES = ("sage2_8b", "sage2pp_8b", "fast_8b")
"""Named recipes that `attention_wgmma` runs; their options may vary within what its `not_supported_reasons` says."""

MMA_RECIPES = (
    "sage1",
    "sage2_v1_4b",
    "sage2_8b",
    "sage2_4b",
    "sage2pp_8b",
    "sage2pp_4b",
    "hadamard_attn",
    "rotated_4b",
    "int8_fp16",
)
"""Named recipes that `attention_mma` runs, likewise; where there is no FP8, those with FP16 P·V."""


def mma_recipes(arch: str) -> tuple[str, ...]:
    """Those of `MMA_RECIPES` that run on ``arch``."""
    return tuple(n for n in MMA_RECIPES if arch not in ("sm_80", "sm_86") or RECIPES[n].pv_format == "fp16")


MANIFEST: tuple[Instance, ...] = tuple(dict.fromkeys(_manifest()))
"""Every instance that a named recipe can ask for."""

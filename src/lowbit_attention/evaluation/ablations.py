"""Named lists of recipes that regenerate the papers' ablation tables (SageAttention2 §4.4, SageAttention2++ §4)."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidArgumentError
from ..recipes.definition import Recipe
from ..recipes.named import RECIPES, recipe


@dataclass(frozen=True)
class Ablation:
    """A table: a title and, by row label, what to run."""

    name: str
    title: str
    rows: dict[str, str]

    def recipes(self) -> dict[str, Recipe]:
        """By row label."""
        return {label: recipe(spec) for label, spec in self.rows.items()}


UNSMOOTHED_4B = "sage2_4b:smooth_q=false,smooth_k=false"
"""What smoothing is compared with."""

ABLATIONS: dict[str, Ablation] = {
    a.name: a
    for a in (
        Ablation(
            "recipes",
            "Every named recipe",
            {name: name for name, entry in RECIPES.items() if not entry.is_exact},
        ),
        Ablation(
            "smoothing",
            "INT4 Q·K, FP8 P·V: what is done before rounding",
            {
                "none": UNSMOOTHED_4B,
                "Hadamard": "hadamard_attn",
                "SmoothQuant": "smooth_attn",
                "smooth K": "sage2_4b:smooth_q=false",
                "smooth Q": "sage2_4b:smooth_k=false",
                "smooth Q+K": "sage2_4b",
                "Hadamard, smooth K": "sage2_4b:smooth_q=false,rotation=hadamard",
                "Hadamard, smooth Q+K": "sage2_4b:rotation=hadamard",
            },
        ),
        Ablation(
            "granularity",
            "INT4 Q·K with Q and K smoothed: who shares a scale",
            {
                g: f"sage2_4b:q_granularity={g},k_granularity={g}"
                for g in ("per_tensor", "per_block", "per_warp", "per_thread", "per_token")
            },
        ),
        Ablation(
            "pv_format",
            "P·V formats (INT4 Q·K, Q and K smoothed)",
            {
                "INT8": "sage2_4b:pv_format=int8,p_max=127,v_max=127,accumulator=int32,row_sum=unrounded",
                "INT8, row sum over the rounded P": (
                    "sage2_4b:pv_format=int8,p_max=127,v_max=127,accumulator=int32,row_sum=rounded"
                ),
                "INT8 by its tile's maximum": (
                    "sage2_4b:pv_format=u8,p_max=255,v_max=127,accumulator=int32,softmax_max=tile,row_sum=unrounded"
                ),
                "E5M2": "sage2_4b:pv_format=e5m2,p_max=57344,v_max=57344,row_sum=unrounded",
                "E4M3": "sage2_4b:row_sum=unrounded",
                "FP16": (
                    "sage2_4b:pv_format=fp16,p_max=1,v_max=256,v_scale_power_of_two=true,accumulator=fp32,row_sum=unrounded"
                ),
            },
        ),
        Ablation(
            "pv_range",
            "(P_r, V_r) and the accumulator (INT8 Q·K, E4M3 P·V)",
            {
                "(448, 448), FP32": "sage2_8b:accumulator=fp32,row_sum=rounded",
                "(448, 448), FP22": "sage2_8b",
                "(448, 2.25), FP16": "sage2pp_8b:p_max=448,v_max=2.25",
                "(224, 4.5), FP16": "sage2pp_8b",
                "(112, 9), FP16": "sage2pp_8b:p_max=112,v_max=9",
            },
        ),
        Ablation(
            "accumulator",
            "How long the tensor core sums before FP32 does (INT8 Q·K, E4M3 P·V)",
            {
                "FP32": "sage2_8b:accumulator=fp32,row_sum=rounded",
                "FP22, every tile": "sage2_8b",
                "FP22, single level": "sage2_8b:keys_per_promotion=never,row_sum=unrounded",
                "FP22, single level, smooth V": "sage2_8b:keys_per_promotion=never,row_sum=unrounded,smooth_v=true",
                "FP16, 64 keys": "sage2pp_8b",
                "FP16, 512 keys": "sage2pp_8b:p_max=28,v_max=4.5,keys_per_promotion=512",
                "FP16, 512 keys, restarted": "fast_8b:p_max=28,keys_per_promotion=512,v_tile_means=false",
                "FP16, 512 keys, restarted, V's means by tile": "fast_8b:p_max=28,keys_per_promotion=512",
                "FP16, 1024 keys, restarted, smooth V": "fast_8b",
            },
        ),
        Ablation(
            "remedies",
            "For layers that stay bad: what else can be done before taking exact attention",
            {
                "4 bits": "sage2_4b",
                "4 bits, rotation": "sage2_4b:rotation=hadamard",
                "4 bits, smooth V": "sage2_4b:smooth_v=true",
                "4 bits, V scales per key tile": "sage2_4b:v_granularity=per_channel_and_key_tile",
                "4 bits, FP16 P·V": "int8_fp16:qk_bits=4,smooth_q=true",
                "4 bits, u8 P·V": "int8_u8:qk_bits=4,smooth_q=true",
                "4 bits, rotation, FP16 P·V": "int8_fp16:qk_bits=4,smooth_q=true,rotation=hadamard",
                "8 bits": "sage2_8b",
                "8 bits, smooth Q": "sage2_8b:smooth_q=true",
                "8 bits, rotation": "sage2_8b:rotation=hadamard",
                "8 bits, smooth V": "sage2_8b:smooth_v=true",
                "8 bits, V scales per key tile": "sage2_8b:v_granularity=per_channel_and_key_tile",
                "8 bits, u8 P·V": "int8_u8",
                "8 bits, FP16 P·V": "int8_fp16",
                "8 bits, smooth Q, rotation, FP16 P·V": "int8_fp16:smooth_q=true,rotation=hadamard",
                "8 bits, (448, 2.25)": "sage2pp_8b:p_max=448,v_max=2.25",
                "8 bits, (224, 4.5)": "sage2pp_8b",
                "8 bits, (112, 9)": "sage2pp_8b:p_max=112,v_max=9",
            },
        ),
    )
}
"""Every ablation table, by name."""


def ablation(name: str) -> Ablation:
    """The table of that name.

    Raises:
        InvalidArgumentError: for an unknown name.
    """
    if name not in ABLATIONS:
        raise InvalidArgumentError(f"unknown table {name!r}; known: {', '.join(ABLATIONS)}")
    return ABLATIONS[name]

"""The named recipes, each in one place. Adding a recipe is adding one entry (docs/architecture.md says what else)."""

from __future__ import annotations

from ..errors import InvalidRecipeError, shown
from .definition import Recipe, decode_options
from .granularity import PerBlock, PerThread, PerWarp
from .options import RestartedMax, SampledTokens, TileMax

_SAGE2_8B = Recipe(
    name="sage2_8b",
    summary="SageAttention2 8+8: INT8 Q·K, FP8 P·V, two-level sums",
    qk_bits=8,
    smooth_k=True,
    p_max=448.0,
    v_max=448.0,
    accumulator="fp8_f32",
    keys_per_promotion="tile",
    # The papers' text sums P before rounding. Over the rounded P, numerator and denominator err together, and the
    # tensor core sums for nothing (docs/numerics.md: no family's error grows, biased V's falls by up to a third).
    row_sum="accumulator",
)
_SAGE2_4B = _SAGE2_8B.replace(
    name="sage2_4b",
    summary="SageAttention2 4+8: INT4 Q·K with Q and K smoothed, FP8 P·V, two-level sums",
    qk_bits=4,
    smooth_q=True,
)
# (P_r, V_r) = (224, 4.5): 64 · 224 · 4.5 = 64512 ≤ 65504, and of the pairs with that product the best on sinks.
_SAGE2PP = {"p_max": 224.0, "v_max": 4.5, "accumulator": "fp8_f16", "keys_per_promotion": 64}
_SAGE2PP_4B = _SAGE2_4B.replace(
    name="sage2pp_4b", summary="SageAttention2++ 4+8: sage2_4b with FP16 sums over 64 keys", **_SAGE2PP
)

_ENTRIES = (
    Recipe(
        name="exact",
        summary="nothing quantised: scaled_dot_product_attention",
        qk_bits=None,
        smooth_k=False,
        pv_format="fp32",
        p_max=1.0,
        v_max=1.0,
        accumulator="fp32",
    ),
    Recipe(
        name="sage1",
        summary="SageAttention: INT8 Q·K per block, FP16 P·V with FP16 sums over a tile",
        q_granularity=PerBlock(),
        k_granularity=PerBlock(),
        pv_format="fp16",
        p_max=1.0,
        v_max=256.0,  # 128 keys · 1 · 256 = 32768 stays inside FP16; a power of two changes no digit of V
        v_scale_power_of_two=True,
        accumulator="fp16",
        keys_per_promotion="tile",
    ),
    Recipe(
        name="sage2_v1_4b",
        summary="the first SageAttention2 report: INT4 per warp, Q, K and V smoothed, FP22 sums in a single level",
        qk_bits=4,
        q_granularity=PerWarp(),
        k_granularity=PerWarp(),
        smooth_q=True,
        smooth_v=True,
        keys_per_promotion="never",
    ),
    _SAGE2_8B,
    _SAGE2_4B,
    _SAGE2_8B.replace(
        name="sage2pp_8b", summary="SageAttention2++ 8+8: sage2_8b with FP16 sums over 64 keys", **_SAGE2PP
    ),
    _SAGE2PP_4B,
    _SAGE2_4B.replace(
        name="smooth_attn",
        summary="baseline: INT4 with SmoothQuant (α = 0.5) between Q's and K's channels",
        smooth_q=False,
        smooth_k=False,
        smoothquant_alpha=0.5,
    ),
    _SAGE2_4B.replace(
        name="hadamard_attn",
        summary="baseline: INT4 after a Hadamard rotation of the head dimension",
        smooth_q=False,
        smooth_k=False,
        rotation="hadamard",
    ),
    _SAGE2PP_4B.replace(
        name="rotated_4b",
        summary="ours: sage2pp_4b after a Hadamard rotation, for K that RoPE has turned",
        rotation="hadamard",
    ),
    Recipe(
        name="int8_fp16",
        summary="ours, near-lossless: INT8 Q·K, FP16 P·V with FP32 sums",
        pv_format="fp16",
        p_max=2.0**15,  # the largest power of two in FP16: P is a normal number down to 2^-29
        v_max=2.0**15,  # likewise; an FP32 sum of 2^17 products of 2^30 is far from its limit
        v_scale_power_of_two=True,
        accumulator="fp32",
        keys_per_promotion="tile",
    ),
    Recipe(
        name="int8_u8",
        summary="ours: INT8 Q·K, unsigned INT8 P by its tile's row maximum, INT8 V, exact sums",
        pv_format="u8",
        p_max=255.0,
        v_max=127.0,
        softmax_max=TileMax(),
        accumulator="int32",
        keys_per_promotion="tile",
        row_sum="rounded",  # a dp4a with ones sums the codes themselves, exactly
    ),
    Recipe(
        name="fast_8b",
        summary="ours, for Hopper: INT8 Q·K, FP8 P·V with FP16 sums over 1024 keys",
        q_granularity=PerThread(),
        # Softmax does not see which constant vector is taken off K, so a sample's mean is as exact as that of all, and
        # a pass over K is saved. On ten families of 4096 tokens and three seeds L1 grows by 0.7 % at the most (with 64
        # tokens by 1.05 %, with 32 by 4.2 %, on K that RoPE has turned); 128 are 32 KB a head, read at once.
        k_sample=SampledTokens(128),
        # The accumulator truncates, so sums of one sign come out too small (V drifting along the sequence: twice
        # sage2_8b's error), and one mean taken off bf16 V leaves an offset that does not shrink with the length (1.8
        # times at 32K tokens). Means by key tile mend the first and have no second: L1 over sage2_8b's on 4096 tokens
        # drift .94, blocky .74, qkv_bias .64, normal 1.01, at 32K .98, .71, .37, .98 (docs/numerics.md).
        v_tile_means=True,
        # 1024 keys · 14 · 4.5 = 64512 ≤ 65504. (28, 2.25) has the same product and errs more on sinks, whose small V
        # falls among E4M3's subnormals. Over 512 keys (28, 4.5) errors are the same to 1 %, and the kernel 2 to 7 %
        # slower; 2048 keys (7, 4.5) cost outlier tokens 3 % and sinks 1 % of L1 (docs/notebook/hopper, 0005).
        p_max=14.0,
        v_max=4.5,
        # A sink's tile has an interval of its own and eight times more of P's range (1024 / 128 keys): L1 on sinks at
        # 1K to 4K tokens falls by 3 to 36 % (docs/numerics.md). Few other tiles rise by 4 bits in all of a warp's rows;
        # by 3 bits, some of normal inputs' first ones do.
        softmax_max=RestartedMax(20.0, 4.0, 4.0),
        accumulator="fp8_f16",
        keys_per_promotion=1024,
        promote_first_tile=True,
        row_sum="accumulator",
    ),
)

RECIPES: dict[str, Recipe] = {entry.name: entry for entry in _ENTRIES}
"""Every named recipe, by name."""

EXACT = RECIPES["exact"]

_MOST_TEXT = 2048
"""Characters of a recipe's name with changes: every option's, and some."""


def recipe(spec: str | Recipe) -> Recipe:
    """The recipe that ``spec`` names, with options changed after a colon.

    Args:
        spec: a `Recipe` (returned as it is), a name, or ``name:option=value,option=value``.

    >>> recipe("sage2_8b").p_max
    448.0
    >>> recipe("sage2_4b:smooth_q=false,k_granularity=per_block").smooth_q
    False

    Raises:
        InvalidRecipeError: for an unknown name or option, or a combination that contradicts itself.
    """
    if isinstance(spec, Recipe):
        return spec
    if not isinstance(spec, str):
        raise InvalidRecipeError(f"recipe {shown(spec)}", ["neither a Recipe nor a recipe's name"])
    if len(spec) > _MOST_TEXT:
        raise InvalidRecipeError(f"recipe {shown(spec)}", [f"{len(spec)} characters, more than {_MOST_TEXT}"])
    name, _, changes = spec.partition(":")
    if name not in RECIPES:
        raise InvalidRecipeError(f"recipe {name!r}", [f"unknown name; known: {', '.join(RECIPES)}"])
    if spec == name:
        return RECIPES[name]
    pairs = [change.partition("=") for change in changes.split(",")]
    if bad := [key + sep + value for key, sep, value in pairs if not (key and sep and value)]:
        raise InvalidRecipeError(f"recipe {spec!r}", [f"{text!r} is not option=value" for text in bad])
    names = [key.strip() for key, _, _ in pairs]
    if fixed := [key for key in names if key in ("name", "summary")]:
        raise InvalidRecipeError(f"recipe {spec!r}", [f"{key} is no option that a spec can change" for key in fixed])
    if twice := sorted({key for key in names if names.count(key) > 1}):
        raise InvalidRecipeError(f"recipe {spec!r}", [f"{key} is given more than once" for key in twice])
    data = {key.strip(): _plain(value.strip()) for key, _, value in pairs}
    return RECIPES[name].replace(**decode_options(data, f"recipe {spec!r}"))


def _plain(text: str) -> bool | int | float | str | None:
    """A command-line value as JSON would have it."""
    words: dict[str, bool | None] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text

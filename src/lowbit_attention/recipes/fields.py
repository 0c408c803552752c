"""The fields of a recipe, below the rules that they keep (`rules`) and the class that enforces them (`definition`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .granularity import PerChannel, PerThread, TokenGranularity, ValueGranularity
from .options import Accumulator, AllTokens, PVFormat, Rotation, RowSum, RunningMax, SoftmaxMax, TokenSample


@dataclass(frozen=True, kw_only=True)
class RecipeFields:
    """What a `Recipe` is made of: its name and its options.

    Q·K:
        qk_bits: 8 (INT8), 4 (INT4, values −7…7) or ``None`` (not quantised).
        q_granularity, k_granularity: who shares a scale; see `lowbit_attention.recipes.granularity`.
        smooth_q: subtract each query tile's mean and add its logits back (ΔS; SageAttention2 §3.1).
        smooth_k: subtract the mean of K over the tokens (SageAttention §4.2).
        k_sample: the tokens that mean is taken over.
        rotation: ``"hadamard"`` rotates the head dimension of Q and K by an orthonormal Hadamard matrix.
        smoothquant_alpha: move outliers between Q's and K's channels with this exponent; ``None`` for not at all.
    P·V:
        pv_format: ``e4m3``, ``e5m2``, ``int8`` (P signed), ``u8`` (P unsigned 0…255, V signed INT8), ``fp16`` or
            ``fp32`` (not quantised).
        p_max, v_max: P_r and V_r, what the largest P and the largest V of a scale group are mapped to.
        v_granularity, v_headroom, v_scale_power_of_two: V's scale is ``headroom · max|V| / v_max`` per group,
            rounded up to a power of two if asked.
        smooth_v: subtract V's mean over the tokens and add it to the output.
        v_sample: the tokens V's mean and maximum are taken over.
        v_tile_means: subtract V's mean over each key tile in channels where it is large, and add it to the output by
            the tile's row sums (docs/numerics.md, "V's mean by tile").
    Softmax and sums:
        softmax_max: which maximum is subtracted; see `lowbit_attention.recipes.options`.
        accumulator: ``fp32``; ``fp8_f32`` (FP8 MMA, "f32" accumulator of the machine's kind); ``fp8_f16`` (FP8 MMA
            with FP16 accumulator); ``fp16`` (FP16 MMA with FP16 accumulator); ``int32``.
        keys_per_promotion: after how many keys the accumulator is added to the FP32 output and restarted: a multiple
            of 32, ``"tile"``, or ``"never"`` (single level).
        promote_first_tile: promote once after key tile 0, too, where attention sinks live.
        row_sum: the softmax denominator sums P ``"unrounded"``, ``"rounded"``, or rounded and in the MMA's own
            ``"accumulator"`` (a column of ones beside V).
    """

    name: str = field(default="custom", compare=False)
    summary: str = field(default="", compare=False, repr=False)

    qk_bits: int | None = 8
    q_granularity: TokenGranularity = PerThread()
    k_granularity: TokenGranularity = PerThread()
    smooth_q: bool = False
    smooth_k: bool = True
    k_sample: TokenSample = AllTokens()
    rotation: Rotation = "none"
    smoothquant_alpha: float | None = None

    pv_format: PVFormat = "e4m3"
    p_max: float = 448.0
    v_max: float = 448.0
    v_granularity: ValueGranularity = PerChannel()
    v_headroom: float = 1.0
    v_scale_power_of_two: bool = False
    smooth_v: bool = False
    v_sample: TokenSample = AllTokens()
    v_tile_means: bool = False

    softmax_max: SoftmaxMax = RunningMax()
    accumulator: Accumulator = "fp8_f32"
    keys_per_promotion: int | Literal["tile", "never"] = "tile"
    promote_first_tile: bool = False
    row_sum: RowSum = "unrounded"

    @property
    def quantizes_qk(self) -> bool:
        """Whether Q·K is quantised."""
        return self.qk_bits is not None

    @property
    def quantizes_pv(self) -> bool:
        """Whether P·V is quantised."""
        return self.pv_format != "fp32"

    @property
    def is_exact(self) -> bool:
        """Whether nothing is quantised."""
        return not (self.quantizes_qk or self.quantizes_pv)

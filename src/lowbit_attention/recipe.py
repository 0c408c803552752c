"""`Recipe`: the method, frozen and printable. What is rounded, smoothed, scaled and promoted, and how often.

The tiles and the machine's accumulators are not part of it: see `lowbit_attention.machine`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import InvalidRecipeError
from .granularity import (
    TOKEN_GRANULARITIES,
    VALUE_GRANULARITIES,
    PerChannel,
    PerChannelAndKeyTile,
    PerThread,
    TokenGranularity,
    ValueGranularity,
)
from .machine import Geometry
from .recipe_options import (
    AllTokens,
    RestartedMax,
    RunningMax,
    SoftmaxMax,
    TileMax,
    TokenSample,
    parse_softmax_max,
    parse_token_sample,
)

SCHEMA_VERSION = 1
"""Version of the JSON form of a recipe."""

Rotation = Literal["none", "hadamard"]
PVFormat = Literal["e4m3", "e5m2", "int8", "u8", "fp16", "fp32"]
Accumulator = Literal["fp32", "fp8_f32", "fp8_f16", "fp16", "int32"]
RowSum = Literal["unrounded", "rounded", "accumulator"]

MMA_DEPTH = 32
"""Keys one 8-bit MMA sums."""
FP16_MAX = 65504.0
FP32_MAX = (2 - 2**-23) * 2.0**127
INT32_MAX = 2**31 - 1

_FORMAT_MAX = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0, "u8": 255.0, "fp16": FP16_MAX, "fp32": math.inf}
_FORMAT_FRACTION_BITS = {"e4m3": 3, "e5m2": 2, "fp16": 10}
_ACCUMULATORS_OF = {
    "e4m3": ("fp8_f32", "fp8_f16", "fp32"),
    "e5m2": ("fp8_f32", "fp8_f16", "fp32"),
    "int8": ("int32",),
    "u8": ("int32",),
    "fp16": ("fp32", "fp16"),
    "fp32": ("fp32",),
}


def largest_rounded(value: float, pv_format: PVFormat) -> float:
    """The largest magnitude that numbers up to ``value`` have after rounding to ``pv_format``."""
    if pv_format in ("int8", "u8"):
        return float(round(value))
    bits = _FORMAT_FRACTION_BITS.get(pv_format)
    if bits is None or value == 0:
        return value
    quantum = 2.0 ** (math.floor(math.log2(value)) - bits)
    return min(round(value / quantum) * quantum, _FORMAT_MAX[pv_format])


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A quantised attention method (SageAttention, SageAttention2, SageAttention2++ and variations).

    Q·K:
        qk_bits: 8 (INT8), 4 (INT4, values −7…7) or ``None`` (not quantised).
        q_granularity, k_granularity: who shares a scale; see `lowbit_attention.granularity`.
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
    Softmax and sums:
        softmax_max: which maximum is subtracted; see `lowbit_attention.recipe_options`.
        accumulator: ``fp32``; ``fp8_f32`` (FP8 MMA, "f32" accumulator of the machine's kind); ``fp8_f16`` (FP8 MMA
            with FP16 accumulator); ``fp16`` (FP16 MMA with FP16 accumulator); ``int32``.
        keys_per_promotion: after how many keys the accumulator is added to the FP32 output and restarted: a multiple
            of 32, ``"tile"``, or ``"never"`` (single level).
        promote_first_tile: promote once after key tile 0, too, where attention sinks live.
        row_sum: the softmax denominator sums P ``"unrounded"``, ``"rounded"``, or rounded and in the MMA's own
            ``"accumulator"`` (a column of ones beside V).

    Raises:
        InvalidRecipeError: with every reason, if the options contradict each other.
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

    softmax_max: SoftmaxMax = RunningMax()
    accumulator: Accumulator = "fp8_f32"
    keys_per_promotion: int | Literal["tile", "never"] = "tile"
    promote_first_tile: bool = False
    row_sum: RowSum = "unrounded"

    def __post_init__(self) -> None:
        if reasons := _type_reasons(self) or [*_qk_reasons(self), *_pv_reasons(self), *_sum_reasons(self)]:
            raise InvalidRecipeError(f"recipe {self.name!r}", reasons)

    @property
    def quantises_qk(self) -> bool:
        """Whether Q·K is quantised."""
        return self.qk_bits is not None

    @property
    def quantises_pv(self) -> bool:
        """Whether P·V is quantised."""
        return self.pv_format != "fp32"

    @property
    def is_exact(self) -> bool:
        """Whether nothing is quantised."""
        return not (self.quantises_qk or self.quantises_pv)

    @property
    def qk_max(self) -> int:
        """The largest integer of Q̂ and K̂: 127 or 7."""
        if self.qk_bits is None:
            raise InvalidRecipeError(f"recipe {self.name!r}", ["Q·K is not quantised, so it has no largest integer"])
        return (1 << (self.qk_bits - 1)) - 1

    def promotion_keys(self, geometry: Geometry) -> int | None:
        """After how many keys the sums are promoted with these tiles; ``None`` for never."""
        if self.keys_per_promotion == "never":
            return None
        return geometry.b_k if self.keys_per_promotion == "tile" else self.keys_per_promotion

    def check_geometry(self, geometry: Geometry) -> None:
        """Refuse tiles that this recipe's promotion interval or number range does not fit.

        Raises:
            InvalidRecipeError: with every reason.
        """
        keys = self.promotion_keys(geometry)
        reasons = _range_reasons(self, keys)
        if keys is not None and keys % geometry.b_k and geometry.b_k % keys:
            reasons.append(f"keys_per_promotion={keys} and the key tile b_k={geometry.b_k} do not divide each other")
        if keys is not None and keys < geometry.b_k and isinstance(self.softmax_max, TileMax):
            reasons.append("softmax_max=tile needs one promotion a tile")
        if reasons:
            raise InvalidRecipeError(f"recipe {self.name!r} with geometry {geometry}", reasons)

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some options changed, named after what changed unless ``name`` is given.

        >>> from lowbit_attention import recipe
        >>> print(recipe("sage2_4b").replace(smooth_q=False))
        sage2_4b:smooth_q=false
        """
        if changes and "name" not in changes:
            base, _, before = self.name.partition(":")
            texts = dict(text.split("=", 1) for text in before.split(",")) if before else {}
            texts |= {option: _encode_text(value) for option, value in changes.items()}
            changes |= {"name": f"{base}:" + ",".join(f"{k}={v}" for k, v in texts.items()), "summary": ""}
        return dataclasses.replace(self, **changes)

    def options(self) -> dict[str, Any]:
        """Every option but name and summary, as JSON values."""
        return {f.name: _encode(getattr(self, f.name)) for f in dataclasses.fields(self) if f.compare}

    def to_json(self, indent: int | None = None) -> str:
        """The recipe as a JSON object with its schema version."""
        return json.dumps(
            {"schema": SCHEMA_VERSION, "name": self.name, "summary": self.summary, **self.options()}, indent=indent
        )

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote. Missing options take their defaults; unknown ones are refused.

        Raises:
            InvalidRecipeError: if the text is no JSON object, of another schema, or holds an unknown or bad option.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InvalidRecipeError("recipe JSON", [str(error)]) from None
        if not isinstance(data, dict):
            raise InvalidRecipeError("recipe JSON", [f"expected an object, got {type(data).__name__}"])
        schema = data.pop("schema", None)
        if type(schema) is not int or schema != SCHEMA_VERSION:
            raise InvalidRecipeError("recipe JSON", [f"schema {schema!r}; this version reads {SCHEMA_VERSION}"])
        return cls(**decode_options(data, "recipe JSON"))

    def __str__(self) -> str:
        return self.name


def decode_options(data: dict[str, Any], subject: str) -> dict[str, Any]:
    """JSON or command-line values to `Recipe` arguments; every unknown name and bad value is reported."""
    known = {f.name for f in dataclasses.fields(Recipe)}
    reasons = [f"unknown option {name!r} (known: {', '.join(sorted(known))})" for name in data if name not in known]
    decoded = {}
    for name, value in data.items():
        try:
            decoded[name] = _DECODERS[name](value) if name in _DECODERS else value
        except ValueError as error:
            reasons.append(f"{name}: {error}")
    if reasons:
        raise InvalidRecipeError(subject, reasons)
    return decoded


def _encode(value: Any) -> Any:
    plain = value is None or isinstance(value, bool | int | float | str)
    return value if plain else str(value)


def _encode_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(_encode(value))


def _lookup(table: dict[str, Any]) -> Any:
    def decode(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in table:
            raise ValueError(f"{value!r} is not one of {', '.join(table)}")
        return table[value]

    return decode


def _option(parse: Any) -> Any:
    return lambda value: parse(value) if isinstance(value, str) else value


_DECODERS = {
    "q_granularity": _lookup(TOKEN_GRANULARITIES),
    "k_granularity": _lookup(TOKEN_GRANULARITIES),
    "v_granularity": _lookup(VALUE_GRANULARITIES),
    "k_sample": _option(parse_token_sample),
    "v_sample": _option(parse_token_sample),
    "softmax_max": _option(parse_softmax_max),
    "rotation": lambda value: "none" if value is None else value,
}


def _type_reasons(r: Recipe) -> list[str]:
    """Wrong types and values outside an option's own range, before options are held against each other."""
    choices = {
        "qk_bits": (8, 4, None),
        "rotation": get_args(Rotation),
        "pv_format": get_args(PVFormat),
        "accumulator": get_args(Accumulator),
        "row_sum": get_args(RowSum),
    }
    kinds: dict[str, Any] = {
        "name": str,
        "summary": str,
        "q_granularity": TokenGranularity,
        "k_granularity": TokenGranularity,
        "v_granularity": ValueGranularity,
        "k_sample": TokenSample,
        "v_sample": TokenSample,
        "softmax_max": SoftmaxMax,
    }
    booleans = ("smooth_q", "smooth_k", "smooth_v", "v_scale_power_of_two", "promote_first_tile")
    reasons = [
        f"{name}={getattr(r, name)!r} is not one of {', '.join(map(str, allowed))}"
        for name, allowed in choices.items()
        if isinstance(getattr(r, name), bool | float) or getattr(r, name) not in allowed
    ]
    reasons += [
        f"{name}={getattr(r, name)!r} has the wrong type"
        for name, k in kinds.items()
        if not isinstance(getattr(r, name), k)
    ]
    reasons += [
        f"{name}={getattr(r, name)!r} is no bool" for name in booleans if not isinstance(getattr(r, name), bool)
    ]
    for name, low in (("p_max", 0.0), ("v_max", 0.0), ("v_headroom", 1.0)):
        value = getattr(r, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FP32_MAX:
            reasons.append(f"{name}={value!r} is no finite number")
        elif value < low or value == 0:
            reasons.append(f"{name}={value} must be " + ("positive" if low == 0 else f"at least {low:g}"))
    alpha = r.smoothquant_alpha
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1):
        reasons.append(f"smoothquant_alpha={alpha!r} is neither None nor in [0, 1]")
    keys = r.keys_per_promotion
    if keys not in ("tile", "never") and (
        isinstance(keys, bool) or not isinstance(keys, int) or keys < MMA_DEPTH or keys % MMA_DEPTH
    ):
        reasons.append(
            f"keys_per_promotion={keys!r} is neither 'tile', 'never' nor a positive multiple of {MMA_DEPTH}, "
            "the keys one MMA sums"
        )
    return reasons


def _qk_reasons(r: Recipe) -> list[str]:
    reasons = []
    if not r.quantises_qk:
        idle = [name for name in ("smooth_q", "smooth_k") if getattr(r, name)]
        idle += ["rotation"] if r.rotation != "none" else []
        idle += ["smoothquant_alpha"] if r.smoothquant_alpha is not None else []
        reasons += [f"{name} does nothing where Q·K is not quantised (qk_bits=None)" for name in idle]
    if not r.smooth_k and r.k_sample != AllTokens():
        reasons.append(f"k_sample={r.k_sample} does nothing without smooth_k")
    return reasons


def _pv_reasons(r: Recipe) -> list[str]:
    reasons = []
    if not r.quantises_pv:
        idle = [name for name in ("smooth_v", "v_scale_power_of_two") if getattr(r, name)]
        idle += [name for name in ("v_headroom", "p_max", "v_max") if getattr(r, name) != 1]
        idle += ["v_granularity"] if r.v_granularity != PerChannel() else []
        idle += ["v_sample"] if r.v_sample != AllTokens() else []
        reasons += [f"{name} does nothing where P·V is not quantised (pv_format=fp32)" for name in idle]
        return reasons
    if r.p_max < 1:
        reasons.append(f"p_max={r.p_max:g} is below 1: most of P would round to zero")
    least = 2.0 if r.v_scale_power_of_two else 1.0
    if r.v_max / r.v_headroom < least:
        reasons.append(
            f"v_max / v_headroom = {r.v_max:g} / {r.v_headroom:g} is below {least:g}: the scale of a large V overflows"
        )
    p_limit = _FORMAT_MAX[r.pv_format]
    v_limit = 127.0 if r.pv_format == "u8" else p_limit
    if r.p_max > p_limit:
        reasons.append(f"p_max={r.p_max:g} is above the largest {r.pv_format} number, {p_limit:g}")
    if r.v_max > v_limit:
        reasons.append(f"v_max={r.v_max:g} is above the largest number of V's format, {v_limit:g}")
    return reasons


def _sum_reasons(r: Recipe) -> list[str]:
    reasons = []
    if r.accumulator not in _ACCUMULATORS_OF[r.pv_format]:
        allowed = ", ".join(_ACCUMULATORS_OF[r.pv_format])
        reasons.append(f"accumulator={r.accumulator} cannot sum {r.pv_format} products (possible: {allowed})")
    once_a_tile = r.keys_per_promotion == "tile"
    if r.accumulator == "int32" and not once_a_tile:
        reasons.append(
            f"integer sums cannot follow a moving maximum, so keys_per_promotion must be 'tile', "
            f"not {r.keys_per_promotion!r}"
        )
    if isinstance(r.softmax_max, TileMax) and not once_a_tile:
        reasons.append(f"softmax_max=tile needs keys_per_promotion='tile', not {r.keys_per_promotion!r}")
    if isinstance(r.softmax_max, RestartedMax) and r.keys_per_promotion == "never":
        reasons.append(f"softmax_max={r.softmax_max} restarts at promotions, and keys_per_promotion is 'never'")
    if isinstance(r.v_granularity, PerChannelAndKeyTile) and not once_a_tile:
        reasons.append(
            "v_granularity=per_channel_and_key_tile needs keys_per_promotion='tile': each tile has its scale"
        )
    if r.promote_first_tile and not isinstance(r.keys_per_promotion, int):
        reasons.append("promote_first_tile needs keys_per_promotion to be a number of keys")
    if r.row_sum == "accumulator" and r.accumulator not in ("fp8_f32", "fp8_f16", "fp16"):
        reasons.append(f"row_sum=accumulator is the same as rounded where the accumulator is {r.accumulator}")
    if r.row_sum == "accumulator" and r.keys_per_promotion == "never":
        reasons.append("row_sum=accumulator drifts without promotions (keys_per_promotion='never')")
    if isinstance(r.keys_per_promotion, int):
        reasons += _range_reasons(r, r.keys_per_promotion)
    elif r.keys_per_promotion == "never" and r.accumulator in ("fp8_f16", "fp16"):
        reasons.append("FP16 sums that are never promoted overflow (keys_per_promotion='never')")
    return reasons


def _range_reasons(r: Recipe, keys: int | None) -> list[str]:
    """Whether a sum over ``keys`` keys stays in the accumulator's range, on the values *after* rounding."""
    if keys is None:
        return []
    p, v = (
        largest_rounded(r.p_max, r.pv_format),
        largest_rounded(r.v_max, "int8" if r.pv_format == "u8" else r.pv_format),
    )
    total = keys * p * v
    what = f"keys · P_r · V_r = {keys} · {p:g} · {v:g} = {total:g}"
    if r.accumulator in ("fp8_f16", "fp16") and total > FP16_MAX:
        return [f"{what} (after rounding to {r.pv_format}) overflows FP16 sums ({FP16_MAX:g})"]
    if r.accumulator == "int32" and total > INT32_MAX:
        return [f"{what} overflows INT32 sums"]
    return []

"""Recipes: the named ones hold the published values, JSON and text give back what went in, and contradictions are
refused with every reason, each naming the values at fault.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lowbit_attention.errors import InvalidArgumentError, InvalidRecipeError
from lowbit_attention.recipes.definition import SCHEMA_VERSION, Recipe
from lowbit_attention.recipes.granularity import PerBlock, PerChannelAndKeyTile, PerThread, PerToken, PerWarp
from lowbit_attention.recipes.machine import Geometry
from lowbit_attention.recipes.named import EXACT, RECIPES, recipe
from lowbit_attention.recipes.options import AllTokens, RestartedMax, RunningMax, SampledTokens, TileMax
from lowbit_attention.recipes.rules import largest_rounded

SAGE2 = {"qk_bits": 8, "q_granularity": PerThread(), "k_granularity": PerThread(), "smooth_q": False, "smooth_k": True,
         "smooth_v": False, "rotation": "none", "smoothquant_alpha": None, "pv_format": "e4m3", "p_max": 448,
         "v_max": 448, "accumulator": "fp8_f32", "keys_per_promotion": "tile"}  # fmt: skip
INT4 = {"qk_bits": 4, "smooth_q": True}
PLUS_PLUS = {"p_max": 224, "v_max": 4.5, "accumulator": "fp8_f16", "keys_per_promotion": 64}
UNSMOOTHED = {"qk_bits": 4, "smooth_k": False}
# The table of the algorithm notes, section 4
PUBLISHED: dict[str, dict[str, Any]] = {
    "sage1": {**SAGE2, "q_granularity": PerBlock(), "k_granularity": PerBlock(), "pv_format": "fp16", "p_max": None,
              "v_max": None, "accumulator": "fp16", "v_scale_power_of_two": True},
    "sage2_v1_4b": {**SAGE2, **INT4, "q_granularity": PerWarp(), "k_granularity": PerWarp(), "smooth_v": True,
                    "keys_per_promotion": "never"},
    "sage2_8b": SAGE2,
    "sage2_4b": {**SAGE2, **INT4},
    "sage2pp_8b": {**SAGE2, **PLUS_PLUS},
    "sage2pp_4b": {**SAGE2, **INT4, **PLUS_PLUS},
    "smooth_attn": {**SAGE2, **UNSMOOTHED, "smoothquant_alpha": 0.5},
    "hadamard_attn": {**SAGE2, **UNSMOOTHED, "rotation": "hadamard"},
    "rotated_4b": {**SAGE2, **INT4, **PLUS_PLUS, "rotation": "hadamard"},
    "int8_fp16": {**SAGE2, "pv_format": "fp16", "p_max": None, "v_max": None, "v_scale_power_of_two": True,
                  "accumulator": "fp32"},
    "int8_u8": {**SAGE2, "pv_format": "u8", "p_max": 255, "v_max": 127, "accumulator": "int32",
                "softmax_max": TileMax()},
    "fast_8b": {**SAGE2, "k_sample": SampledTokens(128), "v_tile_means": True, "p_max": 14, "v_max": 4.5,
                "accumulator": "fp8_f16", "keys_per_promotion": 1024, "promote_first_tile": True,
                "row_sum": "accumulator", "softmax_max": RestartedMax(20.0, 4.0, 4.0)},
    "exact": {"qk_bits": None, "smooth_q": False, "smooth_k": False, "smooth_v": False, "rotation": "none",
              "smoothquant_alpha": None, "pv_format": "fp32", "accumulator": "fp32"},
}  # fmt: skip
CASES = [(name, option, value) for name, table in PUBLISHED.items() for option, value in table.items()]


@pytest.mark.parametrize(("name", "option", "value"), [case for case in CASES if case[1:] not in
                         (("p_max", None), ("v_max", None))])  # fmt: skip
def test_named_recipes_hold_the_published_values(name: str, option: str, value: object) -> None:
    assert getattr(recipe(name), option) == value


def test_every_named_recipe_is_published_and_the_other_way_round() -> None:
    assert set(RECIPES) == set(PUBLISHED)
    assert all(RECIPES[name].name == name and RECIPES[name].summary for name in RECIPES)
    assert {name for name in RECIPES if RECIPES[name].is_exact} == {"exact"}
    assert RECIPES["exact"] is EXACT
    assert {name for name in RECIPES if RECIPES[name].softmax_max == RunningMax()} == set(RECIPES) - {
        "int8_u8",
        "fast_8b",
    }


@pytest.mark.parametrize("name", ["sage1", "int8_fp16"])
@pytest.mark.parametrize("geometry", [Geometry(128, 64, 32), Geometry(64, 128, 16)], ids=str)
def test_fp16_recipes_keep_their_sums_in_range(name: str, geometry: Geometry) -> None:
    r = recipe(name)
    for x in (r.p_max, r.v_max):
        assert math.log2(x).is_integer(), "a power of two changes no digit"
    limit = 65504 if r.accumulator == "fp16" else float(np.finfo(np.float32).max)
    assert geometry.b_k * r.p_max * r.v_max <= limit


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_qk_max(bits: int, largest: int) -> None:
    assert Recipe(qk_bits=bits).qk_max == largest
    with pytest.raises(InvalidRecipeError, match="not quantised"):
        _ = EXACT.qk_max


ODD = Recipe(
    name="odd", summary="everything but the defaults", qk_bits=4, q_granularity=PerToken(), k_granularity=PerWarp(),
    smooth_q=True, k_sample=SampledTokens(7), rotation="hadamard", smoothquant_alpha=0.1 + 0.2, pv_format="e5m2",
    p_max=4 / 3, v_max=7 + 2.0**-20, v_granularity=PerChannelAndKeyTile(), v_headroom=1.1 + 0.1,
    v_scale_power_of_two=True,
    smooth_v=True, softmax_max=TileMax(), accumulator="fp8_f16", row_sum="accumulator",
)  # fmt: skip
RESTARTED = Recipe(
    name="r", softmax_max=RestartedMax(12.5), keys_per_promotion=96, promote_first_tile=True, v_sample=SampledTokens(1)
)
EVERY = [*RECIPES.values(), ODD, RESTARTED]


@pytest.mark.parametrize("r", EVERY, ids=str)
def test_json_gives_back_the_recipe(r: Recipe) -> None:
    for indent in (None, 2):
        back = Recipe.from_json(r.to_json(indent))
        assert back == r
        assert (back.name, back.summary) == (r.name, r.summary)
    data = json.loads(r.to_json())
    assert data["schema"] == SCHEMA_VERSION == 1
    assert set(data) == {"schema"} | {f.name for f in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("slack", [1 / 3, 1e-5, 12.3456789, 60.0])
def test_json_and_text_keep_every_digit_of_a_slack(slack: float) -> None:
    r = Recipe(softmax_max=RestartedMax(slack), keys_per_promotion=64, row_sum="accumulator")
    assert Recipe.from_json(r.to_json()) == r
    assert recipe(f"sage2_8b:keys_per_promotion=64,softmax_max={RestartedMax(slack)}") == r


def test_json_takes_defaults_for_what_is_missing() -> None:
    assert Recipe.from_json('{"schema": 1}') == Recipe()
    assert Recipe.from_json('{"schema": 1, "p_max": 100}') == Recipe(p_max=100)


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("{", ["line 1 column 2"]),
        ("", ["line 1 column 1"]),
        ("[1]", ["expected an object, got list"]),
        ("null", ["expected an object, got NoneType"]),
        ("{}", ["schema None"]),
        ('{"schema": 2, "p_max": 1}', ["schema 2; this version reads 1"]),
        ('{"schema": "1"}', ["schema '1'"]),
        ('{"schema": 1, "bogus": 1, "p_maxx": 2}', ["'bogus'", "'p_maxx'"]),
        ('{"schema": 1, "q_granularity": "per_row", "k_sample": "few"}', ["'per_row' is not one of", "'few'"]),
        ('{"schema": 1, "softmax_max": "restarted(99)"}', ["slack=99"]),
        ('{"schema": 1, "softmax_max": "restarted(1.2.3)"}', ["1.2.3"]),
        ('{"schema": 1, "softmax_max": "restarted(20;21)"}', ["headroom=21"]),
        ('{"schema": 1, "softmax_max": "restarted(20;4;99)"}', ["jump=99"]),
        ('{"schema": 1, "p_max": NaN, "v_max": Infinity}', ["p_max=nan", "v_max=inf"]),
        ('{"schema": 1, "p_max": "448"}', ["p_max='448' is no finite number"]),
        ('{"schema": 1, "smooth_k": 1, "q_granularity": 3}', ["smooth_k=1", "q_granularity=3"]),
        ('{"schema": 1, "pv_format": ["e4m3"]}', [r"pv_format=\['e4m3'\]"]),
        ('{"schema": 1, "qk_bits": 8.5}', ["qk_bits=8.5"]),
    ],
)
def test_bad_json_is_refused_with_the_reason(text: str, reasons: list[str]) -> None:
    with pytest.raises(InvalidRecipeError) as error:
        Recipe.from_json(text)
    for reason in reasons:
        assert any(re.search(reason, r) for r in error.value.reasons), error.value.reasons
        assert re.search(reason, str(error.value))


def test_a_number_of_bits_is_an_integer_or_refused() -> None:
    try:
        r = Recipe.from_json('{"schema": 1, "qk_bits": 8.0}')
    except InvalidRecipeError:
        return
    assert r.qk_max == 127


def test_a_number_beyond_float_is_refused() -> None:
    with pytest.raises(InvalidRecipeError, match="p_max"):
        Recipe.from_json('{"schema": 1, "p_max": 1' + 400 * "0" + "}")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("sage2_8b", {}),
        ("sage2_8b:p_max=224", {"p_max": 224}),
        ("sage2_8b: p_max = 224 , v_max=4.5", {"p_max": 224, "v_max": 4.5}),
        ("sage2_8b:smooth_k=false,qk_bits=4", {"smooth_k": False, "qk_bits": 4}),
        ("sage2_8b:qk_bits=none,smooth_k=False", {"qk_bits": None, "smooth_k": False}),
        ("sage2_8b:rotation=hadamard,smoothquant_alpha=0.5", {"rotation": "hadamard", "smoothquant_alpha": 0.5}),
        ("sage2_8b:rotation=none,smoothquant_alpha=none", {}),
        ("sage2_8b:q_granularity=per_token,v_granularity=per_channel_and_key_tile",
         {"q_granularity": PerToken(), "v_granularity": PerChannelAndKeyTile()}),
        ("sage2_8b:softmax_max=restarted(8.5),keys_per_promotion=128",
         {"softmax_max": RestartedMax(8.5), "keys_per_promotion": 128}),
        ("sage2_8b:softmax_max=restarted,keys_per_promotion=128",
         {"softmax_max": RestartedMax(20.0), "keys_per_promotion": 128}),
        ("sage2_8b:k_sample=sampled(5)", {"k_sample": SampledTokens(5)}),
        ("sage2_8b:v_sample=sampled", {"v_sample": SampledTokens(32)}),
        ("sage2_8b:softmax_max=tile,k_sample=all", {"softmax_max": TileMax()}),
    ],
)  # fmt: skip
def test_text_changes_options(spec: str, expected: dict[str, Any]) -> None:
    assert recipe(spec) == Recipe(row_sum="accumulator", **expected)


@pytest.mark.parametrize("r", EVERY, ids=str)
def test_the_name_after_a_change_is_a_spec_of_the_same_recipe(r: Recipe) -> None:
    changed = recipe("sage2_8b").replace(**{f.name: getattr(r, f.name) for f in dataclasses.fields(r) if f.compare})
    assert recipe(changed.name) == changed == r
    assert str(changed) == changed.name
    other: dict[str, float] = {"v_max": 4.0} if r.v_tile_means else {"v_headroom": 3.0}
    again = changed.replace(**other) if r.quantizes_pv else changed
    assert recipe(again.name) == again
    assert recipe(r) is r


@pytest.mark.parametrize(
    ("spec", "reasons"),
    [
        ("sage3", ["sage3", "sage2_8b"]),
        ("", ["unknown name"]),
        (8, ["neither a Recipe nor"]),
        ("sage2_8b:p_max", ["'p_max' is not option=value"]),
        ("sage2_8b:p_max=,=3,v_max=1", ["'p_max='", "'=3'"]),
        ("sage2_8b:bogus=1,other=2", ["'bogus'", "'other'", "p_max"]),
        ("sage2_8b:q_granularity=per_row,k_sample=sampled(0)", ["'per_row'", "count=0"]),
        ("sage2_8b:smooth_k=1", ["smooth_k=1 is no bool"]),
        ("sage2_8b:p_max=a lot", ["p_max='a lot'"]),
        ("sage2_8b:p_max=500", ["p_max=500 ", "448"]),
    ],
)
def test_bad_text_is_refused_with_the_reason(spec: Any, reasons: list[str]) -> None:
    with pytest.raises(InvalidRecipeError) as error:
        recipe(spec)
    for reason in reasons:
        assert reason in str(error.value)


FP16_SUMS = {"accumulator": "fp8_f16", "keys_per_promotion": 64}
INT8_PV = {"pv_format": "int8", "p_max": 127.0, "v_max": 127.0, "accumulator": "int32"}
NO_PV = {"pv_format": "fp32", "p_max": 1.0, "v_max": 1.0, "accumulator": "fp32"}
TILE_MEANS = {"v_tile_means": True, "row_sum": "accumulator"}
INVALID = [
    # an option's own range
    ({"qk_bits": 6}, ["qk_bits=6"]),
    ({"qk_bits": True}, ["qk_bits=True"]),
    ({"pv_format": "e3m4"}, ["e3m4"]),
    ({"rotation": "random"}, ["random"]),
    ({"q_granularity": "per_token"}, ["q_granularity='per_token'"]),
    ({"p_max": 0}, ["p_max=0 must be positive"]),
    ({"v_max": -1.0}, ["v_max=-1.0"]),
    ({"v_headroom": 0.5}, ["v_headroom=0.5 must be at least 1"]),
    ({"smoothquant_alpha": 1.5}, ["smoothquant_alpha=1.5"]),
    ({"keys_per_promotion": 48}, ["keys_per_promotion=48", "32"]),
    ({"keys_per_promotion": 0}, ["keys_per_promotion=0"]),
    ({"keys_per_promotion": "often"}, ["'often'"]),
    # Q·K
    ({"qk_bits": None}, ["smooth_k does nothing"]),
    ({"qk_bits": None, "smooth_k": False, "smooth_q": True}, ["smooth_q does nothing"]),
    ({"qk_bits": None, "smooth_k": False, "rotation": "hadamard"}, ["rotation does nothing"]),
    ({"qk_bits": None, "smooth_k": False, "smoothquant_alpha": 0.5}, ["smoothquant_alpha does nothing"]),
    ({"smooth_k": False, "k_sample": SampledTokens(8)}, ["k_sample=sampled(8) does nothing without smooth_k"]),
    # P·V
    ({**NO_PV, "smooth_v": True}, ["smooth_v does nothing"]),
    ({**NO_PV, "p_max": 448.0}, ["p_max does nothing"]),
    ({**NO_PV, "v_granularity": PerChannelAndKeyTile()}, ["v_granularity does nothing"]),
    ({**NO_PV, "v_sample": SampledTokens()}, ["v_sample does nothing"]),
    ({"p_max": 449.0}, ["p_max=449", "e4m3", "448"]),
    ({"v_max": 500.0}, ["v_max=500", "448"]),
    ({**INT8_PV, "p_max": 128.0}, ["p_max=128", "127"]),
    ({**INT8_PV, "pv_format": "u8", "p_max": 256.0}, ["p_max=256", "255"]),
    ({**INT8_PV, "pv_format": "u8", "v_max": 255.0}, ["v_max=255", "127"]),
    ({**TILE_MEANS, "pv_format": "e5m2"}, ["v_tile_means needs pv_format=e4m3, not e5m2"]),
    ({**TILE_MEANS, "row_sum": "unrounded"}, ["v_tile_means needs row_sum=accumulator", "unrounded"]),
    ({**TILE_MEANS, "smooth_v": True}, ["v_tile_means and smooth_v"]),
    ({**TILE_MEANS, "v_granularity": PerChannelAndKeyTile()}, ["v_tile_means", "per_channel_and_key_tile"]),
    ({**TILE_MEANS, "v_headroom": 2.0}, ["v_tile_means", "v_headroom=1"]),
    ({**TILE_MEANS, "v_sample": SampledTokens()}, ["v_tile_means", "v_sample=all"]),
    ({**TILE_MEANS, "keys_per_promotion": 2048}, ["v_tile_means", "at most 1024 keys, not 2048"]),
    # the sums
    ({"accumulator": "int32"}, ["accumulator=int32 cannot sum e4m3", "fp8_f32, fp8_f16, fp32"]),
    ({**INT8_PV, "accumulator": "fp8_f32"}, ["accumulator=fp8_f32 cannot sum int8", "int32"]),
    ({"pv_format": "fp16", "accumulator": "fp8_f16", "p_max": 1.0, "v_max": 1.0}, ["fp8_f16 cannot sum fp16"]),
    ({**INT8_PV, "keys_per_promotion": 64}, ["keys_per_promotion", "'tile'", "64"]),
    ({"softmax_max": TileMax(), "keys_per_promotion": 64}, ["softmax_max=tile", "64"]),
    ({"softmax_max": TileMax(), "keys_per_promotion": "never"}, ["softmax_max=tile", "'never'"]),
    ({"softmax_max": RestartedMax(jump=4.0), "keys_per_promotion": 128}, ["restarted(20;0;4)", "promote_first_tile"]),
    ({"softmax_max": RestartedMax(), "keys_per_promotion": "never"}, ["softmax_max=restarted(20)", "'never'"]),
    ({"v_granularity": PerChannelAndKeyTile(), "keys_per_promotion": 64}, ["per_channel_and_key_tile", "'tile'"]),
    ({"v_granularity": PerChannelAndKeyTile(), "keys_per_promotion": "never"}, ["per_channel_and_key_tile"]),
    ({"promote_first_tile": True}, ["promote_first_tile"]),
    ({"promote_first_tile": True, "keys_per_promotion": "never"}, ["promote_first_tile"]),
    ({**INT8_PV, "row_sum": "accumulator"}, ["row_sum=accumulator", "int32"]),
    ({"accumulator": "fp32", "row_sum": "accumulator"}, ["row_sum=accumulator", "fp32"]),
    ({"row_sum": "accumulator", "keys_per_promotion": "never"}, ["row_sum=accumulator", "'never'"]),
    ({"accumulator": "fp8_f16", "keys_per_promotion": "never", "p_max": 1.0}, ["FP16 sums", "never"]),
    ({"accumulator": "fp16", "pv_format": "fp16", "p_max": 1.0, "v_max": 1.0, "keys_per_promotion": "never"},
     ["FP16 sums", "never"]),
    # 64 · 310 · 3.3 = 65472 would pass; E4M3 makes it 64 · 320 · 3.25 = 66560
    ({**FP16_SUMS, "p_max": 310.0, "v_max": 3.3}, ["64 · 320 · 3.25 = 66560", "65504"]),
    ({**FP16_SUMS, "p_max": 448.0, "v_max": 448.0}, ["64 · 448 · 448", "65504"]),
    ({**FP16_SUMS, "p_max": 224.0, "v_max": 5.0}, ["64 · 224 · 5 = 71680"]),
    ({"accumulator": "fp8_f16", "keys_per_promotion": 512, "p_max": 56.0, "v_max": 4.5}, ["512 · 56 · 4.5"]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "parts"), INVALID, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_contradictions_are_refused_by_a_reason_that_names_the_values(
    options: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(InvalidRecipeError) as error:
        Recipe(name="mine", **options)
    assert len(error.value.reasons) == 1
    for part in parts:
        assert part in error.value.reasons[0]
    assert str(error.value) == f"recipe 'mine': {error.value.reasons[0]}"
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("pair", [(448.0, 2.25), (224.0, 4.5), (112.0, 9.0)])
def test_the_papers_pairs_just_fit(pair: tuple[float, float]) -> None:
    p_max, v_max = pair
    assert Recipe(**FP16_SUMS, p_max=p_max, v_max=v_max).promotion_keys(Geometry()) == 64
    with pytest.raises(InvalidRecipeError, match=r"96 · .* overflows FP16"):
        Recipe(accumulator="fp8_f16", keys_per_promotion=96, p_max=p_max, v_max=v_max)


def test_v_tile_means_in_text_and_json() -> None:
    r = recipe("fast_8b:v_max=4,v_tile_means=true")
    assert r.v_tile_means
    assert Recipe.from_json(r.to_json()) == r
    assert Recipe(**TILE_MEANS).v_tile_means  # every tile promoted
    assert not Recipe().v_tile_means


def test_range_has_room_for_approximated_exponentials():
    """P_r itself would round to 14, and 1.007 P_r rounds to 15."""
    recipe("fast_8b").replace(p_max=14.39)
    with pytest.raises(InvalidRecipeError, match=r"1024 · 15 · 4.5 = 69120 .* overflows FP16"):
        recipe("fast_8b").replace(p_max=14.41)


def test_all_reasons_are_reported() -> None:
    with pytest.raises(InvalidRecipeError) as error:
        Recipe(qk_bits=None, smooth_q=True, p_max=500.0, v_max=449.0, accumulator="int32", softmax_max=TileMax(),
               keys_per_promotion="never", promote_first_tile=True, row_sum="accumulator",
               v_granularity=PerChannelAndKeyTile())  # fmt: skip
    starts = ("smooth_q", "smooth_k", "p_max=500", "v_max=449", "accumulator=int32 cannot", "integer sums",
              "softmax_max=tile", "v_granularity=", "promote_first_tile", "row_sum=accumulator is",
              "row_sum=accumulator drifts")  # fmt: skip
    assert sorted(error.value.reasons) == sorted(
        reason for start in starts for reason in error.value.reasons if reason.startswith(start)
    )
    assert len(error.value.reasons) == len(starts)
    with pytest.raises(InvalidRecipeError) as error:
        Recipe(qk_bits=5, pv_format="x", p_max="1", v_headroom=0.0, keys_per_promotion=1, smooth_q=None)
    assert len(error.value.reasons) == 6


@pytest.mark.parametrize("slack", [0.0, -1.0, 60.5, math.nan, math.inf])
def test_a_slack_that_leaves_fp32_is_refused(slack: float) -> None:
    with pytest.raises(InvalidArgumentError, match="slack"):
        RestartedMax(slack)


@pytest.mark.parametrize("jump", [0.0, -1.0, 60.5, math.nan, True, "4"])
def test_a_jump_is_a_positive_exponent(jump: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="jump"):
        RestartedMax(20.0, 4.0, jump)


@pytest.mark.parametrize(
    ("maximum", "text"),
    [
        (RestartedMax(20.0, 0.0, 4.0), "restarted(20;0;4)"),
        (RestartedMax(12.5, 2.25, 1 / 3), f"restarted(12.5;2.25;{1 / 3!r})"),
        (RestartedMax(20.0, 4.0), "restarted(20;4)"),
    ],
)
def test_text_and_json_keep_a_jump(maximum: RestartedMax, text: str) -> None:
    r = RECIPES["fast_8b"].replace(softmax_max=maximum)
    assert str(maximum) == text
    assert Recipe.from_json(r.to_json()) == r == recipe(f"fast_8b:softmax_max={text}")


@pytest.mark.parametrize(
    ("changes", "geometry", "bits"),
    [
        ({}, Geometry(64, 128, 16), 3),  # 1024 keys are 8 tiles; P_r = 14 becomes 112
        ({}, Geometry(128, 64, 32), 4),
        ({"keys_per_promotion": 384}, Geometry(64, 128, 16), 1),  # a power of two, whose products round alike
        ({"keys_per_promotion": 128}, Geometry(64, 128, 16), None),  # every tile has an interval of its own
        ({"p_max": 56.0, "v_max": 1.0}, Geometry(64, 128, 16), 2),  # 448 is E4M3's largest, and .7 % more not in it
        ({"softmax_max": RestartedMax(20.0, 4.0, 2.5)}, Geometry(64, 128, 16), 2),
        ({"softmax_max": RestartedMax(20.0, 4.0)}, Geometry(64, 128, 16), None),
        ({"softmax_max": RunningMax()}, Geometry(64, 128, 16), None),
    ],
)
def test_what_a_tile_that_jumps_gains(changes: dict[str, Any], geometry: Geometry, bits: int | None) -> None:
    r = RECIPES["fast_8b"].replace(**changes)
    assert r.jump_bits(geometry) == bits
    if bits is not None:
        assert geometry.b_k * r.p_max * 2**bits * r.v_max <= 65504


@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_a_sample_needs_a_number_of_tokens(count: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="count"):
        SampledTokens(count)


def test_recipes_are_frozen_hashable_and_compare_by_options() -> None:
    r = recipe("sage2_8b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        r.p_max = 1.0  # type: ignore[misc]
    assert len({*RECIPES.values()}) == len(RECIPES)
    assert Recipe(name="a", summary="b") == Recipe() == r.replace(row_sum="unrounded")
    assert hash(Recipe(name="a")) == hash(Recipe())
    changed = r.replace(v_max=4.5, k_sample=SampledTokens(9))
    assert changed.name == "sage2_8b:v_max=4.5,k_sample=sampled(9)"
    assert (r.v_max, r.k_sample, r.name) == (448.0, AllTokens(), "sage2_8b")
    assert r.replace(name="x", p_max=1.0).name == "x"
    with pytest.raises(InvalidRecipeError, match="p_max=500"):
        r.replace(p_max=500.0)


ADA, HOPPER = Geometry(128, 64, 32), Geometry(64, 128, 16)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("geometry", [ADA, HOPPER], ids=str)
def test_every_named_recipe_fits_both_machines(name: str, geometry: Geometry) -> None:
    r = recipe(name)
    r.check_geometry(geometry)
    expected = {"tile": geometry.b_k, "never": None}.get(r.keys_per_promotion, r.keys_per_promotion)
    assert r.promotion_keys(geometry) == expected


U8 = {**INT8_PV, "pv_format": "u8", "p_max": 255.0}
PER_TILE_F16 = {"accumulator": "fp8_f16", "p_max": 224.0, "v_max": 4.5}


@pytest.mark.parametrize(
    ("options", "geometry", "parts"),
    [
        ({"keys_per_promotion": 96}, Geometry(128, 64, 32), ["keys_per_promotion=96", "b_k=64"]),
        ({"keys_per_promotion": 64}, Geometry(128, 96, 32), ["keys_per_promotion=64", "b_k=96"]),
        (PER_TILE_F16, Geometry(128, 96, 32), ["96 · 224 · 4.5 = 96768", "65504"]),
        (U8, Geometry(128, 66336, 32), ["66336 · 255 · 127", "INT32"]),
    ],
)
def test_tiles_that_do_not_fit_are_refused(options: dict[str, Any], geometry: Geometry, parts: list[str]) -> None:
    with pytest.raises(InvalidRecipeError) as error:
        Recipe(**options).check_geometry(geometry)
    for part in (*parts, str(geometry)):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("options", "b_k"),
    [({"keys_per_promotion": 64}, 128), ({"keys_per_promotion": 128}, 64), (PER_TILE_F16, 64), (U8, 66304)],
)
def test_tiles_that_just_fit_are_accepted(options: dict[str, Any], b_k: int) -> None:
    Recipe(**options).check_geometry(Geometry(128, b_k, 32))


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "fp16"])
def test_the_largest_rounded_number_is_the_formats_own_rounding(name: str) -> None:
    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "fp16": np.float16}[name]
    largest = {"e4m3": 448.0, "e5m2": 57344.0, "fp16": 65504.0}[name]
    for value in [*np.geomspace(0.05, largest, 500), 310.0, 3.3, 232.0, 240.0, 2.375, largest]:
        value = float(np.float32(value))
        assert largest_rounded(value, name) == float(np.float32(value).astype(dtype))

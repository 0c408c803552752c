"""What attention_mma says it can run, and what `auto` does with it, on cards that are played by their capability."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from lowbit_attention import RECIPES, Recipe, recipe
from lowbit_attention.backends import budget
from lowbit_attention.backends.cuda import hopper, mma
from lowbit_attention.backends.cuda.instances import MMA_RECIPES, mma_recipes
from lowbit_attention.backends.cuda.jit import bindings
from lowbit_attention.backends.cuda.mma import MMA_KERNEL
from lowbit_attention.backends.dispatch import AUTO_MIN_LENGTH, explain_request
from lowbit_attention.call.request import Request, device_name
from lowbit_attention.recipes.machine import MACHINES

DEVICE = torch.device("cuda", 0)
CARDS = {
    "sm_80": (8, 0), "sm_86": (8, 6), "sm_86 (8.7)": (8, 7), "sm_89": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0),
    "sm_100 (10.3)": (10, 3), "sm_120": (12, 0), "sm_120 (12.1)": (12, 1),
}  # fmt: skip
UNKNOWN = [(7, 0), (7, 5), (11, 0), (13, 0)]
CACHED = (mma._arch, mma._device_reasons, mma._recipe_reasons, hopper._device_reasons, device_name)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[tuple[int, int]], None]]:
    """Sets the capability of every CUDA device; there is none."""

    def become(capability: tuple[int, int]) -> None:
        for cached in CACHED:
            cached.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: f"a card of {capability}")

    yield become
    monkeypatch.undo()
    for cached in CACHED:
        cached.cache_clear()


def request(r: Recipe | None = None, **changes: Any) -> Request:
    plain = Request(
        recipe=r, machine=None, batch=1, q_heads=8, kv_heads=2, q_len=5000, kv_len=5000, head_dim=128, v_head_dim=128,
        dtype=torch.bfloat16, device=DEVICE,
    )  # fmt: skip
    return replace(plain, **changes)


def reasons(r: Recipe, **changes: Any) -> tuple[str, ...]:
    return MMA_KERNEL.not_supported_reasons(request(r, **changes), r)


@pytest.mark.parametrize("name", MMA_RECIPES)
@pytest.mark.parametrize("arch", CARDS)
def test_every_recipe_runs_where_the_manifest_has_it(card: Any, arch: str, name: str) -> None:
    card(CARDS[arch])
    runs = name in mma_recipes(arch.split()[0])
    found = reasons(RECIPES[name])
    assert (found == ()) == runs
    if not runs:
        assert found == (f"{arch.split()[0]} has no FP8",)


@pytest.mark.parametrize("capability", UNKNOWN)
def test_other_cards_are_refused_with_both_numbers(card: Any, capability: tuple[int, int]) -> None:
    card(capability)
    (reason,) = reasons(RECIPES["sage2pp_4b"])
    assert f"this card has {capability[0]}.{capability[1]}" in reason
    assert "8.0, 8.6, 8.7, 8.9, 9.0, 10.0, 10.3, 12.0, 12.1" in reason


def test_the_cpu_is_refused() -> None:
    assert reasons(RECIPES["sage2_4b"], device=torch.device("cpu")) == ("it runs on NVIDIA GPUs, not on cpu",)


def test_a_missing_compiler_is_told(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card((8, 9))
    monkeypatch.setattr(bindings, "find_spec", lambda name: None)
    (reason,) = reasons(RECIPES["sage2_4b"])
    assert "lowbit-attention[cuda13]" in reason


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"dtype": torch.float64}, "torch.float64"),
        ({"mask": "float"}, "float mask"),
        ({"head_dim": 129}, "head_dim 129 is above 128"),
        ({"v_head_dim": 200}, "head_dim 200 is above 128"),
        ({"machine": MACHINES["sm_89"]}, "like='sm_89'"),
        ({"q_len": 0}, "empty"),
        ({"kv_len": 0}, "empty"),
        ({"kv_len": (1 << 30) + 1}, "1073741824"),
        ({"needs_grad": True}, "gradient"),
        ({"dropout_p": 0.5}, "dropout"),
    ],
)
def test_what_a_request_may_not_ask(card: Any, changes: dict[str, Any], part: str) -> None:
    card((8, 9))
    found = reasons(RECIPES["sage2pp_8b"], **changes)
    assert len(found) == 1
    assert part in found[0]


@pytest.mark.parametrize("shape", [(1, 1, 1, 5000), (1, 8, 1, 5000), (1, 1, 5000, 1), (1, 8, 5000, 5000)])
@pytest.mark.parametrize("causal", [False, True])
def test_bool_masks_are_taken(card: Any, shape: tuple[int, int, int, int], causal: bool) -> None:
    card((8, 9))
    mask = {"mask": "bool", "mask_dtype": torch.bool, "mask_shape": shape, "is_causal": causal}
    assert reasons(RECIPES["sage2pp_8b"], **mask) == ()


def test_more_heads_than_a_grid_has_rows_are_taken(card: Any) -> None:
    card((8, 9))
    assert reasons(RECIPES["sage2pp_8b"], batch=8192, q_heads=8) == ()


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("exact", ["it quantises, and recipe exact does not"]),
        ("int8_u8", ["pv_format=u8", "softmax_max=tile", "accumulator=int32", "row_sum=rounded"]),
        ("smooth_attn", ["smoothquant_alpha=0.5"]),
        ("fast_8b", ["v_tile_means=True", "softmax_max=restarted(20;4;4)", "not after 1024"]),
        ("sage2_8b:pv_format=e5m2", ["pv_format=e5m2", "row_sum=accumulator with e5m2"]),
        ("sage2_8b:q_granularity=per_token", ["q_granularity=per_token"]),
        ("sage2_8b:k_granularity=per_tensor", ["k_granularity=per_tensor"]),
        ("sage2_8b:k_sample=sampled(1025)", ["k_sample=sampled(1025) (at most 1024"]),
        ("sage2_8b:v_sample=sampled(32)", ["v_sample=sampled(32)"]),
        ("sage2_8b:v_headroom=1.5", ["v_headroom=1.5"]),
        ("sage2_8b:v_granularity=per_channel_and_key_tile", ["v_granularity=per_channel_and_key_tile"]),
        ("sage2_8b:accumulator=fp32,row_sum=unrounded", ["no e4m3 P·V with fp32 sums"]),
        ("sage2_8b:keys_per_promotion=128", ["every 64 keys or never, not every 128"]),
        ("sage2pp_8b:keys_per_promotion=32", ["every 64 keys, not after 32"]),
        ("sage1:keys_per_promotion=128", ["adds fp16 sums every 64 keys, not after 128"]),
        ("sage2_8b:row_sum=rounded", ["row_sum=rounded"]),
        ("sage1:row_sum=accumulator", ["row_sum=accumulator with fp16"]),
        ("sage2_8b:v_max=100", ["v_max=100 is no E4M3 number"]),
    ],
)
def test_every_option_that_it_lacks_is_named(card: Any, spec: str, parts: list[str]) -> None:
    card((8, 9))
    found = reasons(recipe(spec))
    assert len(found) == len(parts)
    for part in parts:
        assert any(part in reason for reason in found), (part, found)


@pytest.mark.parametrize(
    "spec",
    [
        "sage2_8b:smooth_q=true",
        "sage2_8b:smooth_v=true,smooth_k=false",
        "sage2_8b:rotation=hadamard",
        "sage2_8b:q_granularity=per_block,k_granularity=per_warp",
        "sage2_8b:keys_per_promotion=never,row_sum=unrounded",
        "sage2_8b:keys_per_promotion=64",
        "sage2pp_8b:p_max=448,v_max=2.25,row_sum=unrounded",
        "int8_fp16:smooth_q=true,rotation=hadamard",
        "int8_fp16:qk_bits=4",
        "sage1:accumulator=fp32",
    ],
)
def test_the_options_that_it_has(card: Any, spec: str) -> None:
    card((8, 9))
    assert reasons(recipe(spec)) == ()


@pytest.mark.parametrize(
    ("head_dims", "wanted"),
    [((64, 64), None), ((36, 36), None), ((72, 72), None), ((128, 40), None), ((64, 128), 64), ((32, 32), 32),
     ((8, 8), 8), ((20, 100), 32)],
)  # fmt: skip
def test_rotations_that_its_padding_does_not_fit(card: Any, head_dims: tuple[int, int], wanted: int | None) -> None:
    """It rotates as many channels as it is compiled for; the method, as many as the next power of two says."""
    card((8, 9))
    sizes = {"head_dim": head_dims[0], "v_head_dim": head_dims[1]}
    assert reasons(RECIPES["sage2pp_4b"], **sizes) == ()
    found = reasons(RECIPES["rotated_4b"], **sizes)
    if wanted is None:
        assert found == ()
    else:
        padded = 64 if max(head_dims) <= 64 else 128
        assert found == (f"it rotates {padded} channels, and head_dim {head_dims[0]} wants {wanted}",)


def test_every_reason_is_told_at_once(card: Any) -> None:
    card((8, 6))
    found = reasons(
        RECIPES["rotated_4b"].replace(v_headroom=2.0),
        head_dim=64, v_head_dim=128, mask="float", needs_grad=True, dtype=torch.float64,
    )  # fmt: skip
    text = "; ".join(found)
    for part in ("sm_86 has no FP8", "v_headroom", "rotates 128", "float mask", "gradient", "float64"):
        assert part in text
    assert len(found) == 6


@pytest.mark.parametrize(
    ("arch", "runs", "says"),
    [
        ("sm_80", "int8_fp16", ""),
        ("sm_86", "int8_fp16", ""),
        ("sm_89", "sage2pp_8b", ""),
        ("sm_90", None, "no gain over exact attention"),
        ("sm_100", None, "no gain over exact attention"),
        ("sm_120", "sage2pp_8b", ""),
    ],
)
def test_auto_by_card(card: Any, monkeypatch: pytest.MonkeyPatch, arch: str, runs: str | None, says: str) -> None:
    """INT8 and FP16 P·V where there is no FP8, FP8 with FP16 sums on Ada and consumer Blackwell, nothing elsewhere."""
    errors = {"sm_89": {name: {"normal": {4096: 0.04}} for name in ("sage2_8b", "sage2pp_8b", "int8_fp16", "fast_8b")}}
    monkeypatch.setattr(budget, "measured", lambda: errors)
    card(CARDS[arch])
    told = explain_request(request(q_len=AUTO_MIN_LENGTH, kv_len=AUTO_MIN_LENGTH))
    verdicts = [v for v in told.verdicts if v.implementation == "attention_mma"]
    assert verdicts
    if runs is None:
        assert told.implementation != "attention_mma"
        assert all(says in "; ".join(v.reasons) for v in verdicts)
    else:
        assert (told.implementation, told.recipe) == ("attention_mma", runs)
        short = explain_request(request(q_len=AUTO_MIN_LENGTH - 1, kv_len=AUTO_MIN_LENGTH))
        assert short.implementation != "attention_mma"


@pytest.mark.parametrize("name", MMA_RECIPES)
@pytest.mark.parametrize("arch", CARDS)
def test_a_named_recipe_goes_to_it_or_says_why_not(card: Any, arch: str, name: str) -> None:
    card(CARDS[arch])
    told = explain_request(request(RECIPES[name]))
    (verdict,) = (v for v in told.verdicts if v.implementation == "attention_mma")
    if arch == "sm_90" and name in ("sage2_8b", "sage2pp_8b"):
        assert told.implementation == "attention_wgmma"
    elif name in mma_recipes(arch.split()[0]):
        assert told.implementation == "attention_mma"
        emulated = "made of others: right, not fast" in verdict.reasons[0]
        assert emulated == (arch.split()[0] in ("sm_90", "sm_100"))
    else:
        assert told.implementation == "emulation"
        assert verdict.reasons == (f"{arch.split()[0]} has no FP8",)


@pytest.mark.parametrize(
    ("arch", "machine"),
    [("sm_80", "sm_80"), ("sm_86", "sm_80"), ("sm_89", "sm_89"), ("sm_90", "sm_80"), ("sm_120", "sm_120a")],
)
def test_whose_numbers_it_gives(card: Any, arch: str, machine: str) -> None:
    """Ada's tiles everywhere; FP22 on Ada, true FP32 on consumer Blackwell, FP16 MMAs elsewhere."""
    card(CARDS[arch])
    found = MMA_KERNEL.machine(DEVICE)
    assert found == MACHINES[machine]
    assert (found.geometry.b_q, found.geometry.b_k, found.geometry.warp_rows) == (128, 64, 32)


@pytest.mark.parametrize(
    ("arch", "native"), [("sm_89", True), ("sm_90", False), ("sm_120", False), ("sm_120 (12.1)", False)]
)
def test_4_bits_in_int8_lanes_are_told(card: Any, arch: str, native: bool) -> None:
    """Consumer Blackwell has no INT4 MMA: a 4-bit recipe runs with INT8's speed there, and `explain` says so."""
    card(CARDS[arch])
    told = explain_request(request(RECIPES["sage2pp_4b"]))
    assert told.implementation == "attention_mma"
    (verdict,) = (v for v in told.verdicts if v.chosen)
    assert ("4-bit numbers lie in INT8 lanes" in "; ".join(verdict.reasons)) == (not native)
    (eight,) = (v for v in explain_request(request(RECIPES["int8_fp16"])).verdicts if v.chosen)
    assert "4-bit" not in "; ".join(eight.reasons)

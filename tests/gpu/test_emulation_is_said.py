"""What no kernel can run says so on a card, once, and a call on a kernel says nothing."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("cuda.core", reason="needs the extra cuda12 or cuda13")

import wgmma_cases
from kernel_cases import hopper_only

from lowbit_attention import (
    EmulationRefusedError,
    EmulationWarning,
    attention,
    explain,
    make_sdpa,
    sdpa_enabled,
)
from lowbit_attention.call.memo import forget_all

pytestmark = hopper_only


@pytest.fixture(scope="module", autouse=True)
def compiled():
    wgmma_cases.compile_everything()


@pytest.fixture(autouse=True)
def nothing_was_said():
    forget_all()
    yield
    forget_all()


def qkv(dim=64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 300, dim, generator=g).to("cuda", torch.bfloat16) for _ in range(3)]


def told(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is EmulationWarning]


MASK = torch.zeros(300, 300, dtype=torch.float64)
CALLS = {
    "mask": (64, {"attn_mask": MASK}, "it takes float masks of float16, bfloat16 and float32, not torch.float64"),
    "head_dim": (256, {}, "head_dim 256 is above 128"),
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("door", ["attention", "make_sdpa", "sdpa_enabled", "compiled"])
def test_it_is_said_once(door, case):
    dim, options, reason = CALLS[case]
    q, k, v = qkv(dim)
    options = {name: value.cuda() for name, value in options.items()}

    def in_a_block():
        with sdpa_enabled(recipe="sage2_8b"):
            F.scaled_dot_product_attention(q, k, v, **options)

    calls = {
        "attention": lambda: attention(q, k, v, recipe="sage2_8b", **options),
        "make_sdpa": lambda: make_sdpa("sage2_8b")(q, k, v, **options),
        "sdpa_enabled": in_a_block,
        "compiled": lambda: torch.compile(
            lambda *t: attention(*t, recipe="sage2_8b", **options) + 1, fullgraph=True, backend="aot_eager"
        )(q, k, v),
    }
    with torch.no_grad():
        (text,) = told(calls[door])
        assert f"attention_wgmma: {reason}" in text
        assert f"attention_mma: {reason}" in text
        assert "NVIDIA" in text
        assert not told(calls[door])
    assert not told(lambda: attention(q, k, v, **options))  # what the warning advises


def test_error_allow_and_like():
    q, k, v = qkv()
    call = partial(attention, q, k, v, recipe="sage2_8b", attn_mask=MASK.cuda())
    with pytest.raises(
        EmulationRefusedError,
        match=r"attention_wgmma: it takes float masks of float16, bfloat16 and float32, not torch\.float64",
    ):
        call(on_emulation="error")
    with sdpa_enabled(recipe="sage2_8b", on_emulation="error"), pytest.raises(EmulationRefusedError):
        F.scaled_dot_product_attention(q, k, v, MASK.cuda())
    assert explain(q, k, v, recipe="sage2_8b", attn_mask=MASK.cuda(), on_emulation="error").implementation is None
    assert not told(lambda: call(on_emulation="allow"))
    assert not told(lambda: call(like="sm_90a"))


@pytest.mark.parametrize("on_emulation", ["warn", "error", "allow"])
def test_a_kernels_call_says_nothing(on_emulation):
    q, k, v = qkv()
    call = partial(attention, q, k, v, recipe="sage2_8b")
    assert not told(lambda: call(on_emulation=on_emulation))
    assert torch.equal(call(on_emulation=on_emulation), call())
    with sdpa_enabled(recipe="sage2_8b", on_emulation=on_emulation) as report:
        assert not told(lambda: F.scaled_dot_product_attention(q, k, v))
    assert report.by_implementation() == {"attention_wgmma": 1}

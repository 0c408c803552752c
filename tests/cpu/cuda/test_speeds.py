"""What ``auto`` knows of a card that was timed: the smallest of the nearest measurements, and nothing far away."""

import pytest
import torch

from lowbit_attention import recipe
from lowbit_attention.backends.cuda import hopper, speeds
from lowbit_attention.backends.dispatch import explain_request
from lowbit_attention.call.request import Request

FAST = recipe("fast_8b")


@pytest.fixture(autouse=True)
def h200(monkeypatch):
    monkeypatch.setattr(speeds, "device_name", lambda device: "NVIDIA H200")


def request(slices=24, q_len=4608, kv_len=None, head_dim=128, is_causal=False):
    return Request(
        None, None, 1, slices, slices, q_len, kv_len or q_len, head_dim, head_dim, torch.bfloat16,
        torch.device("cuda", 0), is_causal=is_causal,
    )  # fmt: skip


def row(speedup, slices=8, q_len=1024, kv_len=None, recipe="fast_8b", head_dim=128, is_causal=False):
    return speeds.Measured(recipe, head_dim, is_causal, slices, q_len, kv_len or q_len, speedup)


def test_a_shape_that_was_timed_has_no_more_than_its_own_speedup():
    for measured in speeds._table():
        found = speeds.speedup(
            request(measured.slices, measured.q_len, measured.kv_len, measured.head_dim, measured.is_causal),
            recipe(measured.recipe),
        )
        assert found is not None
        assert found <= measured.speedup


def test_the_smallest_of_the_nearest(monkeypatch):
    monkeypatch.setattr(speeds, "_table", lambda: (row(1.2), row(0.9, q_len=2048), row(0.1, q_len=8192)))
    assert speeds.speedup(request(8, 1100), FAST) == 1.2
    assert speeds.speedup(request(8, 1448), FAST) == 0.9  # half an octave from both
    assert speeds.speedup(request(8, 2000), FAST) == 0.9
    assert speeds.speedup(request(8, 100_000), FAST) == 0.1  # longer than any counts as the longest


def test_nothing_alike_is_not_timed(monkeypatch):
    monkeypatch.setattr(speeds, "_table", lambda: (row(2.0),))
    assert speeds.speedup(request(8, 1024), FAST) == 2.0
    for other in (
        request(8, 1024, head_dim=64),
        request(8, 1024, is_causal=True),
        request(1, 8),  # 3 octaves of heads and 7 of tokens away
    ):
        assert speeds.speedup(other, FAST) is None
    assert speeds.speedup(request(8, 1024), recipe("sage2_8b")) is None
    assert speeds.speedup(request(8, 1024), recipe("fast_8b:v_tile_means=false")) is None  # another recipe
    assert speeds.speedup(request(8, 1024, head_dim=72), FAST) == 2.0  # padded to 128


def test_other_cards_are_not_timed(monkeypatch):
    monkeypatch.setattr(speeds, "device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert speeds.speedup(request(), FAST) is None


def test_auto_takes_torch_where_it_is_faster_and_says_so(monkeypatch):
    monkeypatch.setattr(speeds, "_table", lambda: (row(0.7, 8, 4096), row(1.8, 40, 75600)))
    monkeypatch.setattr(hopper, "_device_reasons", lambda device: ())
    monkeypatch.setattr("lowbit_attention.backends.dispatch.device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr("lowbit_attention.call.request.device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr("lowbit_attention.backends.cuda.mma._arch", lambda device: "sm_90")
    monkeypatch.setattr("lowbit_attention.backends.cuda.mma._device_reasons", lambda device: ())
    long = explain_request(request(40, 75600))
    assert (long.implementation, long.recipe) == ("attention_wgmma", "fast_8b")
    assert "measured on NVIDIA H200: 1." in str(long)
    short = explain_request(request(8, 4096))
    assert short.implementation == "torch_sdpa"
    assert "measured on NVIDIA H200: 0." in str(short)
    assert "fast_8b is slower than torch" in str(short)  # so what is slower than that is not tried untimed

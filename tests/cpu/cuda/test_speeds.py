"""What ``auto`` expects of a card that was timed: a model of measured calls, and how far it is off."""

import importlib
import json
import random
from pathlib import Path

import pytest
import torch
from scipy.optimize import nnls

from lowbit_attention import recipe
from lowbit_attention.backends.cuda import hopper, speeds
from lowbit_attention.backends.cuda.speeds import CardModel, Sizes, features
from lowbit_attention.backends.dispatch import explain_request
from lowbit_attention.bench import cost_fit
from lowbit_attention.bench.cost_fit import fit
from lowbit_attention.call.request import Request

FAST = recipe("fast_8b")
DATA = Path(speeds.__file__).parents[2] / "data/hopper_costs.json"
fit_costs = importlib.import_module("fit_costs")


@pytest.fixture(autouse=True)
def h200(monkeypatch, tmp_path):
    monkeypatch.setattr(speeds, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path))
    speeds._tuned.cache_clear()
    yield
    speeds._tuned.cache_clear()


def speedup(request, recipe):
    return speeds.speedup(request, recipe, "attention_wgmma")


def request(slices=24, q_len=4608, kv_len=None, head_dim=128, is_causal=False):
    return Request(
        None, None, 1, slices, slices, q_len, kv_len or q_len, head_dim, head_dim, torch.bfloat16,
        torch.device("cuda", 0), is_causal=is_causal,
    )  # fmt: skip


def test_features_count_the_work():
    """Two heads of 300 rows and 500 keys in work tiles of 128 rows: 3 × 4 key tiles a head, without causality."""
    call = Sizes(1, 2, 1, 300, 500, 64, 32)
    assert features(call, 128, 132) == pytest.approx(
        (1, 500 * 96 * 2e-6, 2 * 300 * 96 * 2e-6, 24 / 132, 1 * 4, 6 / 132, 1, 4)
    )
    # bottom-right: the rows end at key 328, 456 and 500: 3, 4 and 4 tiles; top-left: 128, 256 and 300: 1, 2 and 3
    for offset, tiles in ((200, (3, 4, 4)), (0, (1, 2, 3))):
        found = features(call._replace(causal_offset=offset), 128, 132)
        assert found[3:] == pytest.approx((2 * sum(tiles) / 132, sum(tiles) / 3, 6 / 132, 1, max(tiles)))
    assert features(call._replace(batch=100), 128, 132)[6] == 5  # 600 work tiles on 132 multiprocessors


def test_the_fit_is_the_best_without_negative_coefficients():
    r = random.Random(0)
    rows = [([1.0, *(r.expovariate(1) for _ in range(4))], 0.0) for _ in range(80)]
    rows = [(sizes, r.uniform(0.8, 1.25) * (3 + 2 * sizes[1] + 0.5 * sizes[3])) for sizes, _ in rows]
    relative = torch.tensor([[size / us for size in sizes] for sizes, us in rows], dtype=torch.float64).numpy()
    best, residual = nnls(relative, torch.ones(80, dtype=torch.float64).numpy())
    found = torch.tensor(fit(rows), dtype=torch.float64).numpy()
    assert (found >= 0).all()
    assert ((relative @ found - 1) ** 2).sum() ** 0.5 <= residual * (1 + 1e-6)
    assert found == pytest.approx(best, abs=1e-3)


def test_the_data_are_the_fit_of_the_samples():
    found = CardModel.from_json(json.loads(DATA.read_text(encoding="utf-8")))
    assert found == CardModel.from_json(fit_costs.costs_json()), "run: make tables"
    assert speeds.shipped() == found
    assert found.rows["fast_8b"] == {"64": 256, "128": 192}


def test_calls_that_were_left_out_are_chosen_right():
    """Of every fifth sample, by the others: the goal, within 3 % in 95 of 100 calls and never above 10 %."""
    samples = cost_fit.samples_of(fit_costs.read())
    model = fit_costs.fitted(samples, {}, lambda number: number % cost_fit.FOLDS != 0)
    some = {label: times for i, (label, times) in enumerate(sorted(samples.items())) if i % cost_fit.FOLDS == 0}
    predicted = {
        label: {name: model.microseconds(cost_fit.sizes_of(cost_fit.parse_shape(label)), name) for name in times}
        for label, times in some.items()
    }
    assert len(some) >= 60
    found = cost_fit.losses(some, predicted, ("fast_8b",))
    assert len(found) == len(some)
    assert found[0][0] <= 0.1
    assert sum(loss <= 0.03 for loss, _ in found) >= 0.95 * len(found)
    wins = sum(times["fast_8b"] < times["torch"] for times in some.values())
    assert 10 < wins < len(some) - 10  # (neither is always the faster)


def test_every_sample_is_left_out_once():
    samples = {f"1x8x{n}x64": {"torch": 10.0 + n, "fast_8b": 30.0 + n / 2} for n in range(100, 160)}
    fitted_to = []

    def model_without(uses):
        fitted_to.append([number for number in range(60) if uses(number)])
        return cost_fit.card_model(samples, {"fast_8b": "k"}, lambda name, dim: 128, 10, {}, uses)

    predicted = cost_fit.left_out(samples, model_without)
    assert set(predicted) == set(samples)
    assert [len(some) for some in fitted_to] == [48] * 5
    assert sorted(n for some in fitted_to for n in set(range(60)) - set(some)) == list(range(60))
    assert max(cost_fit.offs(samples, predicted, "torch")) < 0.02
    # always torch's choice would be 1.7 times too slow at the longest: what it lost is what it says
    wrong = {label: {"torch": 1.0, "fast_8b": 2.0} for label in samples}
    worst, label = cost_fit.losses(samples, wrong, ("fast_8b",))[0]
    assert label == "1x8x159x64"
    assert worst == pytest.approx(169 / 109.5 - 1)


def test_few_calls_say_nothing():
    samples = {
        f"1x8x{n}x64:causal": {"torch": 10.0, "fast_8b": 5.0} for n in range(100, 100 + cost_fit.LEAST_CALLS - 1)
    }
    assert cost_fit.card_model(samples, {}, lambda name, dim: 128, 10, {}).coefficients == {}


# ---- what `lowbit tune` keeps


def test_what_was_tuned_comes_first_and_can_be_forgotten():
    assert speedup(request(), FAST) == pytest.approx(_ratio(speeds.shipped()))
    model = _one_model(ours=3.0, torchs=12.0)
    path = speeds.keep("NVIDIA H200", model)
    assert path == speeds.tuned_file("NVIDIA H200")
    assert speeds.model_of(torch.device("cuda", 0)) == model
    assert speedup(request(), FAST) == 4.0
    assert speedup(request(is_causal=True), FAST) is None
    assert speeds.speedup(request(), FAST, "attention_mma") is None  # (another kernel was timed)
    assert speeds.forget("NVIDIA H200") == path
    assert speeds.forget("NVIDIA H200") is None
    assert speedup(request(), FAST) == pytest.approx(_ratio(speeds.shipped()))


def test_a_card_that_nobody_knew_is_known_once_tuned(monkeypatch):
    monkeypatch.setattr(speeds, "device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert speedup(request(), FAST) is None
    speeds.keep("NVIDIA GeForce RTX 4090", _one_model(ours=10.0, torchs=12.0))
    assert speedup(request(), FAST) == pytest.approx(1.2)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"coefficients": 3}', "null", "half a fi"])
def test_a_file_that_is_none_is_said_and_left(text, caplog):
    path = speeds.tuned_file("NVIDIA H200")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert speedup(request(), FAST) == pytest.approx(_ratio(speeds.shipped()))
    assert "lowbit tune" in caplog.text


def test_numbers_that_do_not_fit_are_refused():
    good = json.loads(DATA.read_text(encoding="utf-8"))
    CardModel.from_json(good)
    for change in (
        {"multiprocessors": 0},
        {"rows": {}},
        {"coefficients": {"torch": {"64": {"False": [1.0]}}}},
        {"coefficients": {"torch": {"64": {"False": ["x"] * 8}}}},
    ):
        with pytest.raises((ValueError, KeyError)):
            CardModel.from_json(good | change)


def _one_model(ours, torchs):
    flat = lambda us: {"128": {"False": (us, *[0.0] * 7)}}  # noqa: E731
    return CardModel(
        {"gpu": "x"}, 100, {"fast_8b": "attention_wgmma"}, {"torch": {"128": 128}, "fast_8b": {"128": 192}},
        {"torch": flat(torchs), "fast_8b": flat(ours)},
    )  # fmt: skip


def _ratio(model):
    call = Sizes(1, 24, 24, 4608, 4608, 128, 128)
    return model.microseconds(call, "torch") / model.microseconds(call, "fast_8b")


def test_nothing_alike_is_not_timed():
    assert speedup(request(), FAST) > 1
    for other in (request(8, 63), request(8, 4096, 20)):
        assert speedup(other, FAST) is None
    assert speedup(request(), recipe("int8_u8")) is None
    assert speedup(request(), recipe("fast_8b:v_tile_means=false")) is None  # another recipe
    assert speedup(request(head_dim=200), FAST) is None


def test_fewer_channels_than_a_kernel_pads_to_are_doubts_for_torch():
    whole, half = (speedup(request(head_dim=dim), FAST) for dim in (128, 72))
    assert half < whole
    assert speedup(request(head_dim=64), FAST) > 1


def test_other_cards_are_not_timed(monkeypatch):
    monkeypatch.setattr(speeds, "device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert speedup(request(), FAST) is None


def test_auto_takes_torch_where_it_is_faster_and_says_so(monkeypatch):
    monkeypatch.setattr(hopper, "_device_reasons", lambda device: ())
    monkeypatch.setattr("lowbit_attention.backends.dispatch.device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr("lowbit_attention.call.request.device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr("lowbit_attention.backends.cuda.mma._arch", lambda device: "sm_90")
    monkeypatch.setattr("lowbit_attention.backends.cuda.mma._device_reasons", lambda device: ())
    long = explain_request(request(40, 75600))
    assert (long.implementation, long.recipe) == ("attention_wgmma", "fast_8b")
    assert "expected on NVIDIA H200: 1." in str(long)
    short = explain_request(request(8, 512))
    assert short.implementation == "torch_sdpa"
    assert "expected on NVIDIA H200: 0." in str(short)
    assert "fast_8b is slower than torch" in str(short)  # so what is slower than that is not tried untimed

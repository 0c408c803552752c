"""Cost tables: what they hold, where it comes from, and what `tune` does without a GPU."""

import json
import math
from importlib import resources
from pathlib import Path

import pytest
import torch

from lowbit_attention import RECIPES, InvalidArgumentError, UnsupportedError
from lowbit_attention.adaptive import CostTable, Rate, cost_table, tune, tuning
from lowbit_attention.backends import registry
from lowbit_attention.backends.base import Emulation
from lowbit_attention.bench.shapes import parse_shape
from lowbit_attention.bench.timing import Limits

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "h200.csv"


def test_ada_is_what_the_papers_claim():
    table = cost_table("sm_89")
    shape = parse_shape("1x24x32768x128")
    claimed = {"exact": 164, "sage1": 322, "sage2_8b": 431, "sage2_4b": 489, "sage2pp_8b": 493, "sage2pp_4b": 640}
    for name, tops in claimed.items():
        assert table.seconds(name, shape) == pytest.approx(shape.flops / (tops * 1e12))
        assert "claimed" in table.provenance(name)
    assert "claimed" in table.summary
    assert table.provenance("rotated_4b").startswith("assumed")
    assert table.provenance("int8_fp16").startswith("derived")
    assert not table.prices("fast_8b")


def test_a_variation_has_its_recipes_rate():
    table = cost_table("sm_89")
    shape = parse_shape("1x2x1024x128")
    assert table.seconds("sage2_4b:rotation=hadamard", shape) == table.seconds("sage2_4b", shape)


def test_hopper_is_what_was_measured():
    held = json.loads(resources.files("lowbit_attention").joinpath("data/sm_90_costs.json").read_text())
    assert held == tuning.read_benchmark(RESULTS)  # made from the rows, and not changed by hand
    table = cost_table("sm_90")
    assert "measured" in table.provenance("sage2_8b")
    flux = parse_shape("1x24x4608x128")
    assert 670 < flux.flops / table.seconds("sage2_8b", flux) / 1e12 < 700
    assert 295e-6 < table.seconds("fast_8b", flux) < 320e-6
    for name, recipe in RECIPES.items():
        assert table.saves(name) == (recipe.qk_bits != 4)
        if recipe.qk_bits == 4 and name in table.rates:
            eight = "sage2pp_8b" if recipe.accumulator == "fp8_f16" else "sage2_8b"
            assert table.seconds(name, flux) == table.seconds(eight, flux)
    assert not table.prices("int8_u8")


def test_between_points_it_is_linear_in_logarithms():
    rate = Rate({128: ((1e9, 100.0), (4e9, 400.0)), 64: ((1e9, 50.0),)}, "made up")
    one = parse_shape("1x1x1000x128")  # 5.12e8 operations
    assert rate.tops(one) == pytest.approx(100)
    at = parse_shape("1x1x2000x128").flops
    assert at == 2.048e9
    assert rate.tops(parse_shape("1x1x2000x128")) == pytest.approx(100 * (at / 1e9))  # four times in two octaves
    assert rate.tops(parse_shape("1x1x9000x128")) == pytest.approx(400)
    assert rate.tops(parse_shape("1x1x9000x64")) == pytest.approx(50)
    assert rate.tops(parse_shape("1x1x9000x80")) == pytest.approx(50)  # the nearest head dimension


def test_unknown():
    with pytest.raises(InvalidArgumentError, match="unknown cost table 'sm_100'"):
        cost_table("sm_100")
    with pytest.raises(InvalidArgumentError, match="no price for fast_8b: a recipe for Hopper"):
        cost_table("sm_89").seconds("fast_8b", parse_shape("1x1x64x64"))


def test_tuning_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        tune([parse_shape("1x1x64x64")], ["sage2_8b"])


class Pretended(Emulation):
    """An emulation that says it is a kernel for one recipe."""

    name = "pretended"
    is_kernel = True

    def not_supported_reasons(self, request, recipe):
        return () if recipe.name == "sage2_8b" else ("not mine",)


def test_tuning_times_kernels_and_leaves_emulations_out():
    kept = list(registry.IMPLEMENTATIONS)  # others hold the list itself
    registry.IMPLEMENTATIONS.insert(0, Pretended())
    limits = Limits(seconds=0.05, max_rounds=3, min_rounds=2)
    shapes = [parse_shape("1x2x128x32"), parse_shape("1x2x256x32"), parse_shape("1x2x128x32")]
    try:
        table = tune(shapes, ["sage2_8b", "sage2_4b"], device="cpu", dtype=torch.float32, limits=limits)
    finally:
        registry.IMPLEMENTATIONS[:] = kept
    assert isinstance(table, CostTable)
    assert table.name == "this"
    assert set(table.rates) == {"exact", "sage2_8b"}
    assert "no kernel runs it here (emulation would)" in table.why_not("sage2_4b")
    for rate in table.rates.values():
        assert len(rate.points[32]) == 2
        assert all(tops > 0 and math.isfinite(tops) for _, tops in rate.points[32])
    assert table.seconds("exact", shapes[1]) > 0

"""Observing, tuning and applying on a CUDA device; the kernel's part needs a Hopper card."""

import importlib.util

import cases
import pytest
import torch

from lowbit_attention import make_sdpa
from lowbit_attention.adaptive import Policy, choose, observe, tune
from lowbit_attention.bench.shapes import parse_shape
from lowbit_attention.bench.timing import Limits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
hopper_kernel = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0)
    or importlib.util.find_spec("cuda.core") is None,
    reason="needs a Hopper card and the extra cuda12 or cuda13",
)


def model_and_tokens(length=1024):
    model = cases.net(width=512, heads=4).to("cuda", torch.bfloat16)
    return model, cases.tokens(length, width=512).to("cuda", torch.bfloat16)


@torch.no_grad()
def test_scores_are_the_cpus():
    model, x = model_and_tokens()
    found = {}
    for device in ("cuda", "cpu"):
        model, x = model.to(device), x.to(device)
        with observe(model, ["sage2_8b", "sage2_4b"], like="sm_90a") as watch:
            model(x)
        found[device] = watch.observations
    for key, record in found["cuda"].records.items():
        for (
            name,
            score,
        ) in record.scores.items():  # (other linear layers, a little other inputs)
            assert score.l1 == pytest.approx(found["cpu"].records[key].scores[name].l1, rel=0.05)


@torch.no_grad()
def test_observing_leaves_the_output_alone():
    model, x = model_and_tokens()
    want = model(x)
    with observe(model, ["sage2_8b"]) as watch:
        assert torch.equal(model(x), want)
    assert watch.observations.scoring_seconds > 0


@hopper_kernel
@torch.no_grad()
def test_a_stored_policy_runs_the_kernel_and_gives_the_same_bits(tmp_path):
    model, x = model_and_tokens(4096)
    with observe(model, ["sage2_8b", "fast_8b"]) as watch:  # like=None: the kernels themselves are scored
        model(x)
    assert all(0 < s.l1 < 0.1 for r in watch.observations.records.values() for s in r.scores.values())
    choice = choose(watch.observations, threshold=0.0, recipes=("fast_8b",), cost="sm_90").uniform("fast_8b")
    choice.policy(model).save(tmp_path / "p.json")
    with Policy.load(tmp_path / "p.json").applied(model):
        first = model(x)
    with Policy.load(tmp_path / "p.json").applied(model):
        second = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            third = model(x)
        graph.replay()
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    y, kernel = x, make_sdpa("fast_8b")
    for layer in model.layers:
        q, k, v = (t.view(1, 4096, 4, 128).transpose(1, 2) for t in layer.qkv(y).chunk(3, -1))
        y = y + kernel(q, k, v).transpose(1, 2).reshape(1, 4096, 512)
    assert torch.equal(first, y)


@hopper_kernel
@torch.no_grad()
def test_compiled():
    model, x = model_and_tokens(2048)
    with observe(model, ["sage2_8b", "fast_8b"]) as watch:
        model(x)
    policy = choose(watch.observations, fraction=0.5, recipes=("fast_8b", "sage2_8b"), cost="sm_90").policy(model)
    with policy.applied(model):
        want = model(x)
    compiled = torch.compile(model, fullgraph=True)
    with policy.applied(compiled):
        found = compiled(x)
    assert float((found - want).abs().mean() / want.abs().mean()) < 0.01


@hopper_kernel
def test_this_card_is_tuned():
    limits = Limits(seconds=0.2, max_rounds=10)
    shapes = [parse_shape("1x8x2048x128"), parse_shape("1x8x8192x128")]
    table = tune(shapes, ["sage2_8b", "fast_8b", "int8_u8"], limits=limits)
    assert set(table.rates) == {"exact", "sage2_8b", "fast_8b"}
    assert "no kernel runs it here" in table.why_not("int8_u8")
    assert all(0 < table.seconds(name, shape) < 1 for name in table.rates for shape in shapes)

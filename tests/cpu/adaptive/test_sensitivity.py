"""End-to-end effects: one group at a time, by the model's own result."""

import cases
import pytest
import torch

from lowbit_attention import InvalidArgumentError
from lowbit_attention.adaptive import Policy, Sensitivity, observe, relative_l1, sensitivity
from lowbit_attention.recipes.named import EXACT, RECIPES


def steps(model):
    def run(applied=None):
        if applied is not None:
            applied.restart()
        x = cases.tokens()
        for _ in range(3):
            x = model(x)
        return x

    return run


@pytest.fixture(scope="module")
def model():
    model = cases.net()
    with torch.no_grad():
        model.layers[1].qkv.weight[:64] *= 6  # a layer whose queries are large: its logits suffer most
    return model


@pytest.fixture(scope="module")
def seen(model):
    with observe(model, ["sage2_8b", "sage2_4b"], timesteps="forwards", like="sm_89") as watch:
        steps(model)()
    return watch.observations


@pytest.mark.parametrize("by", ["layer", "timestep"])
def test_an_effect_is_that_of_its_group_alone(model, seen, by, tmp_path):
    told = []
    found = sensitivity(steps(model), seen, model=model, by=by, timesteps="forwards", advance=told.append)
    assert found.repeated == 0.0
    groups = seen.names if by == "layer" else seen.timesteps
    assert list(found.effects) == groups
    assert len(told) == 1 + 3 * 2
    exact = steps(model)()
    for group in groups:
        routes = {k: "sage2_4b" if found.group(k) == group else "exact" for k in seen.records}
        policy = Policy(routes, {"exact": EXACT, "sage2_4b": RECIPES["sage2_4b"]}, model=seen.model)
        with policy.applied(model, timesteps="forwards", like="sm_89") as applied:
            out = steps(model)(applied)
        assert found.effect(group, "sage2_4b") == relative_l1(exact, out) > 0
        assert found.effect(group, "sage2_8b") < found.effect(group, "sage2_4b")
        assert found.effect(group, "exact") == 0
    found.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == found


def test_of_a_number(model, seen):
    run = steps(model)
    found = sensitivity(
        lambda applied: float(run(applied).square().mean()),
        seen,
        model=model,
        recipes=["sage2_4b"],
        timesteps="forwards",
    )
    assert all(set(recipes) == {"sage2_4b"} and recipes["sage2_4b"] > 0 for recipes in found.effects.values())


def test_what_is_refused(model, seen):
    run = steps(model)
    with pytest.raises(InvalidArgumentError, match="by='head' is neither"):
        sensitivity(run, seen, model=model, by="head")
    with pytest.raises(InvalidArgumentError, match="sage1: not observed"):
        sensitivity(run, seen, model=model, recipes=["sage1"])
    with pytest.raises(InvalidArgumentError, match=r"metric gave -1\.0"):
        sensitivity(run, seen, model=model, metric=lambda a, b: -1.0, timesteps="forwards")
    with pytest.raises(InvalidArgumentError, match="no effect of sage1 in layer x"):
        Sensitivity("layer", {}, 0.0).effect("x", "sage1")

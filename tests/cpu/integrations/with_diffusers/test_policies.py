"""A policy through this door runs what it runs through `Policy.apply`: the same names, numbers and steps."""

import gc
import weakref

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, attention_backend
from tiny_models import BY_NAME

from lowbit_attention.adaptive import CallKey, Fingerprint, Policy, PolicyMismatchError, PolicyWarning, observe
from lowbit_attention.errors import InvalidArgumentError
from lowbit_attention.integrations.diffusers import register, unregister
from lowbit_attention.recipes.named import RECIPES

NAMES = ("FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel")
CANDIDATES = ("sage2_8b", "sage2_4b", "int8_fp16", "exact")


def policy_of(model, case, timesteps, steps):
    """One that changes its recipe from call to call and from step to step."""
    with observe(model, candidates=["int8_fp16"], timesteps=timesteps) as watch:
        drive(model, case, timesteps, steps)
    routes = {key: CANDIDATES[n % 4] for n, key in enumerate(watch.observations.records)}
    return Policy(routes, {name: RECIPES[name] for name in CANDIDATES}, model=Fingerprint.of(model))


def drive(model, case, timesteps, steps):
    outputs = []
    for _ in range(steps):
        outputs.append(case.run(model))
        if hasattr(timesteps, "step"):
            timesteps.step(torch.zeros(1, 4), timesteps.timesteps[len(outputs) - 1], torch.zeros(1, 4))
    return torch.cat(outputs)


def scheduler(steps):
    found = FlowMatchEulerDiscreteScheduler()
    found.set_timesteps(steps)
    return found


@pytest.mark.parametrize("kind", [None, "forwards", "scheduler"])
@pytest.mark.parametrize("name", NAMES)
def test_layers_and_steps(name, kind):
    case = BY_NAME[name]
    model = case.build()
    made = scheduler(3) if kind == "scheduler" else kind
    policy = policy_of(model, case, made, 3)
    assert len(set(policy.routes)) > 1
    made = scheduler(3) if kind == "scheduler" else kind
    with policy.applied(model, timesteps=made):
        wanted = drive(model, case, made, 3)
    exact = drive(model, case, None, 3)
    made = scheduler(3) if kind == "scheduler" else kind
    report = register(policy, timesteps=made)
    model.set_attention_backend("lowbit")
    assert torch.equal(drive(model, case, made, 3), wanted)
    assert not torch.equal(exact, wanted)
    by_recipe = {}
    for call, n in report.counts.items():
        by_recipe[call.recipe] = by_recipe.get(call.recipe, 0) + n
    assert sum(by_recipe.values()) == report.calls == 3 * len({(key.name, key.index) for key in policy.routes})
    if kind is not None:
        every = list(policy.routes.values())
        assert by_recipe == {recipe: every.count(recipe) for recipe in set(every)}


@pytest.mark.parametrize("name", NAMES)
def test_compiled_and_as_the_default(name):
    case = BY_NAME[name]
    model = case.build()
    policy = policy_of(model, case, "forwards", 2)
    with policy.applied(model, timesteps="forwards"):
        wanted = drive(model, case, None, 2)
    register(policy, timesteps="forwards")
    with attention_backend("lowbit"):
        assert torch.equal(drive(model, case, None, 2), wanted)
    torch._dynamo.reset()
    register(policy, timesteps="forwards")
    model.set_attention_backend("lowbit")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert (drive(compiled, case, None, 2) - wanted).abs().max() < 1e-2


@pytest.mark.parametrize("kind", ["forwards", "scheduler"])
def test_no_model_is_kept_alive(kind):
    case = BY_NAME["SD3Transformer2DModel"]
    model, made = case.build(), scheduler(2) if kind == "scheduler" else kind
    register(policy_of(model, case, made, 2), timesteps=made)
    model.set_attention_backend("lowbit")
    case.run(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_another_machines_numbers():
    case = BY_NAME["SD3Transformer2DModel"]
    model = case.build()
    policy = policy_of(model, case, None, 1)
    with policy.applied(model, like="sm_80"):
        wanted = case.run(model)
    register(policy, like="sm_80")
    model.set_attention_backend("lowbit")
    assert torch.equal(case.run(model), wanted)


def test_observing_a_model_that_has_the_backend():
    """`observe` sees every call, and the model's output is exact."""
    register("sage2_4b")
    for name in NAMES:
        case = BY_NAME[name]
        model = case.build()
        with observe(model, candidates=["int8_fp16"]) as watch:
            exact = case.run(model)
        model.set_attention_backend("lowbit")
        with observe(model, candidates=["int8_fp16"]) as again:
            assert torch.equal(case.run(model), exact)
        assert list(again.observations.records) == list(watch.observations.records)


def test_two_models_have_clocks_of_their_own():
    case = BY_NAME["SD3Transformer2DModel"]
    a, b = case.build(), case.build()
    policy = policy_of(a, case, "forwards", 2)
    with policy.applied(a, timesteps="forwards"):
        wanted = drive(a, case, None, 2)
    register(policy, timesteps="forwards")
    a.set_attention_backend("lowbit")
    b.set_attention_backend("lowbit")
    turns = [case.run(model) for model in (a, b, a, b)]
    assert torch.equal(torch.cat(turns[::2]), wanted)
    assert torch.equal(torch.cat(turns[1::2]), wanted)


def test_a_scheduler_is_let_go():
    case = BY_NAME["SD3Transformer2DModel"]
    model, made = case.build(), scheduler(2)
    policy = policy_of(model, case, made, 2)
    with policy.applied(model, timesteps=made):
        made.set_timesteps(2)
        wanted = drive(model, case, made, 2)
    own = dict(made.__dict__)
    for _ in range(2):
        register(policy, timesteps=made)
    model.set_attention_backend("lowbit")
    made.set_timesteps(2)
    assert torch.equal(drive(model, case, made, 2), wanted)
    unregister()
    assert {name for name in made.__dict__ if name in ("step", "set_timesteps")} == set()
    assert set(made.__dict__) == set(own)


def test_another_model():
    flux, sd3 = BY_NAME["FluxTransformer2DModel"], BY_NAME["SD3Transformer2DModel"]
    model, other = flux.build(), sd3.build()
    policy = policy_of(model, flux, None, 1)
    report = register(policy)
    with pytest.raises(PolicyMismatchError, match="another model"):
        other.set_attention_backend("lowbit")
    exact = sd3.run(other)
    with attention_backend("lowbit"), pytest.warns(PolicyWarning, match="another model than SD3Transformer2DModel"):
        assert torch.equal(sd3.run(other), exact)
    assert report.ran == 0
    assert "the policy was made for another model" in next(iter(report.fallbacks))


def test_policies_and_timesteps_that_cannot_be():
    numbered = Policy({CallKey("call 0", 0, 0.0): "exact"}, {"exact": RECIPES["exact"]})
    with pytest.raises(InvalidArgumentError, match="without a model"):
        register(numbered)
    with pytest.raises(InvalidArgumentError, match="with a policy only"):
        register("sage2_8b", timesteps="forwards")
    case = BY_NAME["SD3Transformer2DModel"]
    policy = policy_of(case.build(), case, None, 1)
    with pytest.raises(InvalidArgumentError, match="neither None"):
        register(policy, timesteps=7)

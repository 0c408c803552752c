"""Policies: files that say what they are, and routing that does what they say."""

import json
import shutil

import cases
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from lowbit_attention import RECIPES, InvalidArgumentError, make_sdpa, recipe
from lowbit_attention.adaptive import CallKey, Policy, PolicyMismatchError, PolicyWarning, choose, observe


def run(model, steps=3, length=160):
    return [model(cases.tokens(length, seed=t)) for t in range(steps)]


def observed(model, candidates=("sage2_8b", "sage2_4b"), steps=3):
    with observe(model, candidates, timesteps="forwards", like="sm_89") as watch:
        run(model, steps)
    return watch.observations


def mixed(model, **options):
    """A policy in which no two neighbours run the same."""
    seen = observed(model, **options)
    choice = choose(seen, fraction=0.5, recipes=("sage2_4b", "sage2_8b"))
    names = ("exact", "sage2_8b", "sage2_4b")
    chosen = {key: names[n % 3] for n, key in enumerate(seen.records)}
    return choice._with(chosen, "by hand").policy(model)


def by_hand(model, routes, x, step):
    """The model's output if every layer runs the recipe of ``routes``."""
    original = F.scaled_dot_product_attention
    try:
        for n, layer in enumerate(model.layers):
            name = routes[CallKey(f"layers.{n}", 0, float(step))]
            F.scaled_dot_product_attention = original if name == "exact" else make_sdpa(name)
            x = x + layer(x)
    finally:
        F.scaled_dot_product_attention = original
    return x


def test_every_call_runs_its_recipe():
    model = cases.net()
    policy = mixed(model)
    assert len(set(policy.routes.values())) == 3
    plain = run(model)
    with policy.applied(model, timesteps="forwards"):
        found = run(model)
    for t, out in enumerate(found):
        assert torch.equal(out, by_hand(model, policy.routes, cases.tokens(seed=t), t))
        assert not torch.equal(out, plain[t])
    assert all(torch.equal(a, b) for a, b in zip(run(model), plain, strict=True))  # and no more


def test_a_stored_policy_gives_bitwise_the_same(tmp_path):
    model = cases.net()
    policy = mixed(model)
    policy.save(tmp_path / "policy.json")
    stored = Policy.load(tmp_path / "policy.json")
    assert stored == policy
    with policy.applied(model, timesteps="forwards"):
        first = run(model)
    fresh = cases.net()  # another process would build the model again, too
    with stored.applied(fresh, timesteps="forwards"):
        second = run(fresh)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    stored.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "policy.json").read_bytes()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_it_gives_the_same_without_a_break(backend):
    model = cases.net()
    policy = mixed(model)
    with policy.applied(model, timesteps="forwards"):
        want = run(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with policy.applied(compiled, timesteps="forwards"):
        found = run(compiled)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert counter.frame_count == 1  # the timesteps recompile nothing
    torch._dynamo.reset()


def test_compiled_while_the_policy_knows_the_plain_model():
    model = cases.net()
    policy = mixed(model, steps=12)
    with policy.applied(model, timesteps="forwards"):
        want = run(model, 12)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with policy.applied(model, timesteps="forwards"):
        found = run(compiled, 12)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler, and none is here")
def test_compiled_by_inductor():
    model = cases.net(layers=2)
    policy = mixed(model)
    with policy.applied(model, timesteps="forwards"):
        want = run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with policy.applied(compiled, timesteps="forwards"):
        found = run(compiled)
    for a, b in zip(found, want, strict=True):
        assert float((a - b).abs().max()) < 1e-2  # a linear layer in another order moves a rounding here and there
    torch._dynamo.reset()


def test_under_autocast():
    model = cases.net(layers=2)
    with torch.autocast("cpu", torch.bfloat16):
        policy = mixed(model)
        assert all(r.dtype == "bfloat16" for r in observed(model, steps=1).records.values())
        with policy.applied(model, timesteps="forwards"):
            want = run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16), policy.applied(compiled, timesteps="forwards"):
        found = run(compiled)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    torch._dynamo.reset()


def test_steps_by_hand_and_by_a_handle():
    model = cases.net()
    policy = mixed(model)
    with policy.applied(model, timesteps="forwards"):
        want = run(model)
    handle = policy.apply(model)
    for t in range(3):
        handle.step(t)
        assert torch.equal(model(cases.tokens(seed=t)), want[t])
    handle.restart()
    handle.step(0)
    assert torch.equal(model(cases.tokens(seed=0)), want[0])
    handle.remove()
    handle.remove()
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def routes_only(routes, default="exact"):
    names = {*routes.values(), default}
    return Policy({CallKey(*k): r for k, r in routes.items()}, {n: recipe(n) for n in names}, default)


def outputs(policy, calls, model=None):
    """Which recipe each of ``calls`` ran: (name of the module or None, timestep)."""
    q, k, v = torch.randn(3, 1, 1, 64, 16, generator=torch.Generator().manual_seed(0))
    known = {"exact": F.scaled_dot_product_attention(q, k, v)}
    known |= {n: make_sdpa(n)(q, k, v) for n in ("sage2_8b", "sage2_4b", "int8_fp16")}
    found = []
    with policy.applied(model) as handle:
        for t in calls:
            handle.step(t)
            out = F.scaled_dot_product_attention(q, k, v)
            found.append(next(n for n, o in known.items() if torch.equal(o, out)))
    return found


def test_unknown_calls_run_the_default_and_unknown_timesteps_the_nearest():
    routes = {("call 0", 0, 900.0): "sage2_8b", ("call 0", 0, 100.0): "sage2_4b"}
    assert outputs(routes_only(routes), [900, 100, 850, 120, 5000]) == [
        "sage2_8b", "sage2_4b", "sage2_8b", "sage2_4b", "sage2_8b",
    ]  # fmt: skip
    unknown = {("call 7", 0, 0.0): "sage2_8b"}
    assert outputs(routes_only(unknown), [0]) == ["exact"]
    assert outputs(routes_only(unknown, "int8_fp16"), [0]) == ["int8_fp16"]


def test_a_name_with_one_recipe_runs_it_everywhere():
    model = cases.net(layers=2)
    seen = observed(model, steps=1)
    policy = choose(seen, threshold=0.0, recipes=("sage2_4b",)).policy(model)
    with policy.applied(model) as handle:
        out = model(cases.tokens(seed=5))
    assert not handle.routing.needs_clock
    everywhere = {CallKey(f"layers.{n}", 0, 0.0): "sage2_4b" for n in range(2)}
    assert torch.equal(out, by_hand(model, everywhere, cases.tokens(seed=5), 0))


def test_another_model_is_refused_or_warned_of():
    policy = mixed(cases.net())
    for other, message in ((cases.net(layers=2), "modules: 8, here 6"), (cases.net(width=32), "parameters")):
        with pytest.raises(PolicyMismatchError, match=message):
            policy.apply(other)
        with pytest.warns(PolicyWarning, match=message), policy.applied(other, strict=False):
            pass
    with pytest.raises(PolicyMismatchError, match="none was given"):
        policy.apply()
    with pytest.raises(PolicyMismatchError, match="made without a model"):
        routes_only({("call 0", 0, 0.0): "sage2_8b"}).apply(cases.net())


def test_the_weights_and_a_wrapper_do_not_matter():
    policy = mixed(cases.net(seed=0))
    with policy.applied(cases.net(seed=1)), policy.applied(torch.compile(cases.net(seed=2), backend="eager")):
        pass


def test_a_policy_for_a_model_needs_observations_of_it():
    choice = choose(cases.made_up(), budget=0.05)
    with pytest.raises(InvalidArgumentError, match="made without a model"):
        choice.policy(cases.net())
    seen = observed(cases.net())
    with pytest.raises(PolicyMismatchError, match="modules"):
        choose(seen, budget=0.5).policy(cases.net(layers=1))


def document(tmp_path):
    mixed(cases.net()).save(tmp_path / "policy.json")
    return json.loads((tmp_path / "policy.json").read_text())


def test_the_file_is_for_people(tmp_path):
    found = document(tmp_path)
    assert found["schema"] == 1
    assert found["default"] == "exact"
    assert found["model"]["model"].endswith("cases.Net")
    assert found["about"]["cost"] == "sm_89"
    assert set(found["calls"][0]) == {"name", "index", "timestep", "recipe", "scores"}
    assert set(found["calls"][0]["scores"]) == {"sage2_8b", "sage2_4b"}
    lines = (tmp_path / "policy.json").read_text().splitlines()
    assert sum('"timestep"' in line for line in lines) == len(found["calls"]) == 9


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(schema=99), "has schema 99"),
        (lambda d: d.update(format="observations"), "holds no lowbit-attention policy"),
        (lambda d: d["calls"][0].update(recipe="sage9"), "uses sage9, which is none of its recipes"),
        (lambda d: d.update(default="sage1"), "uses sage1, which is none of its recipes"),
        (lambda d: d["calls"].append(d["calls"][0]), "is there twice"),
        (lambda d: d["recipes"][0].update(qk_bits=5), "qk_bits=5 is not one of"),
        (lambda d: d.update(model={"model": "x"}), "fingerprint has"),
        (lambda d: d.pop("calls"), "is no policy"),
        (lambda d: d.update(calls=3), "is no policy"),
    ],
)
def test_damaged_files(tmp_path, damage, message):
    found = document(tmp_path)
    damage(found)
    (tmp_path / "policy.json").write_text(json.dumps(found))
    with pytest.raises(InvalidArgumentError, match=message):
        Policy.load(tmp_path / "policy.json")


def test_a_recipe_that_has_changed_its_meaning_runs_as_it_was(tmp_path):
    found = document(tmp_path)
    at = next(r for r in found["recipes"] if r["name"] == "sage2_4b")
    at["smooth_q"] = False
    (tmp_path / "policy.json").write_text(json.dumps(found))
    with pytest.warns(PolicyWarning, match="sage2_4b meant something else"):
        policy = Policy.load(tmp_path / "policy.json")
    assert policy.recipes["sage2_4b"] != RECIPES["sage2_4b"]
    assert not policy.recipes["sage2_4b"].smooth_q


def test_two_policies_on_two_models_at_once():
    a, b = cases.net(layers=2), cases.net(layers=2, seed=1)
    one = choose(observed(a, steps=1), threshold=0.0, recipes=("sage2_4b",)).policy(a)
    two = choose(observed(b, steps=1), threshold=0.0, recipes=("sage2_8b",)).policy(b)
    x = cases.tokens()
    with one.applied(a):
        want_a = a(x)
    with two.applied(b):
        want_b = b(x)
    first, second = one.apply(a), two.apply(b)
    try:
        assert torch.equal(a(x), want_a)
        assert torch.equal(b(x), want_b)
        first.remove()
        assert torch.equal(b(x), want_b)
        assert not torch.equal(a(x), want_a)
    finally:
        first.remove()
        second.remove()

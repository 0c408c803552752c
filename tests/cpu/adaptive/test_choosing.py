"""The rules, the modes, and what a choice says of itself."""

import math

import cases
import pytest

from lowbit_attention import InvalidArgumentError
from lowbit_attention.adaptive import Sensitivity, choose, cost_table, pareto
from lowbit_attention.adaptive.choosing import METRICS, MODES


@pytest.fixture(scope="module")
def seen():
    return cases.made_up(layers=6, steps=5)


def l1(seen, key, recipe):
    return 0.0 if recipe == "exact" else seen.records[key].scores[recipe].l1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [0.0, 0.015, 0.05, 1.0])
def test_a_budget_is_kept_and_used(seen, mode, budget):
    found = choose(seen, budget=budget, mode=mode)
    error = math.fsum(l1(seen, k, r) for k, r in found.recipes.items()) / len(found.recipes)
    assert error == pytest.approx(found.error, abs=1e-15)
    assert error <= budget * (1 + 1e-9)
    assert found.optimal
    assert found.bound == pytest.approx(found.seconds)
    table = cost_table("sm_89")
    seconds = math.fsum(table.seconds(r, seen.records[k].shape) for k, r in found.recipes.items())
    assert seconds == pytest.approx(found.seconds)
    if budget == 0:
        assert set(found.recipes.values()) == {"exact"}
    if budget == 1:
        assert set(found.recipes.values()) == {"rotated_4b"}  # the fastest


def test_modes_decide_for_whole_groups_and_joint_is_the_fastest(seen):
    found = {mode: choose(seen, budget=0.04, mode=mode) for mode in MODES}
    for key, recipe in found["per-layer"].recipes.items():
        assert all(r == recipe for k, r in found["per-layer"].recipes.items() if k.name == key.name)
    for key, recipe in found["per-timestep"].recipes.items():
        assert all(r == recipe for k, r in found["per-timestep"].recipes.items() if k.timestep == key.timestep)
    assert found["joint"].seconds <= found["per-layer"].seconds
    assert found["joint"].seconds <= found["per-timestep"].seconds
    assert len(set(found["joint"].recipes.values())) > 1


@pytest.mark.parametrize("metric", METRICS)
def test_a_budget_in_every_metric(seen, metric):
    least, most = (choose(seen, budget=b, metric=metric) for b in (0.0, 1e9))
    half = choose(seen, budget=most.error / 2, metric=metric)
    assert least.error == 0 < half.error <= most.error / 2 * (1 + 1e-9)


def test_a_fraction_gives_the_worst_calls_the_accurate_recipe(seen):
    found = choose(seen, fraction=0.4, recipes=("sage2_4b", "sage2_8b"))
    assert found.share() == {"sage2_4b": 0.6, "sage2_8b": 0.4}
    assert found.four_bit_share() == pytest.approx(0.6)
    score = {k: r.scores["sage2_4b"].score for k, r in seen.records.items()}
    accurate = [score[k] for k, r in found.recipes.items() if r == "sage2_8b"]
    assert max(accurate) <= min(score[k] for k, r in found.recipes.items() if r == "sage2_4b")
    assert math.isnan(found.bound)
    assert choose(seen, fraction=0.0, recipes=("sage2_4b", "exact")).share() == {"sage2_4b": 1.0}
    assert choose(seen, fraction=1.0, recipes=("sage2_4b", "exact")).share() == {"exact": 1.0}


def test_a_threshold_takes_the_fastest_that_reaches_it(seen):
    table = cost_table("sm_89")
    found = choose(seen, threshold=0.93)
    assert len(found.share()) > 1
    for key, recipe in found.recipes.items():
        record = seen.records[key]
        good = [n for n in seen.candidates if record.scores[n].score >= 0.93] + ["exact"]
        assert recipe == min(good, key=lambda n: table.seconds(n, record.shape))
    per_layer = choose(seen, threshold=0.93, mode="per-layer")
    for key, recipe in per_layer.recipes.items():
        assert recipe == "exact" or seen.records[key].scores[recipe].score >= 0.93


def test_on_hopper_no_call_runs_at_4_bits_and_the_choice_says_why():
    seen = cases.made_up(layers=3, steps=2, shape="1x24x32768x128")
    for rule in ({"budget": 1.0}, {"threshold": 0.0}):
        found = choose(seen, cost="sm_90", **rule)
        assert found.four_bit_share() == 0
        assert any("4 bits buy nothing on Hopper" in note for note in found.notes)
    assert set(choose(seen, budget=1.0, cost="sm_90").recipes.values()) == {"sage2_8b"}


def test_random_choices_have_the_same_shares(seen):
    found = choose(seen, budget=0.05)
    shuffled = [found.shuffled(seed) for seed in range(3)]
    assert all(s.share() == found.share() for s in shuffled)
    assert all(s.recipes != found.recipes for s in shuffled)
    assert shuffled[0].recipes == found.shuffled(0).recipes != shuffled[1].recipes
    assert shuffled[0].seconds == pytest.approx(found.seconds)
    assert shuffled[0].error > found.error
    per_layer = choose(seen, budget=0.05, mode="per-layer").shuffled(1)
    for key, recipe in per_layer.recipes.items():
        assert per_layer.recipes[key] == recipe
        assert all(r == recipe for k, r in per_layer.recipes.items() if k.name == key.name)


def test_uniform(seen):
    found = choose(seen, budget=0.05).uniform("sage2_4b")
    assert found.error == pytest.approx(seen.mean("sage2_4b"))
    assert found.share() == {"sage2_4b": 1.0}
    with pytest.raises(InvalidArgumentError, match="'sage1' was not observed"):
        found.uniform("sage1")


def test_the_pareto_front(seen):
    front = pareto(seen)
    assert front[0].error == 0
    assert set(front[-1].recipes.values()) == {"rotated_4b"}
    for point in front[1:-1:7]:
        assert choose(seen, budget=point.error).seconds == pytest.approx(point.seconds)


def by_layer(seen, factor=lambda name: 1.0, by="layer"):
    groups = seen.names if by == "layer" else seen.timesteps
    return Sensitivity(
        by, {g: {r: factor(g) * (0.1 if "4b" in r else 0.01) for r in seen.candidates} for g in groups}, 0.0
    )


def test_effects_decide_where_they_were_measured(seen):
    heavy = seen.names[2]
    effects = by_layer(seen, lambda name: 100.0 if name == heavy else 1.0)
    total = math.fsum(effects.effect(n, "rotated_4b") for n in seen.names)
    everything = choose(seen, budget=total * 1.001, effects=effects, mode="per-layer")
    assert set(everything.recipes.values()) == {"rotated_4b"}
    assert everything.error == pytest.approx(total)
    found = choose(seen, budget=0.6, effects=effects, mode="per-layer")
    assert {k.name for k, r in found.recipes.items() if r == "exact"} == {heavy}
    assert found.metric == "effect"


def test_two_effects_multiply(seen):
    layers = by_layer(seen)
    late = seen.timesteps[-1]
    steps = by_layer(seen, lambda t: 50.0 if t == late else 1.0, by="timestep")
    found = choose(seen, budget=0.09, effects=[layers, steps])
    bits = {key.timestep: found.recipes[key] for key in found.recipes if key.name == seen.names[0]}
    share = {t: sum("4b" in r for k, r in found.recipes.items() if k.timestep == t) for t in seen.timesteps}
    assert share[late] == 0 < min(n for t, n in share.items() if t != late), bits
    with pytest.raises(InvalidArgumentError, match="no effect of sage2_8b in layer"):
        choose(seen, budget=1.0, effects=Sensitivity("layer", {n: {} for n in seen.names}, 0.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of fraction, threshold and budget, got none"),
        ({"fraction": 0.5, "budget": 0.1}, "got fraction, budget"),
        ({"budget": -1.0}, "budget=-1.0 is no number from 0"),
        ({"budget": math.nan}, "no number from 0"),
        ({"threshold": 1.5}, "threshold=1.5 is above 1"),
        ({"budget": 0.1, "mode": "diagonal"}, "mode='diagonal' is one of"),
        ({"budget": 0.1, "metric": "l2"}, "metric='l2' of"),
        ({"budget": 0.1, "cost": "sm_70"}, "unknown cost table 'sm_70'"),
        ({"budget": 0.1, "cost": "this"}, "cost=tune"),
        ({"budget": 0.1, "recipes": ("sage1",)}, "sage1: not observed"),
        ({"fraction": 0.1}, r"needs recipes=\(cheap, accurate\)"),
    ],
)
def test_what_is_refused(seen, arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        choose(seen, **arguments)


def test_recipes_without_a_price():
    seen = cases.made_up(layers=2, steps=2, candidates=("sage2_8b", "int8_u8"))
    found = choose(seen, budget=1.0, cost="sm_90")
    assert any("sm_90 has no price for them: int8_u8" in note for note in found.notes)
    with pytest.raises(InvalidArgumentError, match="no price for int8_u8: no kernel of ours"):
        choose(seen, budget=1.0, cost="sm_90", recipes=("int8_u8",))


def test_nothing_observed():
    seen = cases.made_up(layers=1, steps=1)
    seen.records.clear()
    with pytest.raises(InvalidArgumentError, match="no attention call with a row that counts"):
        choose(seen, budget=1.0)


def test_it_reads_well(seen):
    text = str(choose(seen, budget=0.05))
    assert "error budget 0.05, joint:" in text
    assert "claimed and not measured by us" in text
    assert "proved optimal" in text

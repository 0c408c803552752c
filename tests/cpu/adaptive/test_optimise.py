"""The optimisation against brute force, and what it promises when it is not exact."""

import itertools
import math
import random

import pytest

from lowbit_attention import InvalidArgumentError
from lowbit_attention.adaptive import Option, frontier, minimise_time


def problem(seed, groups=6, options=4, equal_times=False):
    rng = random.Random(seed)
    times = [rng.uniform(0.1, 3) for _ in range(options)]
    return [
        [Option(str(o), rng.choice([0.0, rng.random()]) if o else 0.0, times[o] if equal_times else rng.uniform(0.1, 3))
         for o in range(options)]
        for _ in range(groups)
    ]  # fmt: skip


def brute_force(groups, budget):
    """The least time of all combinations within the budget."""
    best = math.inf
    for combination in itertools.product(*groups):
        if math.fsum(o.error for o in combination) <= budget * (1 + 1e-12):
            best = min(best, math.fsum(o.seconds for o in combination))
    return best


@pytest.mark.parametrize("equal_times", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_as_fast_as_brute_force(seed, equal_times):
    groups = problem(seed, equal_times=equal_times)
    most = math.fsum(max(o.error for o in g) for g in groups)
    for budget in (0.0, most * random.Random(seed).random(), most):
        found = minimise_time(groups, budget)
        assert found.optimal
        assert found.seconds == pytest.approx(brute_force(groups, budget), rel=1e-12)
        chosen = [g[p] for g, p in zip(groups, found.picks, strict=True)]
        assert math.fsum(o.error for o in chosen) == found.error <= budget * (1 + 1e-11)
        assert math.fsum(o.seconds for o in chosen) == found.seconds
        assert found.gap == 0


@pytest.mark.parametrize("seed", range(10))
def test_given_up_it_still_knows_how_far_it_is(seed):
    groups = problem(seed, groups=7)
    budget = 0.4 * math.fsum(max(o.error for o in g) for g in groups)
    best = brute_force(groups, budget)
    found = minimise_time(groups, budget, most_labels=0)
    if found.optimal:  # the bound alone has proved that nothing is better than the repaired solution
        assert found.seconds == pytest.approx(best, rel=1e-12)
    assert found.error <= budget * (1 + 1e-11)
    assert found.bound <= best * (1 + 1e-12)
    assert best * (1 - 1e-12) <= found.seconds
    assert found.seconds * (1 - found.gap) == pytest.approx(found.bound)
    # the linear relaxation splits one group at most: rounding it costs no more than that group's whole range
    worst_group = max(max(o.seconds for o in g) - min(o.seconds for o in g) for g in groups)
    assert found.seconds <= found.bound + worst_group * (1 + 1e-9)


def test_given_up_at_least_once():
    groups = problem(1, groups=7)
    budget = 0.4 * math.fsum(max(o.error for o in g) for g in groups)
    found = minimise_time(groups, budget, most_labels=0)
    assert not found.optimal
    assert 0 < found.gap < 0.5


def test_a_thousand_groups_are_solved_to_the_end():
    rng = random.Random(1)
    groups = [
        [
            Option("exact", 0.0, 6.0),
            Option("8", rng.lognormvariate(-4, 0.4), 2.0),
            Option("4", rng.lognormvariate(-2, 0.6), 1.5),
        ]
        for _ in range(1000)
    ]
    found = minimise_time(groups, 0.06 * 1000)
    assert found.optimal
    assert found.error <= 60 * (1 + 1e-11)
    names = {g[p].name for g, p in zip(groups, found.picks, strict=True)}
    assert names == {"8", "4"}


def test_the_frontier_is_the_lower_hull_of_all_choices():
    groups = problem(3, groups=5, options=3)
    every = [(math.fsum(o.error for o in c), math.fsum(o.seconds for o in c)) for c in itertools.product(*groups)]
    found = frontier(groups)
    assert found[0].error == min(e for e, _ in every)
    assert found[-1].seconds == pytest.approx(min(s for _, s in every))
    points = [(s.error, s.seconds) for s in found]
    assert points == sorted(points)
    assert all(a[1] > b[1] for a, b in itertools.pairwise(points))
    for (e0, s0), (e1, s1) in itertools.pairwise(points):
        for e, s in every:  # nothing lies below the line between neighbours
            if e0 <= e <= e1:
                assert s >= s0 + (s1 - s0) * (e - e0) / (e1 - e0) - 1e-9


def test_equal_options_and_single_ones():
    one = [Option("a", 0.5, 1.0)]
    assert minimise_time([one, one], 1.0).picks == (0, 0)
    twins = [Option("a", 0.1, 1.0), Option("b", 0.1, 1.0), Option("c", 0.1, 2.0)]
    assert minimise_time([twins] * 3, 1.0).seconds == 3.0
    assert minimise_time([], 0.0).picks == ()


def test_an_infinite_error_is_never_picked():
    group = [Option("exact", 0.0, 2.0), Option("broken", math.inf, 1.0)]
    assert minimise_time([group], 1e9).picks == (0,)
    assert [s.picks for s in frontier([group])] == [(0,)]


@pytest.mark.parametrize(
    ("groups", "budget", "message"),
    [
        ([[Option("a", 0.5, 1.0)]], 0.4, "below the least possible, 0.5"),
        ([[]], 1.0, "group 0 has no option"),
        ([[Option("a", math.inf, 1.0)]], 1.0, "no option with a finite error"),
        ([[Option("a", math.nan, 1.0)]], 1.0, "an error from 0"),
        ([[Option("a", 0.0, math.inf)]], 1.0, "a finite time"),
        ([[Option("a", 0.0, -1.0)]], 1.0, "a finite time from 0"),
    ],
)
def test_what_is_refused(groups, budget, message):
    with pytest.raises(InvalidArgumentError, match=message):
        minimise_time(groups, budget)

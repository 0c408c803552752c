"""The choice as an optimisation: one option for each group, least time within an error budget.

That is a multiple-choice knapsack. `minimise_time` solves it exactly by dynamic programming over partial sums, pruned
by a Lagrangian bound; if the partial sums still become too many it returns the Lagrangian solution with local repair.
Either way it returns a lower bound on every solution's time, so the distance from the optimum is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..errors import InvalidArgumentError

MOST_LABELS = 200_000
"""Partial sums kept at a stage: beyond it the search is given up, and the solution is the repaired one."""
_TICK = 2.0**-44
"""Times are counted in this share of the slowest solution: the optimum is found up to a tick a group."""
_ROOM = 1e-12
"""Of the budget: what sums may exceed it by because their terms were added in another order."""


@dataclass(frozen=True)
class Option:
    """One recipe for one group: what it adds to the error and to the time."""

    name: str
    error: float
    seconds: float


@dataclass(frozen=True)
class Solution:
    """picks: an option's number for each group. bound: no solution within the budget takes less. optimal: proved."""

    picks: tuple[int, ...]
    error: float
    seconds: float
    bound: float
    optimal: bool

    @property
    def gap(self) -> float:
        """How far it may be from the optimum: (seconds − bound) / seconds."""
        return 0.0 if self.optimal or self.seconds == 0 else max(0.0, (self.seconds - self.bound) / self.seconds)


Groups = Sequence[Sequence[Option]]


def minimise_time(groups: Groups, budget: float, most_labels: int = MOST_LABELS) -> Solution:
    """The options with the least total time whose total error is at most ``budget``.

    >>> exact, fast = Option("exact", 0.0, 2.0), Option("fast", 0.1, 1.0)
    >>> minimise_time([[exact, fast], [exact, Option("faster", 0.1, 0.5)]], budget=0.15).picks
    (0, 1)

    Raises:
        InvalidArgumentError: a group without an option whose error is finite (others are never picked), a number
            out of range, or a budget below the least error.
    """
    _check(groups)
    least = math.fsum(min(o.error for o in group) for group in groups)
    limit = budget * (1 + _ROOM) if budget > 0 else budget + _ROOM * max(1.0, least)
    if not least <= limit:
        raise InvalidArgumentError(f"error budget {budget:.6g} is below the least possible, {least:.6g}")
    hulls = [_undominated(group) for group in groups]
    multiplier, bound = _multiplier(hulls, limit)
    start = _repair(hulls, _at(hulls, multiplier), limit)
    picks = _search(hulls, start, limit, multiplier, most_labels)
    best = _solution(groups, start if picks is None else picks, bound, picks is not None)
    return best if not best.optimal else Solution(best.picks, best.error, best.seconds, best.seconds, True)


def frontier(groups: Groups, points: int = 200) -> list[Solution]:
    """Solutions from the least error to the least time: those on the lower convex hull of (error, time).

    Each is optimal for its own error; between two of them `minimise_time` finds what lies above the hull.
    """
    _check(groups)
    hulls = [_undominated(group) for group in groups]
    steps = sorted({s for hull in hulls for s in _slopes(hull)}, reverse=True)
    if len(steps) > points:
        steps = [steps[round(i * (len(steps) - 1) / (points - 1))] for i in range(points)]
    found: dict[tuple[float, float], Solution] = {}
    # a multiplier just above a slope stays on its slow side, just below it on its fast side
    for multiplier in [math.inf, *(s * (1 - 1e-9) for s in steps), 0.0]:
        picks = [_pick(hull, multiplier) for hull in hulls]
        one = _solution(groups, picks, 0.0, True)
        found.setdefault((one.error, one.seconds), Solution(one.picks, one.error, one.seconds, one.seconds, True))
    return sorted(found.values(), key=lambda s: s.error)


Hull = list[tuple[int, Option]]
"""A group's options that no other beats in both, with their numbers, by rising error and falling time."""


def _check(groups: Groups) -> None:
    for number, group in enumerate(groups):
        for o in group:
            if not (o.error >= 0 and 0 <= o.seconds < math.inf):
                raise InvalidArgumentError(f"group {number}: {o} needs an error from 0 and a finite time from 0")
        if not any(o.error < math.inf for o in group):
            raise InvalidArgumentError(f"group {number} has no option with a finite error")


def _undominated(group: Sequence[Option]) -> Hull:
    kept: Hull = []
    usable = [item for item in enumerate(group) if item[1].error < math.inf]
    for number, option in sorted(usable, key=lambda item: (item[1].error, item[1].seconds, item[0])):
        if not kept or option.seconds < kept[-1][1].seconds:
            kept.append((number, option))
    return kept


def _slopes(options: Hull) -> list[float]:
    """Seconds saved for a unit of error, along the lower convex hull."""
    return [(a.seconds - b.seconds) / (b.error - a.error) for (_, a), (_, b) in pairwise(_corners(options))]


def _corners(options: Hull) -> Hull:
    """The lower convex hull of a group's (error, time)."""
    corners: Hull = []
    for item in options:
        while len(corners) >= 2:
            a, b, c = corners[-2][1], corners[-1][1], item[1]
            # b lies on or above the line from a to c
            if (a.seconds - b.seconds) * (c.error - a.error) <= (a.seconds - c.seconds) * (b.error - a.error):
                corners.pop()
            else:
                break
        corners.append(item)
    return corners


def _pick(options: Hull, multiplier: float) -> int:
    """The number of the option with the least time + multiplier · error (the least error first of equals)."""
    if multiplier == math.inf:
        return options[0][0]
    return min(options, key=lambda item: (item[1].seconds + multiplier * item[1].error, item[1].error))[0]


def _at(hulls: list[Hull], multiplier: float) -> list[int]:
    return [_pick(hull, multiplier) for hull in hulls]


def _multiplier(hulls: list[Hull], limit: float) -> tuple[float, float]:
    """The multiplier of the error with the best Lagrangian bound, and that bound: it is one of the slopes, or 0."""
    slopes = sorted({0.0, *(s for hull in hulls for s in _slopes(hull))})

    def dual(multiplier: float) -> float:
        terms = (min(o.seconds + multiplier * o.error for _, o in hull) for hull in hulls)
        return math.fsum(terms) - multiplier * limit

    low, high = 0, len(slopes) - 1  # the bound is concave in the multiplier
    while low < high:
        middle = (low + high) // 2
        if dual(slopes[middle]) < dual(slopes[middle + 1]):
            low = middle + 1
        else:
            high = middle
    return slopes[low], dual(slopes[low])


def _repair(hulls: list[Hull], picks: list[int], limit: float) -> list[int]:
    """Make the picks fit the budget by the cheapest steps, then spend what is left of it by the best ones."""
    place = [
        next(i for i, (number, _) in enumerate(hull) if number == pick) for hull, pick in zip(hulls, picks, strict=True)
    ]
    error = math.fsum(hull[p][1].error for hull, p in zip(hulls, place, strict=True))
    while error > limit:
        moves = [
            ((hull[j][1].seconds - hull[p][1].seconds) / (hull[p][1].error - hull[j][1].error), g, j)
            for g, (hull, p) in enumerate(zip(hulls, place, strict=True))
            for j in range(p)
        ]
        if not moves:
            break
        _, g, j = min(moves)
        place[g] = j
        error = math.fsum(hull[p][1].error for hull, p in zip(hulls, place, strict=True))
    while True:
        room = limit - error
        moves = [
            (hull[p][1].seconds - hull[j][1].seconds, g, j)
            for g, (hull, p) in enumerate(zip(hulls, place, strict=True))
            for j in range(p + 1, len(hull))
            if hull[j][1].error - hull[p][1].error <= room
        ]
        if not moves:
            return [hull[p][0] for hull, p in zip(hulls, place, strict=True)]
        _, g, j = max(moves)
        place[g] = j
        error = math.fsum(hull[p][1].error for hull, p in zip(hulls, place, strict=True))


def _search(hulls: list[Hull], start: list[int], limit: float, multiplier: float, most: int) -> list[int] | None:
    """The optimal picks, or ``None`` if there are more than ``most`` partial sums at some stage.

    A partial sum is dropped if another of the same stage has no more error and no more time, if it leaves no room for
    the least error of the rest, or if its Lagrangian bound is not below the best solution known.
    """
    by_group = [dict(hull) for hull in hulls]
    incumbent = math.fsum(options[pick].seconds for options, pick in zip(by_group, start, strict=True))
    rest_error, rest_bound = [0.0], [0.0]
    for hull in reversed(hulls):
        rest_error.append(rest_error[-1] + hull[0][1].error)
        rest_bound.append(rest_bound[-1] + min(o.seconds + multiplier * o.error for _, o in hull))
    rest_error, rest_bound = rest_error[::-1], rest_bound[::-1]
    errors = torch.zeros(1, dtype=torch.float64, device="cpu")
    ticks = torch.zeros_like(errors)
    history: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each stage: the label before, and the option's place
    # whole ticks add up exactly: sums of the same times in another order are equal, and one of them is dropped
    tick = max(math.fsum(hull[0][1].seconds for hull in hulls), 1e-300) * _TICK
    slack = len(hulls) * tick
    for stage, hull in enumerate(hulls):
        option_errors = torch.tensor([o.error for _, o in hull], dtype=torch.float64, device="cpu")
        option_ticks = torch.tensor([round(o.seconds / tick) for _, o in hull], dtype=torch.float64, device="cpu")
        e = (errors[:, None] + option_errors).flatten()
        s = (ticks[:, None] + option_ticks).flatten()
        bound = s * tick + rest_bound[stage + 1] + multiplier * (e - limit)
        keep = torch.nonzero((e + rest_error[stage + 1] <= limit) & (bound < incumbent - slack)).flatten()
        e, s = e[keep], s[keep]
        by_error = torch.argsort(e, stable=True)
        order = by_error[torch.argsort(s[by_error], stable=True)]
        e, s, keep = e[order], s[order], keep[order]  # by time, then error
        before = torch.cummin(e, dim=0).values if len(e) else e
        first = torch.cat([torch.ones(min(1, len(e)), dtype=torch.bool, device="cpu"), e[1:] < before[:-1]])
        e, s, keep = e[first], s[first], keep[first]
        if len(e) > most:
            return None
        if not len(e):
            return start  # nothing can be better than what is known
        history.append((keep // len(hull), keep % len(hull)))
        errors, ticks = e, s
    label = int(torch.argmin(ticks))
    places = []
    for parents, options in reversed(history):
        places.append(int(options[label]))
        label = int(parents[label])
    return [hull[p][0] for hull, p in zip(hulls, reversed(places), strict=True)]


def _solution(groups: Groups, picks: Sequence[int], bound: float, optimal: bool) -> Solution:
    chosen = [group[pick] for group, pick in zip(groups, picks, strict=True)]
    error, seconds = math.fsum(o.error for o in chosen), math.fsum(o.seconds for o in chosen)
    return Solution(tuple(picks), error, seconds, min(bound, seconds), optimal)

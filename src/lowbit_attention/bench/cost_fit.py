"""A card's cost model from samples of whole calls (`sampling`): its coefficients, and how far off it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..backends.cuda.speeds import TORCH, TORCH_ROWS, CardModel, Sizes, features
from .sampling import SampleRow
from .shapes import Shape, parse_shape

FOLDS = 5
LEAST_CALLS = 10
"""Of a provider, head dimension and causality: fewer say nothing of eight coefficients."""
Samples = dict[str, dict[str, float]]
"""Microseconds by shape and provider (`TORCH`, or a recipe of ours)."""
WorkRows = Callable[[str, int], int]
"""Rows of a work tile: of a recipe, at a padded head dimension."""


def samples_of(rows: Iterable[SampleRow]) -> Samples:
    """The samples of calls without a mask, by torch's own choice and by ours."""
    found: Samples = defaultdict(dict)
    for row in rows:
        if parse_shape(row.shape).mask is None:
            name = TORCH if row.provider == "torch_default" else row.provider.removeprefix("ours:")
            found[row.shape][name] = row.us
    return dict(found)


def sizes_of(shape: Shape) -> Sizes:
    """What the model looks at."""
    offset = shape.kv_len - shape.q_len if shape.is_causal else None
    return Sizes(
        shape.batch, shape.q_heads, shape.kv_heads, shape.q_len, shape.kv_len, shape.head_dim, shape.v_head_dim, offset
    )


def card_model(
    samples: Samples,
    kernels: Mapping[str, str],
    work_rows: WorkRows,
    multiprocessors: int,
    about: Mapping[str, Any],
    uses: Callable[[int], bool] = lambda number: True,
) -> CardModel:
    """The model that fits the samples best.

    Args:
        kernels: which kernel ran a recipe.
        uses: which samples count, by their number in order of their shapes' texts.
    """
    rows: dict[str, dict[str, int]] = defaultdict(dict)
    groups: dict[tuple[str, str, str], list[tuple[tuple[float, ...], float]]] = defaultdict(list)
    for number, (label, times) in enumerate(sorted(samples.items())):
        shape = parse_shape(label)
        dim = str(shape.head_dim)
        for name, us in times.items() if uses(number) else ():
            if dim not in rows[name]:
                rows[name][dim] = TORCH_ROWS if name == TORCH else work_rows(name, shape.head_dim)
            sizes = features(sizes_of(shape), rows[name][dim], multiprocessors)
            groups[name, dim, str(shape.is_causal)].append((sizes, us))
    coefficients: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {}
    for (name, dim, causal), some in sorted(groups.items()):
        if len(some) >= LEAST_CALLS:
            by_dim = coefficients.setdefault(name, {})
            by_dim.setdefault(dim, {})[causal] = tuple(float(f"{x:.6g}") for x in fit(some))
    known = {name: dict(sorted(rows[name].items())) for name in sorted(coefficients)}
    return CardModel(dict(about), multiprocessors, dict(kernels), known, coefficients)


def left_out(samples: Samples, model_without: Callable[[Callable[[int], bool]], CardModel]) -> Samples:
    """Each sample's predictions by a model that was fitted to the other folds.

    Args:
        model_without: the model of those samples whose number it is given a rule for (`card_model`'s ``uses``).
    """
    found: Samples = {}
    for fold in range(FOLDS):
        model = model_without(lambda number: number % FOLDS != fold)  # noqa: B023 (used at once)
        for number, (label, times) in enumerate(sorted(samples.items())):
            if number % FOLDS == fold:
                told = {name: model.microseconds(sizes_of(parse_shape(label)), name) for name in times}
                found[label] = {name: us for name, us in told.items() if us is not None}
    return found


def losses(samples: Samples, predicted: Samples, recipes: Sequence[str]) -> list[tuple[float, str]]:
    """How much longer what is predicted to be the fastest takes than what is, and of which shape, the worst first."""
    found = []
    for label, times in samples.items():
        candidates = [name for name in (TORCH, *recipes) if name in times and name in predicted.get(label, {})]
        if TORCH in candidates and len(candidates) > 1:
            guesses = predicted[label]
            choice = min(candidates, key=lambda name: guesses[name])
            found.append((times[choice] / min(times[name] for name in candidates) - 1, label))
    return sorted(found, reverse=True)


def offs(samples: Samples, predicted: Samples, name: str) -> list[float]:
    """How far off a provider's predictions are, each as a share of what was measured."""
    return [
        abs(predicted[label][name] / times[name] - 1)
        for label, times in samples.items()
        if name in times and name in predicted.get(label, {})
    ]


def fit(rows: Sequence[tuple[Sequence[float], float]]) -> list[float]:
    """Coefficients, none negative, whose predictions have the least sum of squared relative errors.

    Args:
        rows: features and microseconds of calls.

    One coefficient after the other takes its best value, until none changes (coordinate descent; it is convex).

    >>> [round(c, 3) for c in fit([((1.0, x), 5.0 + 2.0 * x) for x in (1.0, 2.0, 9.0)])]
    [5.0, 2.0]
    """
    relative = [[size / us for size in sizes] for sizes, us in rows]
    count = len(relative[0])
    largest = [max(row[i] for row in relative) or 1.0 for i in range(count)]
    columns = [[row[i] / largest[i] for row in relative] for i in range(count)]
    products = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in columns] for a in columns]
    wanted = [sum(column) for column in columns]
    found = [0.0] * count
    for _ in range(_MOST_SWEEPS):
        change = 0.0
        for i in range(count):
            if products[i][i] == 0:
                continue
            rest = sum(products[i][j] * found[j] for j in range(count) if j != i)
            best = max(0.0, (wanted[i] - rest) / products[i][i])
            change, found[i] = max(change, abs(best - found[i])), best
        if change < _STILL:
            break
    return [x / size for x, size in zip(found, largest, strict=True)]


_MOST_SWEEPS, _STILL = 20_000, 1e-6
"""When nothing changes any more: a millionth of what its largest size would add to a call's time."""

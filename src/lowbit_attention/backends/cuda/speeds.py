"""How long whole calls take, predicted: what ``auto`` compares our kernels and torch by.

A call's time is a sum over a few sizes of its work (`features`), each times a coefficient that is not negative. The
coefficients come from calls that were measured on a card (data/hopper_costs.json, fitted by ``make tables`` to
benchmarks/results/samples): for torch and for each recipe, by head dimension and causality.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

from ...call.request import Request, device_name
from ...recipes.definition import Recipe
from ...recipes.named import RECIPES
from .instances import DTYPE_CODES, padded_head_dim, wgmma_config

CARDS = ("H100", "H200")
"""In the names of the cards that the measurements hold for: the same processor with another memory."""
LEAST_TOKENS = 64
"""Fewer queries or keys than any that were measured."""
TORCH = "torch"
_MULTIPROCESSORS = 132
_TORCH_ROWS, _TILE_KEYS = 128, 128

Model = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
"""Coefficients by provider, padded head dimension and causality."""


class Call(NamedTuple):
    """What a call's time is taken to depend on. ``causal_offset``: row i sees key j if ``j ≤ i + causal_offset``."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    causal_offset: int | None = None

    @classmethod
    def of(cls, request: Request) -> Call:
        """That of a request; a mask is taken to hide nothing."""
        return cls(
            request.batch, request.q_heads, request.kv_heads, request.q_len, request.kv_len, request.head_dim,
            request.v_head_dim, request.causal_offset if request.is_causal else None,
        )  # fmt: skip

    @property
    def padded(self) -> int | None:
        """The head dimension that kernels run, if any does."""
        return padded_head_dim(max(self.head_dim, self.v_head_dim))


def features(call: Call, rows: int) -> tuple[float, ...]:
    """The sizes of a call's work, where a work tile is so many rows of a head.

    One; megabytes of K and V, and of Q and the output; key tiles, and those of all waves' work tiles, for each
    multiprocessor; work tiles for each, and waves; the key tiles of the longest work tile.
    """
    blocks, tiles, heads = -(-call.q_len // rows), -(-call.kv_len // _TILE_KEYS), call.batch * call.q_heads
    visited, longest = float(blocks * tiles), tiles
    if call.causal_offset is not None:
        ends = (min((b + 1) * rows, call.q_len) + call.causal_offset for b in range(blocks))
        seen = [min(tiles, max(0, -(-end // _TILE_KEYS))) for end in ends]
        visited, longest = float(sum(seen)), max(seen)
    items = heads * blocks
    waves = -(-items // _MULTIPROCESSORS)
    channels = 2e-6 * call.batch * (call.head_dim + call.v_head_dim)
    return (
        1.0, channels * call.kv_heads * call.kv_len, channels * call.q_heads * call.q_len,
        heads * visited / _MULTIPROCESSORS, waves * visited / blocks, items / _MULTIPROCESSORS, float(waves),
        float(longest),
    )  # fmt: skip


_BY_CHANNELS = (3, 4, 7)
"""Which features are multiplications."""


def rows_of(name: str, head_dim: int) -> int:
    """Rows of a work tile: of torch, or of `attention_wgmma` with a recipe."""
    if name == TORCH:
        return _TORCH_ROWS
    return wgmma_config(RECIPES[name], head_dim, next(iter(DTYPE_CODES))).q_rows


def microseconds(call: Call, name: str, model: Model | None = None) -> float | None:
    """The predicted device time of a whole call; ``None`` where nothing alike was measured."""
    dim = call.padded
    causal = str(call.causal_offset is not None)
    coefficients = (model or _model()).get(name, {}).get(str(dim), {}).get(causal)
    if dim is None or coefficients is None or min(call.q_len, call.kv_len) < LEAST_TOKENS:
        return None
    sizes = list(features(call, rows_of(name, dim)))
    if name == TORCH:  # it may pad to fewer channels than we do: a doubt speaks for torch
        for i in _BY_CHANNELS:
            sizes[i] *= max(call.head_dim, call.v_head_dim) / dim
    return sum(c * size for c, size in zip(coefficients, sizes, strict=True))


def speedup(request: Request, recipe: Recipe) -> float | None:
    """Torch's predicted time over ours, ``None`` where nothing alike was timed.

    With a mask, too, it is the ratio without one: on an H200 masks cost torch more than us (docs/results/hopper.md).
    """
    if not any(card in device_name(request.device) for card in CARDS) or RECIPES.get(recipe.name) != recipe:
        return None
    call = Call.of(request)
    torch_us, ours_us = microseconds(call, TORCH), microseconds(call, recipe.name)
    return None if torch_us is None or ours_us is None else torch_us / ours_us


@lru_cache(maxsize=1)
def _model() -> Model:
    text = resources.files("lowbit_attention").joinpath("data/hopper_costs.json").read_text(encoding="utf-8")
    models: Model = json.loads(text)["models"]
    return models


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

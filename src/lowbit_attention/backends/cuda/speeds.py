"""How much faster than torch whole calls were on cards that were timed (data/hopper_speedups.json)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from ...call.request import Request, device_name
from ...recipes.definition import Recipe
from ...recipes.named import RECIPES
from .instances import padded_head_dim

CARDS = ("H100", "H200")
"""In the names of the cards that the measurements hold for: the same processor with another memory."""
_FARTHEST = 3.0
"""Octaves (of batch × heads, queries and keys together) beyond which a measurement says nothing."""
_AS_NEAR = 0.5
"""Octaves by which a measurement may be farther than the nearest and still count."""


@dataclass(frozen=True)
class Measured:
    """One shape and recipe: ``speedup`` is the time of torch's cuDNN attention over a whole call's of ours."""

    recipe: str
    head_dim: int
    is_causal: bool
    slices: int
    q_len: int
    kv_len: int
    speedup: float

    def distance(self, slices: int, q_len: int, kv_len: int) -> float:
        """Octaves between two shapes; longer sequences than any that was timed count as that."""
        pairs = ((slices, self.slices), (q_len, self.q_len), (kv_len, self.kv_len))
        return math.sqrt(sum(math.log2(max(1, a) / b) ** 2 for a, b in pairs))


def speedup(request: Request, recipe: Recipe) -> float | None:
    """Torch's time over ours for such a call, ``None`` where nothing alike was timed.

    The smallest of the nearest measurements of the same padded head dimension and causality, so that a doubt speaks for
    torch.
    """
    if not any(card in device_name(request.device) for card in CARDS) or RECIPES.get(recipe.name) != recipe:
        return None
    dim = padded_head_dim(max(request.head_dim, request.v_head_dim))
    table = [m for m in _table() if (m.recipe, m.head_dim, m.is_causal) == (recipe.name, dim, request.is_causal)]
    if not table:
        return None
    q_len = min(request.q_len, max(m.q_len for m in table))
    kv_len = min(request.kv_len, max(m.kv_len for m in table))
    slices = request.batch * request.q_heads
    near = [(m.distance(slices, q_len, kv_len), m.speedup) for m in table]
    nearest = min(distance for distance, _ in near)
    if nearest > _FARTHEST:
        return None
    reach = nearest + _AS_NEAR if nearest else 0.0  # (the very shape was timed)
    return min(found for distance, found in near if distance <= reach)


@lru_cache(maxsize=1)
def _table() -> tuple[Measured, ...]:
    text = resources.files("lowbit_attention").joinpath("data/hopper_speedups.json").read_text(encoding="utf-8")
    return tuple(Measured(**row) for row in json.loads(text)["rows"])


def from_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the table holds of a benchmark's rows (benchmarks/results): the newest of each shape and recipe."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: str(r["time"])):
        name = str(row["provider"]).removeprefix("ours:")
        if row["part"] != "whole" or name == row["provider"] or name not in RECIPES or not row["ratio_to_cudnn"]:
            continue
        shape = {
            "head_dim": int(row["head_dim"]),
            "is_causal": str(row["is_causal"]) == "True",
            "slices": int(row["batch"]) * int(row["q_heads"]),
            "q_len": int(row["q_len"]),
            "kv_len": int(row["kv_len"]),
        }
        key = (name, *shape.values())
        found[key] = {"recipe": name, **shape, "speedup": round(float(row["ratio_to_cudnn"]), 3)}
    return [found[key] for key in sorted(found)]

"""What a call costs: named tables of modelled time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from itertools import pairwise

from ..bench.shapes import Shape
from ..errors import InvalidArgumentError

Point = tuple[float, float]
"""Operations of a call, and the 10¹² operations a second it reached."""


@dataclass(frozen=True)
class Rate:
    """How fast a recipe runs, and how that is known. ``points``: by head dimension, some, by rising operations."""

    points: Mapping[int, tuple[Point, ...]]
    provenance: str

    def tops(self, shape: Shape) -> float:
        """10¹² operations a second of a call: between points linear in both logarithms, beyond them as at the end."""
        dims = sorted(self.points, key=lambda d: (abs(math.log2(d / shape.head_dim)), d))
        points = self.points[dims[0]]
        x = math.log2(max(1, shape.flops))
        at = [(math.log2(flops), math.log2(tops)) for flops, tops in points]
        if x <= at[0][0]:
            return float(2 ** at[0][1])
        for (x0, y0), (x1, y1) in pairwise(at):
            if x <= x1:
                return float(2 ** (y0 + (y1 - y0) * (x - x0) / (x1 - x0)))
        return float(2 ** at[-1][1])


@dataclass(frozen=True)
class CostTable:
    """Modelled times of recipes on a machine.

    rates: by a recipe's name; a variation of a named recipe (``sage2_4b:rotation=hadamard``) has that recipe's rate
    unless it has one of its own. unpriced: why a recipe has no rate here. pointless: why a recipe saves nothing here,
    which is why no optimiser picks it.
    """

    name: str
    summary: str
    rates: Mapping[str, Rate]
    unpriced: Mapping[str, str] = field(default_factory=dict)
    pointless: Mapping[str, str] = field(default_factory=dict)

    def seconds(self, recipe: str, shape: Shape) -> float:
        """Modelled seconds of one call.

        Raises:
            InvalidArgumentError: a recipe that has no price here, and why.
        """
        rate = self._rate(recipe)
        if rate is None:
            raise InvalidArgumentError(f"cost table {self.name!r} has no price for {recipe}: {self.why_not(recipe)}")
        return shape.flops / (rate.tops(shape) * 1e12)

    def _rate(self, recipe: str) -> Rate | None:
        return self.rates.get(recipe) or self.rates.get(recipe.partition(":")[0])

    def saves(self, recipe: str) -> bool:
        """Whether it may save time here at all."""
        return recipe.partition(":")[0] not in self.pointless

    def prices(self, recipe: str) -> bool:
        """Whether it has a rate."""
        return self._rate(recipe) is not None

    def provenance(self, recipe: str) -> str:
        """How a recipe's rate is known."""
        rate = self._rate(recipe)
        return self.why_not(recipe) if rate is None else rate.provenance

    def why_not(self, recipe: str) -> str:
        """Why a recipe has no rate."""
        known = ", ".join(self.rates)
        return self.unpriced.get(recipe.partition(":")[0], f"nobody claimed or measured it (priced: {known})")


def _flat(tops: float, provenance: str) -> Rate:
    return Rate({128: ((1.0, tops),)}, provenance)


def _sm_89() -> CostTable:
    claimed = "claimed by the papers: RTX 4090, kernel alone, head_dim 128, 32K tokens, not causal"
    same = "assumed as {} (claimed): the same MMAs; what its packing costs more is left out"
    eight, four = ("sage2_8b", 431.0), ("sage2_4b", 489.0)
    eight_pp, four_pp = ("sage2pp_8b", 493.0), ("sage2pp_4b", 640.0)
    rates = {"exact": _flat(164.0, f"{claimed}; FlashAttention-2"), "sage1": _flat(322.0, claimed)}
    rates |= {name: _flat(tops, claimed) for name, tops in (eight, four, eight_pp, four_pp)}
    for name, of in (("rotated_4b", four_pp), ("hadamard_attn", four), ("smooth_attn", four), ("sage2_v1_4b", four)):
        rates[name] = _flat(of[1], same.format(of[0]))
    # INT8 MMAs run at the rate of FP8 ones with FP16 sums on this card
    rates["int8_u8"] = _flat(eight_pp[1], same.format(eight_pp[0]).replace("the same MMAs", "MMAs of the same rate"))
    # peak: half of the operations at INT8's 660, half at FP16's 165 TOPS with FP32 sums = 264; of sage2_8b's peak (INT8
    # and FP8 with FP32 sums, 440) the papers reach 98 %
    rates["int8_fp16"] = _flat(258.0, "derived: 98 % (as sage2_8b claims) of what the peak rates of its MMAs allow")
    return CostTable(
        "sm_89",
        "Ada (RTX 4090): the papers' TOPS, claimed and not measured by us",
        rates,
        {"fast_8b": "a recipe for Hopper; nobody timed it on Ada"},
    )


@lru_cache(maxsize=1)
def _sm_90() -> CostTable:
    text = resources.files("lowbit_attention").joinpath("data/sm_90_costs.json").read_text(encoding="utf-8")
    data = json.loads(text)
    rates = {
        name: Rate({int(d): tuple((x, y) for x, y in points) for d, points in by_dim.items()}, data["provenance"])
        for name, by_dim in data["rates"].items()
    }
    four = "4 bits buy nothing on Hopper, which has no INT4 MMA: {} is multiplied as INT8, in {}'s time at best"
    pointless = {name: four.format(name, eight) for name, eight in _EIGHT_BITS.items()}
    rates |= {name: Rate(rates[eight].points, pointless[name]) for name, eight in _EIGHT_BITS.items()}
    return CostTable(
        "sm_90",
        f"Hopper ({data['gpu']}): whole calls, measured",
        rates,
        dict.fromkeys(("int8_u8", "int8_fp16", "sage1"), "no kernel of ours runs it on Hopper, so it was not timed"),
        pointless,
    )


_EIGHT_BITS = {
    "sage2_4b": "sage2_8b", "sage2pp_4b": "sage2pp_8b", "rotated_4b": "sage2pp_8b", "sage2_v1_4b": "sage2_8b",
    "hadamard_attn": "sage2_8b", "smooth_attn": "sage2_8b",
}  # fmt: skip
"""4-bit recipes, and the 8-bit one with the same P·V."""


def cost_table(name: str | CostTable) -> CostTable:
    """A table by its name: ``"sm_89"`` (claimed), ``"sm_90"`` (measured); ``"this"`` is made by `tune`.

    >>> cost_table("sm_89").rates["sage2pp_4b"].points[128]
    ((1.0, 640.0),)

    Raises:
        InvalidArgumentError: an unknown name.
    """
    if isinstance(name, CostTable):
        return name
    if name == "sm_89":
        return _sm_89()
    if name == "sm_90":
        return _sm_90()
    if name == "this":
        raise InvalidArgumentError(
            "cost 'this' is measured for the shapes it is needed for: cost=tune(observations), on a CUDA device"
        )
    raise InvalidArgumentError(f"unknown cost table {name!r}; known: sm_89, sm_90, this")

"""Numbers and names in the text of recipes, shapes and other programs' output."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from situation import Situation, gives, holds, refused

from lowbit_attention import Recipe, recipe
from lowbit_attention.adaptive.clock import Clock
from lowbit_attention.bench.sensors import parse_smi
from lowbit_attention.bench.shapes import parse_shape
from lowbit_attention.errors import InvalidArgumentError, InvalidRecipeError
from lowbit_attention.recipes.options import RestartedMax, SampledTokens


def raises(case: str, what: str, act: Callable[[], Any], *words: str, error: Any = InvalidArgumentError) -> Situation:
    return Situation(case, what, lambda _: act(), refused(error, *words))


HUGE = 10**400
SITUATIONS = [
    raises("T20", "recipe text 3.2e401", lambda: recipe("sage2_8b:keys_per_promotion=3.2e401"), "keys_per_promotion"),
    raises("T20+", "an integer of 400 digits", lambda: recipe("sage2_8b:keys_per_promotion=" + "32" * 200), "bits"),
    raises("T20+", "one of 5000 digits", lambda: recipe("sage2_8b:p_max=" + "9" * 5000), "characters"),
    raises("T20+", "the same as a number", lambda: recipe("sage2_8b").replace(p_max=10**5000), "p_max=an integer of"),
    raises("T20+", "as a name", lambda: Recipe(name=10**5000), "name=an integer"),  # type: ignore[arg-type]
    raises("T20", "sampled(10**30)", lambda: recipe(f"sage2_8b:k_sample=sampled({10**30})"), "at most 65536"),
    raises("T20+", "SampledTokens(2**40)", lambda: SampledTokens(2**40), "count="),
    raises("T20+", "RestartedMax(10**400)", lambda: RestartedMax(HUGE), "slack=an integer"),
    raises("T20+", "RestartedMax of a text", lambda: RestartedMax("20"), "slack="),  # type: ignore[arg-type]
    raises("T20+", "a list for an option", lambda: Recipe(qk_bits=[[8]]), "wrong type"),  # type: ignore[arg-type]
    raises("T20+", "recipe JSON of another type", lambda: Recipe.from_json(None), "NoneType"),  # type: ignore[arg-type]
    raises("T20+", "recipe JSON of brackets", lambda: Recipe.from_json("[" * 60_000), error=InvalidRecipeError),
    raises(
        "T20+", "a number of 5000 digits in it", lambda: Recipe.from_json('{"p_max": ' + "9" * 5000 + "}"), "digits"
    ),
    raises("T20", "a timestep beyond floats", lambda: Clock().step(HUGE), "timestep", "integer of"),
    raises("T20+", "an infinite timestep", lambda: Clock().step(math.inf), "timestep"),
    raises("T20+", "a shape's size", lambda: parse_shape(f"1x{'9' * 11}x8x64"), "at most"),
    raises("T20+", "a shape's size of 5000 digits", lambda: parse_shape(f"1x{'9' * 5000}x8x64"), "is not batch"),
    Situation(
        "T37",
        "replace() of a recipe whose own name holds a colon",
        lambda _: Recipe(name="mine: v2").replace(smooth_q=True).replace(smooth_q=False).name,
        gives("mine: v2:smooth_q=false"),
    ),
    Situation(
        "T37+",
        "replace() of names that look like changes",
        lambda _: [Recipe(name=n).replace(v_max=4.0).name for n in (":", "a:b=c", "x:smooth_q=true,b")],
        gives(["::v_max=4.0", "a:b=c:v_max=4.0", "x:smooth_q=true,b:v_max=4.0"]),
    ),
    Situation(
        "T37",
        "nvidia-smi prints nonsense",
        lambda _: parse_smi("nan, inf, 1e999, \ufffd\n"),
        holds(lambda r: str(r) == ""),
    ),
]

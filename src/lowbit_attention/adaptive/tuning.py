"""Cost tables from measurements: of the user's card, or of a benchmark's file."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..api import attention
from ..backends.dispatch import choose as dispatch_choose
from ..bench.shapes import Shape
from ..bench.timing import Limits, interleave, make_timer, percentile
from ..call.request import make_request
from ..errors import UnsupportedError
from ..recipes.definition import Recipe
from ..recipes.named import RECIPES
from ..recipes.named import recipe as find_recipe
from .costs import CostTable, Point, Rate

_LIMITS = Limits(seconds=1.0)


def check_device() -> None:
    """Whether there is a card to time.

    Raises:
        UnsupportedError: no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "timing this machine's kernels needs a CUDA device, and torch finds none here; use cost='sm_89' (claimed) "
            "or 'sm_90' (measured), or run the calibration on the card that the model will run on"
        )


def tune(
    shapes: Iterable[Shape],
    recipes: Iterable[str | Recipe],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    limits: Limits = _LIMITS,
) -> CostTable:
    """The table ``this``: whole calls of the shapes timed on the user's card.

    A recipe that no kernel runs on the card is not priced: an emulation's time says nothing.

    Raises:
        UnsupportedError: no CUDA device.
    """
    if device is None:
        check_device()
    where = torch.device(device or "cuda")
    wanted = {r.name: r for r in map(find_recipe, ["exact", *recipes])}
    found: dict[str, dict[int, list[Point]]] = {}
    unpriced: dict[str, str] = {}
    for shape in dict.fromkeys(shapes):
        for name, microseconds in _time(shape, wanted, where, dtype, limits, unpriced).items():
            point = (float(shape.flops), shape.flops / microseconds / 1e6)
            found.setdefault(name, {}).setdefault(shape.head_dim, []).append(point)
    gpu = torch.cuda.get_device_name(where) if where.type == "cuda" else str(where)
    provenance = f"measured here: whole calls on {gpu}, {str(dtype).removeprefix('torch.')}"
    rates = {
        name: Rate({d: tuple(sorted(_joined(points))) for d, points in by_dim.items()}, provenance)
        for name, by_dim in found.items()
    }
    return CostTable("this", f"{gpu}: whole calls, measured", rates, unpriced)


def _joined(points: list[Point]) -> list[Point]:
    """One point for calls of as many operations."""
    by_flops: dict[float, list[float]] = {}
    for flops, tops in points:
        by_flops.setdefault(flops, []).append(tops)
    return [(flops, fmean(tops)) for flops, tops in by_flops.items()]


def _time(
    shape: Shape,
    recipes: Mapping[str, Recipe],
    device: torch.device,
    dtype: torch.dtype,
    limits: Limits,
    unpriced: dict[str, str],
) -> dict[str, float]:
    """Median microseconds of a whole call, by recipe."""
    q = torch.randn(shape.batch, shape.q_heads, shape.q_len, shape.head_dim, device=device, dtype=dtype)
    k, v = torch.randn(2, shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim, device=device, dtype=dtype)
    calls: dict[str, Callable[[], object]] = {}
    for name, recipe in recipes.items():
        request = make_request(
            q, k, v, None, recipe, None, is_causal=shape.is_causal, bottom_right=True, on_emulation="allow"
        )
        chosen = dispatch_choose(request).implementation
        if recipe.is_exact or chosen.is_kernel:
            calls[name] = partial(attention, q, k, v, recipe=recipe, is_causal=shape.is_causal)
        else:
            unpriced[name] = f"no kernel runs it here ({chosen.name} would)"
    timer = make_timer(device)
    for call in calls.values():  # compiles, and warms up
        call()
    timer.settle()
    times, failed = interleave(list(calls), lambda name, _: timer.run(calls[name]), limits)
    unpriced.update(failed)
    return {name: percentile(t, 50) for name, t in times.items() if t}


def table_from_rows(rows: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """What ``data/sm_90_costs.json`` holds, from a benchmark's rows: whole calls of ours and cuDNN's.

    Of a recipe and shape that several commits timed, the last one's rows count.
    """
    recipes = {f"ours:{name}": name for name in RECIPES} | {"torch_cudnn": "exact"}
    newest: dict[tuple[str, Shape], tuple[str, list[float]]] = {}
    facts: set[tuple[str, str]] = set()
    for row in rows:
        if row["part"] != "whole" or row["provider"] not in recipes or row["kv_len"] != row["q_len"]:
            continue
        facts.add((row["gpu"], row["torch"]))
        b, hq, hk, nq, nk, d = (int(row[c]) for c in ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim"))
        shape = Shape("", b, hq, hk, nq, nk, d, row["is_causal"] == "True")
        key, commit = (recipes[row["provider"]], shape), row["commit"]
        if key not in newest or newest[key][0] != commit:
            newest[key] = (commit, [])
        newest[key][1].append(float(row["tops"]))
    collected: dict[str, dict[int, dict[float, list[float]]]] = {}
    for (name, shape), (_, tops) in newest.items():
        collected.setdefault(name, {}).setdefault(shape.head_dim, {}).setdefault(float(shape.flops), []).extend(tops)
    cards = ", ".join(sorted(f"{gpu}, torch {version}" for gpu, version in facts))
    return {
        "gpu": ", ".join(sorted({gpu for gpu, _ in facts})),
        "provenance": f"measured: whole calls (bf16 in, bf16 out) on {cards}",
        "rates": {
            name: {str(d): [[x, round(fmean(y), 1)] for x, y in sorted(by_dim[d].items())] for d in sorted(by_dim)}
            for name, by_dim in sorted(collected.items())
        },
    }


def read_benchmark(path: Path) -> dict[str, Any]:
    """`table_from_rows` of a file of ``benchmarks/results``."""
    with path.open(newline="", encoding="utf-8") as file:
        return table_from_rows(csv.DictReader(file))

"""The report: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import json
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError
from ..output.saving import write_whole
from .choosing import METRICS, Choice, Metric, pareto
from .clock import CallKey
from .distributions import edges

EXACT = "exact"
_STAGES = {"raw": "as it is", "smooth": "smoothed", "rotated": "smoothed and rotated"}


def write_report(path: str | Path, choice: Choice, *, title: str = "Attention, call by call") -> None:
    """Write the report of a choice and of the observations behind it.

    The page holds its data, styles and script, and loads nothing: it opens offline, and its own policy forbids any
    request. Nothing in it but that script is executed; names of modules are shown as text.

    Raises:
        InvalidArgumentError: the title is no text, or the path no file's. SaveError: it cannot be written.
    """
    if not isinstance(title, str):
        raise InvalidArgumentError(f"title is a {type(title).__name__}, not a text")
    folder = resources.files("lowbit_attention.adaptive").joinpath("page")
    page, style, script = (
        folder.joinpath(f"report.{ending}").read_text(encoding="utf-8") for ending in ("html", "css", "js")
    )
    data = json.dumps(report_data(choice, title), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    texts = {"TITLE": _escaped(title), "STYLE": style, "SCRIPT": script, "DATA": data.replace("<", "\\u003c")}
    # all at once: nothing in what is filled in is taken for a place
    write_whole(path, re.sub(r"%%([A-Z]+)%%", lambda place: texts[place[1]], page))


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def report_data(choice: Choice, title: str) -> dict[str, Any]:
    """Everything the page shows, as JSON values; a number that is not finite is ``null``."""
    seen = choice.observations
    rows = list(dict.fromkeys((key.name, key.index) for key in seen.records))
    several = {name for name, index in rows if index > 0}
    columns = seen.timesteps
    recipes = [EXACT, *seen.candidates]
    cells = [[_cell(choice, recipes, (name, index), timestep) for timestep in columns] for name, index in rows]
    return {
        "title": title,
        "facts": _facts(choice),
        "notes": list(choice.notes),
        "rows": [f"{name} [{index}]" if name in several else name for name, index in rows],
        "names": [name for name, _ in rows],
        "columns": columns,
        "recipes": [
            {
                "name": name,
                "bits": None if name == EXACT else seen.candidates[name].qk_bits,
                "summary": "torch's own attention" if name == EXACT else seen.candidates[name].summary,
                "cost": choice.cost.provenance(name),
                "share": choice.share().get(name, 0.0),
            }
            for name in recipes
        ],
        "metrics": ["score", "l1", "cos_sim", "rmse"],
        "cells": cells,
        "pareto": _pareto(choice),
        "edges": [_number(e) for e in edges()],
        "stages": _STAGES,
        "distributions": {
            name: {
                tensor: {stage: {**s.to_json(), "crest": _number(s.crest)} for stage, s in stages.items() if s.tokens}
                for tensor, stages in by_tensor.items()
            }
            for name, by_tensor in seen.distributions.items()
        },
    }


def _cell(choice: Choice, recipes: list[str], row: tuple[str, int], timestep: float) -> dict[str, Any] | None:
    """One call: what it runs, its shape, and every candidate's metrics."""
    key = CallKey(*row, timestep)
    record = choice.observations.records.get(key)
    if record is None:
        return None
    chosen = choice.recipes.get(key)
    return {
        "recipe": recipes.index(chosen) if chosen in recipes else None,
        "shape": record.shape.label,
        "count": record.count,
        "scores": [
            [_number(getattr(score, metric)) if score.count else None for metric in ("score", "l1", "cos_sim", "rmse")]
            for score in record.scores.values()
        ],
    }


def _facts(choice: Choice) -> list[dict[str, str]]:
    """The figures at the top."""
    seen = choice.observations
    four = choice.four_bit_share()
    layers, steps, runs = ((len(seen.names), "layer"), (len(seen.timesteps), "timestep"), (seen.runs, "run"))
    size = " × ".join(_plural(*part) for part in (layers, steps)) + f", {_plural(*runs)}"
    kind = {"l1": "relative L1", "rmse": "RMSE", "cos": "1 − CosSim", "score": "1 − CosSim · (1 − L1)"}
    error = f"{kind[choice.metric]}, mean of all calls" if choice.metric in kind else "predicted effect on the result"
    facts = [
        ("modelled speed-up of attention", _times(choice.exact_seconds, choice.seconds), choice.cost.summary),
        ("mean error", f"{choice.error:.4f}", error),
        ("calls at 4 bits", f"{100 * four:.0f} %", f"{choice.rule}, {choice.mode}"),
        ("calls", f"{len(seen.records)}", size),
    ]
    return [{"name": name, "value": value, "detail": detail} for name, value, detail in facts]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _times(slow: float, fast: float) -> str:
    return f"{slow / fast:.2f}×" if fast > 0 and math.isfinite(slow / fast) else "–"


def _pareto(choice: Choice) -> dict[str, Any]:
    """The best choices between error and time, single recipes for all calls, and the chosen one."""
    # (effects are not kept in a choice: then the L1 is shown)
    metric: Metric = next((m for m in METRICS if m == choice.metric), "l1")
    offered = [name for name in choice.offered if name != EXACT]
    curve = pareto(choice.observations, recipes=offered, cost=choice.cost, mode=choice.mode, metric=metric)
    alone = [name for name in (EXACT, *choice.observations.candidates) if choice.cost.prices(name)]
    here = choice if choice.metric == metric else choice.measured_by(metric)
    longest = max((one.seconds for one in map(here.uniform, alone)), default=0.0)
    unit, scale = ("ms", 1e3) if longest >= 1e-3 else ("µs", 1e6)
    return {
        "metric": metric,
        "unit": unit,
        "cost": f"{choice.cost.name}: {choice.cost.summary}",
        "curve": [{"x": _number(c.seconds * scale), "y": _number(c.error), "share": c.share()} for c in curve],
        "alone": [
            {"name": name, "x": _number(one.seconds * scale), "y": _number(one.error)}
            for name in alone
            for one in [here.uniform(name)]
        ],
        "chosen": {"x": _number(here.seconds * scale), "y": _number(here.error), "share": here.share()},
    }


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None

"""A study as rows of numbers and as a Markdown table: means, standard errors, and what beats what."""

from __future__ import annotations

import math
from typing import Any

import torch
from study import Row, Study
from torch import Tensor

from lowbit_studies.subjects.base import EndMetric


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error over independent numbers; the error is NaN for fewer than two or for infinities."""
    count = values.numel()
    mean = float(values.mean())
    return mean, float(values.std()) / math.sqrt(count) if count > 1 and math.isfinite(mean) else math.nan


def randoms(study: Study, of: str) -> list[Row]:
    """The random policies that imitate a policy's shares."""
    return [row for row in study.rows if row.of == of]


def advantage(study: Study, name: str, metric: EndMetric) -> tuple[float, float]:
    """How much better (positive) policy ``name`` is than the mean of its random policies, and the standard error.

    Both sources of chance count: which inputs (paired: the same for both) and which random policies.
    """
    others = randoms(study, name)
    mine = study.row(name).values[metric.name]
    theirs = torch.stack([row.values[metric.name] for row in others])
    sign = 1.0 if metric.higher_is_better else -1.0
    mean, over_inputs = mean_and_error(sign * (mine - theirs.mean(dim=0)))
    _, over_policies = mean_and_error(theirs.mean(dim=1))
    return mean, math.hypot(over_inputs, over_policies)


def against(study: Study, name: str, other: str, metric: EndMetric) -> tuple[float, float]:
    """How much better (positive) row ``name`` is than row ``other`` on the same inputs, and the standard error."""
    sign = 1.0 if metric.higher_is_better else -1.0
    return mean_and_error(sign * (study.row(name).values[metric.name] - study.row(other).values[metric.name]))


def rows(study: Study, title: str) -> list[dict[str, Any]]:
    """A line for each row and metric; ``loss`` is how much worse than exact, where that is finite."""
    found = []
    exact = study.row("exact")
    for row in study.rows:
        for metric in study.subject.metrics:
            mean, error = mean_and_error(row.values[metric.name])
            sign = -1.0 if metric.higher_is_better else 1.0
            loss, loss_error = mean_and_error(sign * (row.values[metric.name] - exact.values[metric.name]))
            found.append(
                {
                    "subject": title, "row": row.name, "group": row.group, "of": row.of, "four_bits": row.four_bits,
                    "modelled_ms": 1e3 * row.seconds, "metric": metric.name, "mean": mean, "standard_error": error,
                    "loss": loss, "loss_standard_error": loss_error, "inputs": row.values[metric.name].numel(),
                }
            )  # fmt: skip
    return found


def markdown(study: Study, title: str) -> str:
    """The table of the docs, and the sentences that say what beats what."""
    metrics = study.subject.metrics
    exact = study.row("exact")
    inputs = exact.values[metrics[0].name].numel()
    heading = ["", "calls at 4 bits", "modelled speed", *(m.name for m in metrics)]
    has_loss = bool(torch.isfinite(exact.values[metrics[0].name]).all())
    if has_loss:
        heading.append(f"loss of {metrics[0].name}")
    lines = [f"### {title}", "", _line(heading), _line(["---", *["---:"] * (len(heading) - 1)])]
    shown = [row for row in study.rows if row.group != "random"]
    for row in shown:
        lines.append(_line(_cells(row.name, [row], exact, metrics, has_loss)))
        if others := randoms(study, row.name):
            lines.append(
                _line(_cells(f"{len(others)} random policies of these shares", others, exact, metrics, has_loss))
            )
    best = {True: "higher is better", False: "lower is better"}
    legend = "; ".join(f"{m.name}: {m.meaning} ({best[m.higher_is_better]})" for m in metrics)
    lines += ["", f"{inputs} independent inputs, mean ± standard error. {legend}.", "", *verdicts(study)]
    return "\n".join(lines) + "\n"


def verdicts(study: Study) -> list[str]:
    """What is to be shown, in words with its numbers."""
    metric = study.subject.metrics[0]
    four = [row.name for row in study.rows if row.group == "recipe" and row.four_bits == 1.0]
    found = []
    for row in study.rows:
        if row.group == "adaptive" and randoms(study, row.name):
            gains = {name: against(study, row.name, name, metric) for name in four}
            best = min(gains, key=lambda name: gains[name][0])
            share, gain = 100 * row.four_bits, _better(gains[best], metric)
            luck = _better(advantage(study, row.name, metric), metric)
            found.append(
                f"- `{row.name}` ({share:.0f} % of the calls at 4 bits) is {gain} than the best all-4-bit "
                f"recipe, `{best}`, and {luck} than the mean of its random policies."
            )
    for name in four:
        loss = against(study, name, "sage2pp_8b", metric)
        noise = ", which is noise" if abs(loss[0]) < 2 * loss[1] else ""
        found.append(f"- `{name}` everywhere is {_better(loss, metric)} than `sage2pp_8b` everywhere{noise}.")
    if study.bitwise is not None:
        bits = "the same bits" if study.bitwise else "OTHER BITS"
        found.append(f"- A stored policy, read back and applied again, gives {bits}.")
    return found


def _better(pair: tuple[float, float], metric: EndMetric) -> str:
    value, error = pair
    size, digits = abs(value), metric.digits + 1
    word = "better" if value >= 0 else "worse"
    return f"{size:.{digits}f} ± {error:.{digits}f} {metric.name} ({_ratio(size, error)} standard errors) {word}"


def _ratio(value: float, error: float) -> str:
    return f"{value / error:.1f}" if error > 0 else "-"


def _cells(name: str, group: list[Row], exact: Row, metrics: tuple[EndMetric, ...], has_loss: bool) -> list[str]:
    """One line of one policy, or of the mean of several: then the error is over the policies."""
    seconds = group[0].seconds
    speed = "-" if math.isnan(seconds) else f"{exact.seconds / seconds:.2f}×"
    cells = [f"`{name}`" if len(group) == 1 else name, f"{100 * group[0].four_bits:.0f} %", speed]
    for metric in metrics:
        cells.append(_number(group, metric.name, metric.digits, None))
    if has_loss:
        cells.append(_number(group, metrics[0].name, metrics[0].digits + 1, exact))
    return cells


def _number(group: list[Row], metric: str, digits: int, exact: Row | None) -> str:
    values = torch.stack([row.values[metric] for row in group])
    if exact is not None:
        values = values - exact.values[metric]
    mean, error = mean_and_error(values[0] if len(group) == 1 else values.mean(dim=1))
    text = "∞" if math.isinf(mean) else f"{mean:.{digits}f}"
    return text if math.isnan(error) or error == 0 else f"{text} ± {error:.{digits}f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"

"""Pictures of results, by matplotlib (the extra ``plot``)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError, MissingExtraError
from .console import visible
from .saving import replacing

_ENDINGS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Whether a plot can be written there.

    Raises:
        InvalidArgumentError: an unknown ending. MissingExtraError: matplotlib is not installed.
    """
    if path.suffix not in _ENDINGS:
        raise InvalidArgumentError(f"a plot ends in {', '.join(_ENDINGS)}, not {path.suffix!r}: {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("a plot", "plot", "matplotlib")


def label(text: str) -> str:
    """Text from outside for a picture: matplotlib would read what is between two dollars as a formula."""
    return visible(text).replace("$", r"\$")


def figure(width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, drawn without a display; `check_plot` says whether there is matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(figsize=(width, height), layout="constrained", **options)
    return fig, axes


def log_ticks() -> Any:
    """Ticks at 1, 2 and 5 times the powers of ten, for a logarithmic axis of few decades."""
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1.0, 2.0, 5.0))


def save(path: Path, fig: Any) -> None:
    """Write a figure (the ending decides: .png, .svg, .pdf) and close it."""
    from matplotlib import pyplot

    try:
        with replacing(path) as half:
            fig.savefig(half, dpi=150, format=path.suffix[1:])
    finally:
        pyplot.close(fig)


def grouped_bars(
    path: Path, groups: Sequence[str], series: Mapping[str, Sequence[float]], title: str, ylabel: str
) -> None:
    """Bars of every series, side by side in each group, on a logarithmic axis."""
    fig, axes = figure(max(7.0, 0.22 * len(groups) * len(series) + 3), 4.2)
    width = 0.8 / max(1, len(series))
    for number, (name, values) in enumerate(series.items()):
        at = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(at, [v if math.isfinite(v) else math.nan for v in values], width, label=label(name))
    axes.set_xticks(range(len(groups)), [label(group) for group in groups])
    axes.set_yscale("log")
    axes.set_ylabel(ylabel)
    axes.set_title(label(title))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(path, fig)

"""Rows as a Markdown table and as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..output.console import visible
from ..output.plots import figure, label, save
from .results import Measurement


def microseconds(value: float) -> str:
    """Three digits or more: ``9.87``, ``98.7``, ``987``, ``9870``."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def number(value: float | None, digits: int = 0) -> str:
    """A number that may be missing."""
    return "-" if value is None else f"{value:.{digits}f}"


def tops_text(value: float) -> str:
    """Whole TOPS, and digits below ten, as on a CPU."""
    return f"{value:.0f}" if value >= 10 else f"{value:.3g}"


def _grouped(
    rows: Sequence[Measurement],
) -> tuple[list[str], list[tuple[str, str]], dict[tuple[str, str, str], Measurement]]:
    """Shapes and (provider, part) pairs in the order they first occur, and the last row of each combination."""
    shapes = list(dict.fromkeys(r.shape for r in rows))
    series = list(dict.fromkeys((r.provider, r.part) for r in rows))
    return shapes, series, {(r.shape, r.provider, r.part): r for r in rows}


def markdown(rows: Sequence[Measurement]) -> str:
    """Shapes down, providers across; a cell is ``µs (TOPS, times cuDNN's speed)``."""
    if not rows:
        return "Nothing was measured.\n"
    shapes, series, found = _grouped(rows)
    r = rows[0]
    told = (("", r.gpu), ("driver ", r.driver), ("CUDA ", r.cuda), ("torch ", r.torch), ("commit ", r.commit))
    lines = [
        f"{r.time[:10]}, lowbit-attention {r.lowbit}, "
        + ", ".join(name + visible(value) for name, value in told if value)
        + f", {r.dtype}. Cells: µs (TOPS, × the speed of torch's cuDNN).",
        "",
        "| shape | " + " | ".join(f"{provider} {part}" for provider, part in series) + " |",
        "|---|" + "---:|" * len(series),
    ]
    for shape in shapes:
        cells = [_cell(found.get((shape, *one))) for one in series]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Measurement | None) -> str:
    if row is None:
        return "-"
    ratio = "" if row.ratio_to_cudnn is None else f", {row.ratio_to_cudnn:.2f}×"
    return f"{microseconds(row.median_us)} ({tops_text(row.tops)}{ratio})"


def bars(path: Path, rows: Sequence[Measurement]) -> None:
    """TOPS of every provider at every shape: whole calls filled, kernels alone hatched in the same colour."""
    shapes, series, found = _grouped(rows)
    providers = list(dict.fromkeys(provider for provider, _ in series))
    fig, axes = figure(max(7.0, 0.22 * len(shapes) * len(series) + 3), 4.2)
    width = 0.8 / max(1, len(series))
    for place, (provider, part) in enumerate(series):
        points = [(i, found[s, provider, part].tops) for i, s in enumerate(shapes) if (s, provider, part) in found]
        at = [i + (place - (len(series) - 1) / 2) * width for i, _ in points]
        colour = f"C{providers.index(provider) % 10}"
        look = {"color": colour} if part == "whole" else {"facecolor": "white", "edgecolor": colour, "hatch": "////"}
        axes.bar(at, [value for _, value in points], width, label=label(f"{provider} {part}"), **look)
    axes.set_xticks(
        range(len(shapes)), shapes, rotation=30 if len(shapes) > 6 else 0, ha="right" if len(shapes) > 6 else "center"
    )
    axes.set_ylabel("TOPS")
    axes.set_title(label(f"attention on {rows[0].gpu}") if rows else "attention")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(path, fig)

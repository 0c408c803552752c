"""Draw what `evaluate.py` found: `python draw.py OUT docs/images` (the extra `plot`)."""

from __future__ import annotations

import argparse
import csv
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from lowbit_attention.output.plots import figure, save
from lowbit_studies.subjects.base import Subject
from lowbit_studies.subjects.dit import DiffusionSubject
from lowbit_studies.subjects.encoder import EncoderSubject
from lowbit_studies.subjects.lm import LanguageSubject

_KINDS: dict[str, type[Subject]] = {"lm": LanguageSubject, "dit": DiffusionSubject, "minilm": EncoderSubject}
_SHOWN = ("exact", "sage2pp_8b", "adaptive 60", "adaptive 80", "rotated_4b", "sage2_4b")
_AMPLIFIED = 8
_DPI = 150  # what `save` draws with
_ZOOM, _GAP, _MARGIN = 2, 4, 170
"""Pixels of the drawing for one of a picture; between two; left of them, for names."""
_LINE, _LETTER, _AWAY = 0.04, 0.0078, 0.013
"""A name's height, its width for each letter, and its distance from its mark, as shares of the axes."""


def side_by_side(source: Path, path: Path) -> None:
    """Each row's pictures, and below them their difference from exact's, amplified."""
    with np.load(source) as data:
        names = [str(name) for name in data["names"]]
        pictures = data["pictures"].transpose(0, 1, 3, 4, 2).astype(np.int16)
    exact = pictures[names.index("exact")]
    strips: list[tuple[str, Any]] = []
    for name in (name for name in _SHOWN if name in names):
        mine = pictures[names.index(name)]
        strips.append((name, mine))
        if name != "exact":
            strips.append((f"− exact, {_AMPLIFIED} ×", np.clip(128 + _AMPLIFIED * (mine - exact), 0, 255)))
    whole = np.concatenate([_strip(shown.astype(np.uint8)) for _, shown in strips])
    height, width = whole.shape[0], whole.shape[1] + _MARGIN
    fig, axes = figure(width / _DPI, height / _DPI, dpi=_DPI)
    axes.remove()
    fig.figimage(whole, _MARGIN, 0, origin="upper")  # pixel by pixel: nothing is resampled
    for number, (name, _) in enumerate(strips):
        at = 1 - (number + 0.5) / len(strips)
        fig.text((_MARGIN - 10) / width, at, name, ha="right", va="center", fontsize=8)
    save(path, fig)


def _strip(pictures: Any) -> Any:
    """Pictures ``[B, H, W, 3]`` side by side, enlarged, with white gaps."""
    big = pictures.repeat(_ZOOM, axis=1).repeat(_ZOOM, axis=2)
    framed = np.pad(big, ((0, 0), (_GAP, 0), (0, _GAP), (0, 0)), constant_values=255)
    return np.concatenate(list(framed), axis=1)


def spread(source: Path, subject: str, path: Path) -> None:
    """The subject's first metric against the modelled time: recipes, policies, and each random policy as a dot."""
    kind = _KINDS[subject.partition(":")[0]]
    metric = kind.metrics[0]
    with source.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["subject"], row["metric"]) == (subject, metric.name)]
    exact = next(row for row in rows if row["row"] == "exact")
    rows = [row for row in rows if row is not exact and row["modelled_ms"] != "nan"]
    fig, axes = figure(8.0, 5.0)
    for group, marker in (("random", "."), ("recipe", "s"), ("adaptive", "*")):
        mine = [row for row in rows if row["group"] == group]
        size, label = (40, "random policy") if group == "random" else (90, group)
        axes.scatter(_column(mine, "modelled_ms"), _column(mine, "mean"), marker=marker, s=size, label=label, alpha=0.8)
    if np.isfinite(float(exact["mean"])):  # (slower than all by far: no place on this axis)
        axes.axhline(float(exact["mean"]), ls=":", color="black", label=f"exact, {float(exact['modelled_ms']):.2g} ms")
    axes.margins(x=0.14)
    _names(axes, rows)
    axes.set_xlabel("modelled time of attention on an RTX 4090, ms (claimed rates)")
    better = "higher" if metric.higher_is_better else "lower"
    axes.set_ylabel("\n".join(textwrap.wrap(f"{metric.meaning} ({better} is better)", 48)), fontsize=9)
    axes.set_title(f"{subject}: {kind.title}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(path, fig)


def _names(axes: Any, rows: list[dict[str, str]]) -> None:
    """Each policy's and recipe's name on the side of its mark with fewer marks, moved up where another name is."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()

    def place(row: dict[str, str]) -> tuple[float, float]:
        return (float(row["modelled_ms"]) - left) / (right - left), (float(row["mean"]) - low) / (high - low)

    marks = [place(row) for row in rows]
    taken: list[tuple[float, float]] = []
    for row in sorted((row for row in rows if row["group"] != "random"), key=lambda row: float(row["mean"])):
        x, y = place(row)
        width, y = _LETTER * len(row["row"]), y - 0.01
        hidden = [
            sum(lo < a < lo + width and abs(b - y) < _LINE for a, b in marks) for lo in (x - _AWAY - width, x + _AWAY)
        ]
        from_x = x + _AWAY if hidden[1] < hidden[0] else x - _AWAY - width
        while any(abs(from_x - a) < width and abs(y - b) < _LINE for a, b in taken):
            y += _LINE / 8
        taken.append((from_x, y))
        side = "left" if from_x > x else "right"
        at = from_x if from_x > x else from_x + width
        axes.text(at, y, row["row"], transform=axes.transAxes, fontsize=7, ha=side)


def _column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("found", type=Path, help="what evaluate.py wrote")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    options = parser.parse_args(arguments)
    with (options.found / "results.csv").open(newline="", encoding="utf-8") as file:
        subjects = list(dict.fromkeys(row["subject"] for row in csv.DictReader(file)))
    for subject in subjects:
        name = subject.replace(":", "_")
        spread(options.found / "results.csv", subject, options.out / f"subject-{name}.png")
        pictures = options.found / name / "pictures.npz"
        if pictures.is_file():
            side_by_side(pictures, options.out / f"subject-{name}-pictures.png")


if __name__ == "__main__":
    main()

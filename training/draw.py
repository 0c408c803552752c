"""Draw what `training/evaluate.py` found: `python training/draw.py OUT docs/images` (the extra `plot`)."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np

from lowbit_attention.report.plots import figure, save

_SHOWN = ("exact", "sage2pp_8b", "adaptive 60", "adaptive 80", "rotated_4b", "sage2_4b")
_AMPLIFIED = 8


def side_by_side(source: Path, path: Path) -> None:
    """Each row's pictures, and beside them their difference from exact's, amplified."""
    with np.load(source) as data:
        names = [str(name) for name in data["names"]]
        pictures = data["pictures"].transpose(0, 1, 3, 4, 2).astype(np.int16)
    shown = [name for name in _SHOWN if name in names]
    count = pictures.shape[1]
    exact = pictures[names.index("exact")]
    fig, axes = figure(1.1 * count + 1.2, 2.15 * len(shown), nrows=2 * len(shown), ncols=count)
    for row, name in enumerate(shown):
        mine = pictures[names.index(name)]
        for column in range(count):
            top, below = axes[2 * row, column], axes[2 * row + 1, column]
            top.imshow(mine[column].astype(np.uint8))
            below.imshow(np.clip(128 + _AMPLIFIED * (mine[column] - exact[column]), 0, 255).astype(np.uint8))
            for ax in (top, below):
                ax.set_xticks([])
                ax.set_yticks([])
        axes[2 * row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
        axes[2 * row + 1, 0].set_ylabel(f"− exact, {_AMPLIFIED}×", rotation=0, ha="right", va="center", fontsize=8)
    save(path, fig)


def spread(source: Path, subject: str, path: Path) -> None:
    """The subject's first metric against the modelled time: recipes, policies, and each random policy as a dot."""
    with source.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["subject"] == subject]
    metric = rows[0]["metric"]
    rows = [row for row in rows if row["metric"] == metric and row["mean"] != "inf" and row["modelled_ms"] != "nan"]
    fig, axes = figure(7.5, 4.5)
    for group, marker in (("random", "."), ("recipe", "s"), ("adaptive", "*")):
        mine: list[dict[str, Any]] = [row for row in rows if row["group"] == group]
        x, y = [float(row["modelled_ms"]) for row in mine], [float(row["mean"]) for row in mine]
        axes.scatter(x, y, marker=marker, s=40 if group == "random" else 90, label=group, alpha=0.8)
        for row, at_x, at_y in zip(mine, x, y, strict=True):
            if group != "random":
                axes.annotate(row["row"], (at_x, at_y), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("modelled time of attention on an RTX 4090, ms (claimed rates)")
    axes.set_ylabel(metric)
    axes.set_title(subject)
    axes.grid(alpha=0.3)
    axes.legend()
    save(path, fig)


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

"""``lowbit demo``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..demo import study
from ..demo.minilm import MiniLM
from ..demo.study import Study
from ..evaluation.ablations import UNSMOOTHED_4B
from ..output.console import plain
from ..output.files import Row, write_csv, write_json
from ..recipes.definition import Recipe
from ..recipes.named import recipe
from .common import (
    LIKE_HELP,
    RECIPE_HELP,
    check_outputs,
    console,
    new_table,
    parse_like,
    parse_recipes,
    percent,
    progress,
    shaded,
    show,
    write_results,
)

DEFAULT_RECIPES = (
    "int8_fp16", "sage1", "int8_u8", "fast_8b", "sage2pp_8b", "sage2_8b", "rotated_4b", "sage2pp_4b", "sage2_4b",
    UNSMOOTHED_4B,
)  # fmt: skip
_HEADINGS = {recipe(UNSMOOTHED_4B).name: "4-bit, unsmoothed"}

FAITHFUL_COS, FAITHFUL_L1, NEAR_LOSSLESS_L1 = 0.9995, 0.028, 0.010


def command(
    recipes: Annotated[list[str] | None, typer.Option("--recipe", "-r", help=RECIPE_HELP)] = None,
    like: Annotated[str | None, typer.Option(help=LIKE_HELP)] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every number to this CSV file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every number to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the errors by layer (.png, .svg, .pdf).")] = None,
) -> None:
    """Quantise the attention of a real model (MiniLM-L6, real weights, offline) and see what changes.

    The model reads English from Python's own docstrings: three chunks of 512 tokens, and 150 sentences. Each recipe's
    attention output is compared, layer by layer, with exact attention in float64 on the same Q, K and V; then every
    layer runs the recipe, and the sentences' embeddings are compared. About a minute on two cores.
    """
    chosen = parse_recipes(recipes, DEFAULT_RECIPES)
    machine = parse_like(like)
    check_outputs(csv, json, plot=plot)
    with progress() as bar:
        task = bar.add_task("loading MiniLM", total=None)
        model = MiniLM()
        bar.update(task, total=study.steps(chosen, model.layers))
        result = study.run(model, chosen, machine, lambda what: bar.update(task, advance=1, description=what))
    for metric in ("l1", "cos_sim", "rmse"):
        console.print(_layer_table(result, metric))
    console.print(_summary_table(result))
    console.print(f"[bold]Verdict:[/] {plain(verdict(result, chosen))}")
    document = {"recipes": [r.options() | {"name": r.name} for r in chosen], "rows": rows(result)}
    write_results(
        (csv, lambda path: write_csv(path, rows(result))),
        (json, lambda path: write_json(path, document)),
        (plot, lambda path: _plot(result, path)),
    )


def rows(result: Study) -> list[Row]:
    """Every number, a row each layer and recipe, then a row each recipe's embeddings."""
    layers: list[Row] = [
        {"subject": r.subject, "recipe": r.recipe, "layer": r.layer, **r.metrics.as_dict()} for r in result.layers
    ]
    return layers + [
        {
            "subject": "embeddings",
            "recipe": e.recipe,
            "embedding_cos_mean": e.cos_mean,
            "embedding_cos_min": e.cos_min,
            "neighbours_changed": e.neighbours_changed,
            "sentences": e.sentences,
        }
        for e in result.embeddings
    ]


def verdict(result: Study, recipes: list[Recipe]) -> str:
    """One line: who is near-lossless, who is faithful, who is not, and what smoothing buys at 4 bits."""
    near, faithful, lossy = [], [], []
    for r in recipes:
        metrics = result.of("chunks", r.name)
        worst_l1, worst_cos = max(m.l1 for m in metrics), min(m.cos_sim for m in metrics)
        if worst_l1 <= NEAR_LOSSLESS_L1:
            near.append(r.name)
        elif worst_l1 <= FAITHFUL_L1 and worst_cos >= FAITHFUL_COS:
            faithful.append(r.name)
        else:
            lossy.append(f"{_heading(r.name)} ({worst_l1:.3f})")
    parts = []
    if near:
        parts.append(f"near-lossless (L1 ≤ {NEAR_LOSSLESS_L1:.3f} in every layer): {', '.join(near)}")
    if faithful:
        parts.append(f"faithful (CosSim ≥ {percent(FAITHFUL_COS, 2)} %, L1 ≤ {FAITHFUL_L1}): {', '.join(faithful)}")
    if lossy:
        parts.append(f"lossy (worst layer's L1): {', '.join(lossy)}")
    unsmoothed = recipe(UNSMOOTHED_4B).name
    if {unsmoothed, "sage2_4b"} <= {r.name for r in recipes}:
        ratio = result.mean_l1("chunks", unsmoothed) / result.mean_l1("chunks", "sage2_4b")
        parts.append(f"smoothing Q and K makes 4 bits {ratio:.2f}× more accurate")
    return "; ".join(parts) + "."


def _heading(name: str) -> str:
    return _HEADINGS.get(name, name)


def _layer_table(result: Study, metric: str) -> Table:
    titles = {
        "l1": "relative L1 of each layer's attention output, three chunks of 512 tokens",
        "cos_sim": "CosSim in %, the same",
        "rmse": "RMSE, the same",
    }
    layers = len(result.of("chunks", result.recipes[0]))
    table = new_table(titles[metric], "recipe", *(f"layer {n}" for n in range(layers)))
    for name in result.recipes:
        table.add_row(plain(_heading(name)), *(show(metric, getattr(m, metric)) for m in result.of("chunks", name)))
    return table


def _summary_table(result: Study) -> Table:
    table = new_table(
        "all layers together, mean/worst", "recipe", "L1, chunks", "L1, sentences", "embeddings %", "neighbours"
    )
    table.caption = (
        "embeddings: CosSim of each sentence's embedding with the exact model's\n"
        "neighbours: sentences whose nearest other sentence is another one"
    )
    for e in result.embeddings:
        cells = [
            f"{shaded(result.mean_l1(subject, e.recipe))}/{shaded(max(m.l1 for m in result.of(subject, e.recipe)))}"
            for subject in ("chunks", "sentences")
        ]
        embeddings = f"{percent(e.cos_mean, 2)}/{percent(e.cos_min, 2)}"
        table.add_row(plain(_heading(e.recipe)), *cells, embeddings, f"{e.neighbours_changed} of {e.sentences}")
    return table


def _plot(result: Study, path: Path) -> None:
    from ..output.plots import grouped_bars

    layers = [f"layer {n}" for n in range(len(result.of("chunks", result.recipes[0])))]
    series = {_heading(name): [m.l1 for m in result.of("chunks", name)] for name in result.recipes}
    grouped_bars(path, layers, series, "MiniLM-L6, attention output against exact attention", "relative L1")

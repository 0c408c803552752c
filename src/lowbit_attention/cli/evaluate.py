"""``lowbit evaluate``: what recipes cost on given tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from ..errors import InvalidArgumentError, LowbitError
from ..evaluation import ablations
from ..evaluation.errors import Case, HeadErrors
from ..evaluation.inputs import Inputs, from_family, from_file, not_finite
from ..evaluation.metrics import Metrics
from ..evaluation.synthetic import CHANNEL_FAMILIES, FAMILIES
from ..output.console import plain, visible
from ..output.files import Row, write_csv, write_json
from ..recipes.definition import Recipe
from ..recipes.machine import Machine, resolve_machine
from .common import (
    LIKE_HELP,
    RECIPE_HELP,
    check_outputs,
    console,
    new_table,
    parse_like,
    parse_recipes,
    progress,
    show,
    write_results,
)

METRICS = ("l1", "cos_sim", "rmse", "max_error")
DEFAULTS = {"length": 1024, "heads": 4, "head_dim": 128, "batch": 1, "seed": 0}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def command(
    file: Annotated[
        Path | None, typer.Argument(help="A .safetensors or .pt file with q, k, v (or several: prefix.q, prefix.k, …).")
    ] = None,
    families: Annotated[
        list[str] | None,
        typer.Option(
            "--family",
            "-f",
            help=f"A synthetic family, repeatable, `channels` (the first ten) or `all`: {', '.join(FAMILIES)}.",
        ),
    ] = None,
    recipes: Annotated[list[str] | None, typer.Option("--recipe", "-r", help=RECIPE_HELP)] = None,
    table: Annotated[
        str | None,
        typer.Option("--table", "-t", help=f"A ready-made list of recipes: {', '.join(ablations.ABLATIONS)}."),
    ] = None,
    metric: Annotated[str, typer.Option(help=f"The metric to show: {', '.join(METRICS)}. Files hold all.")] = "l1",
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a synthetic input (1024).")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Heads of a synthetic input (4).")] = None,
    head_dim: Annotated[
        int | None, typer.Option(min=2, max=256, help="Head dimension of a synthetic input, even (128).")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch of a synthetic input (1).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of a synthetic input (0).")] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"What a synthetic input is rounded to first: {', '.join(DTYPES)} (float32).")
    ] = None,
    query_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Measure so many query rows, in whole tiles spread evenly; all keys count. All rows."),
    ] = None,
    fidelity: Annotated[
        str,
        typer.Option(help="`step`, or `instruction`: every product truncated as the tensor core does it; slower."),
    ] = "step",
    layout: Annotated[
        str | None, typer.Option(help="Layout of the file's tensors: HND ([B,H,N,D], the default) or NHD.")
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Causal attention (bottom-right).")] = False,
    like: Annotated[str | None, typer.Option(help=LIKE_HELP)] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every metric to this CSV file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every metric to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the L1 errors (.png, .svg, .pdf).")] = None,
) -> None:
    """Compare recipes with exact attention (float64) on your tensors or on synthetic families.

    * `lowbit evaluate -f all -t recipes` — every recipe on every family
    * `lowbit evaluate -f qk_bias -t smoothing` — SageAttention2's smoothing ablation
    * `lowbit evaluate -f drift --length 131072 --query-rows 64 --dtype bfloat16 --fidelity instruction --like sm_90a` —
      a long sequence
    * `lowbit evaluate qkv.safetensors -r sage2_8b -r int8_fp16` — your own Q, K and V
    """
    if metric not in METRICS:
        raise InvalidArgumentError(f"--metric {metric!r} is not one of {', '.join(METRICS)}")
    if table is not None and recipes:
        raise InvalidArgumentError("give --table or --recipe, not both")
    chosen = (
        ablations.ablation(table).recipes()
        if table is not None
        else {r.name: r for r in parse_recipes(recipes, list(ablations.ABLATIONS["recipes"].rows))}
    )
    if fidelity not in ("step", "instruction"):
        raise InvalidArgumentError(f"--fidelity {fidelity!r} is not one of step, instruction")
    machine = resolve_machine(parse_like(like), "instruction" if fidelity == "instruction" else "step")
    check_outputs(csv, json, plot=plot, inputs=[file])
    synthetic = {"length": length, "heads": heads, "head_dim": head_dim, "batch": batch, "seed": seed}
    inputs = _inputs(
        file, layout, families, {name: value for name, value in synthetic.items() if value is not None}, dtype
    )
    results, by_head, failed = _measure_all(inputs, chosen, machine, causal, query_rows)
    if failed and not results:
        raise next(iter(failed.values()))
    title = ablations.ABLATIONS[table].title if table is not None else "recipes"
    for shown in _tables(title, metric, list(chosen), [i.name for i in inputs], results):
        console.print(shown)
    for note in _notes(inputs, failed):
        console.print(f"[yellow]note:[/] {plain(note)}", soft_wrap=True)
    rows = _rows(chosen, inputs, results, by_head)
    document = {"recipes": {label: r.options() for label, r in chosen.items()}, "rows": rows}
    write_results(
        (csv, lambda path: write_csv(path, rows)),
        (json, lambda path: write_json(path, document)),
        (plot, lambda path: _plot(path, title, list(chosen), inputs, results)),
    )
    if failed:
        raise next(iter(failed.values()))


Results = dict[tuple[str, str], Metrics]
"""By a recipe's label and an input's name."""


def _measure_all(
    inputs: list[Inputs], chosen: dict[str, Recipe], machine: Machine, causal: bool, query_rows: int | None
) -> tuple[Results, dict[tuple[str, str], HeadErrors], dict[tuple[str, str], LowbitError]]:
    """What was measured, and what a recipe or an input (label ``""``) refused: the others are measured all the same."""
    results: Results = {}
    by_head: dict[tuple[str, str], HeadErrors] = {}
    failed: dict[tuple[str, str], LowbitError] = {}
    with progress() as bar:
        task = bar.add_task("exact attention", total=len(inputs) * (len(chosen) + 1))
        for one in inputs:
            bar.update(task, description=f"{one.name}: exact", advance=1)
            try:
                case = Case(one.q, one.k, one.v, machine, is_causal=causal, query_rows=query_rows)
            except LowbitError as error:
                failed["", one.name] = error
                continue
            for label, recipe in chosen.items():
                bar.update(task, description=f"{one.name}: {label}", advance=1)
                try:
                    out = case.emulated(recipe)
                except LowbitError as error:
                    failed[label, one.name] = error
                else:
                    results[label, one.name], by_head[label, one.name] = case.metrics(out), case.by_head(out)
    return results, by_head, failed


def _notes(inputs: list[Inputs], failed: dict[tuple[str, str], LowbitError]) -> Iterator[str]:
    """What one should know of the numbers: inputs that are none, and what was not measured."""
    for one in inputs:
        if counts := not_finite(one):
            what = ", ".join(f"{count} of {tensor}" for tensor, count in counts.items())
            yield f"{one.name}: {what} are NaN or infinite, and so is what comes of them (in JSON: null)"
    for (label, name), error in failed.items():
        yield f"not measured: {name}{label and f' with {label}'}: {' '.join(str(error).split())}"


def _inputs(
    file: Path | None, layout: str | None, families: list[str] | None, synthetic: dict[str, int], dtype: str | None
) -> list[Inputs]:
    """The file's tensors or the synthetic ones; options that belong to the other are refused."""
    if file is not None:
        idle = ["--family"] * bool(families) + ["--dtype"] * bool(dtype)
        if idle := idle + [f"--{name.replace('_', '-')}" for name in synthetic]:
            raise InvalidArgumentError(
                f"a file's tensors are taken as they are: {', '.join(idle)} does nothing beside it"
            )
        return from_file(file, layout or "HND")
    if layout is not None:
        raise InvalidArgumentError(f"--layout {layout} says how a file's tensors lie, and no file is given")
    setting = DEFAULTS | synthetic
    if setting["head_dim"] % 2:
        raise InvalidArgumentError(f"--head-dim {setting['head_dim']}: synthetic inputs need an even one")
    if dtype is not None and dtype not in DTYPES:
        raise InvalidArgumentError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    names = [
        name
        for asked in families or ["normal", "qkv_bias", "sink"]
        for name in {"all": tuple(FAMILIES), "channels": CHANNEL_FAMILIES}.get(asked, (asked,))
    ]
    return [from_family(name, **setting, dtype=DTYPES[dtype or "float32"]) for name in dict.fromkeys(names)]


def _plot(path: Path, title: str, labels: list[str], inputs: list[Inputs], results: Results) -> None:
    from ..output.plots import grouped_bars

    names = [i.name for i in inputs]
    found = {label: [results[label, n].l1 if (label, n) in results else math.nan for n in names] for label in labels}
    grouped_bars(path, names, found, title, "relative L1")


def _rows(
    chosen: dict[str, Recipe],
    inputs: list[Inputs],
    results: Results,
    by_head: dict[tuple[str, str], HeadErrors],
) -> list[Row]:
    return [
        {"input": one.name, "shape": "x".join(map(str, one.q.shape)), "label": label, "recipe": recipe.name}
        | results[label, one.name].as_dict()
        | {"l1_standard_error": by_head[label, one.name].standard_error}
        for one in inputs
        for label, recipe in chosen.items()
        if (label, one.name) in results
    ]


def _tables(title: str, metric: str, labels: list[str], names: list[str], results: Results) -> Iterator[Table]:
    """As many tables, one below the other, as the inputs need on this console."""
    units = {"l1": "relative L1", "cos_sim": "CosSim, %", "rmse": "RMSE", "max_error": "largest error"}
    fitting = max(
        1, (console.width - 2 - min(30, max(map(len, labels)))) // (2 + max(8, *(len(visible(name)) for name in names)))
    )
    for first in range(0, len(names), fitting):
        block = names[first : first + fitting]
        table = new_table(f"{title}: {units[metric]}", "", *block)
        for label in labels:
            found = [results.get((label, name)) for name in block]
            table.add_row(plain(label), *("-" if m is None else show(metric, getattr(m, metric)) for m in found))
        yield table

"""``lowbit recipes``: what the recipes are."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from ..output.console import plain
from ..recipes.named import RECIPES, recipe
from .common import console


def command(
    name: Annotated[
        str | None,
        typer.Argument(help="A recipe, with changes if wanted (`sage2_4b:smooth_q=false`); all if left out."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, as `Recipe.from_json` reads it.")] = False,
) -> None:
    """List the named recipes, or every option of one."""
    if name is None:
        if json:
            typer.echo("[" + ",\n".join(r.to_json() for r in RECIPES.values()) + "]")
            return
        table = Table(title="recipes", title_justify="left")
        table.add_column("name")
        table.add_column("what it is")
        for entry in RECIPES.values():
            table.add_row(plain(entry.name), plain(entry.summary))
        console.print(table)
        return
    chosen = recipe(name)
    if json:
        typer.echo(chosen.to_json(indent=2))
        return
    table = Table(
        title=plain(chosen.name), caption=plain(chosen.summary) or None, title_justify="left", caption_justify="left"
    )
    table.add_column("option")
    table.add_column("value")
    for option, value in chosen.options().items():
        table.add_row(option, plain(value))
    console.print(table)

"""`eaftdrope preview`: what a recipe trains on, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eaftdrope.recipe import load_recipe


def preview(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, such as data.max_length=512.", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to show, spread over the data.")] = 3,
    scan: Annotated[int, typer.Option(min=1, help="Rows of each source to read for the counts.")] = 2000,
) -> None:
    """Show what a recipe trains on: tokens coloured by what carries the loss ([[ ]] around it where there is no colour),
    the share of truncated rows, whether the stop token is trained, and the rows that cannot be used."""
    loaded = load_recipe(recipe, overrides or [])

    from rich.console import Console

    from eaftdrope.data.preview import make_preview, preview_text
    from eaftdrope.models import load_tokenizer

    model, data = loaded.model, loaded.data
    console = Console()
    shown = make_preview(
        data.train_sources(),
        load_tokenizer(model.reference, revision=model.revision, trust_remote_code=model.trust_remote_code),
        rows=rows,
        format=data.format,
        train_on=data.train_on,
        max_length=data.max_length,
        on_bad_row=data.on_bad_row,
        seed=loaded.train.seed,
        scan=scan,
    )
    marks = not console.is_terminal or console.no_color
    console.print(preview_text(shown, marks=marks), soft_wrap=True)

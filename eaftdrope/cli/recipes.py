"""`eaftdrope recipes`: the recipes that come with the package, to read, copy and own."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from eaftdrope.errors import UserError
from eaftdrope.recipe.suggest import did_you_mean


class Action(enum.Enum):
    ls = "ls"
    show = "show"
    cp = "cp"


def recipes(
    action: Annotated[Action, typer.Argument(help="ls: list; show NAME: print; cp NAME [DST]: copy.")] = Action.ls,
    name: Annotated[str | None, typer.Argument(help="A name from `ls`.", show_default=False)] = None,
    destination: Annotated[Path | None, typer.Argument(help="File or folder.", show_default=False)] = None,
) -> None:
    """List, show or copy the recipes that come with eaftdrope: `recipes ls`, `recipes show quickstart`,
    `recipes cp quickstart mine.yaml`."""
    if action is Action.ls:
        shipped = shipped_recipes()
        width = max(map(len, shipped))
        for entry, path in shipped.items():
            typer.echo(f"{entry:{width}}  {title(path)}")
        return
    if name is None:
        raise UserError(f"`eaftdrope recipes {action.value}` needs a name. `eaftdrope recipes ls` lists the names.")
    source = find_recipe(name)
    if action is Action.show:
        typer.echo(source.read_text(encoding="utf-8"), nl=False)
        return
    target = Path(destination) if destination else Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise UserError(f"{target} already exists and was not changed. Choose another destination.")
    if not target.parent.is_dir():
        raise UserError(f"the folder {target.parent} does not exist. Create it, or choose another destination.")
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    typer.echo(f"written: {target}. Edit it, then run: eaftdrope validate {target}")


def shipped_recipes() -> dict[str, Path]:
    """Name (`medical/qwen3_4b`) -> file, from the wheel's `eaftdrope/_recipes` or the source tree's `recipes`."""
    package = Path(__file__).resolve().parent.parent
    folder = next((place for place in (package / "_recipes", package.parent / "recipes") if place.is_dir()), None)
    if folder is None:
        raise UserError("the recipes are missing from this installation. Install eaftdrope again.")
    files = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def find_recipe(name: str) -> Path:
    """The shipped recipe called `name` (with or without .yaml). Raises UserError with the nearest names."""
    shipped = shipped_recipes()
    wanted = name.removesuffix(".yaml").removeprefix("recipes/")
    if wanted not in shipped:
        raise UserError(f"no recipe '{name}'.{did_you_mean(wanted, shipped)} Recipes: {', '.join(shipped)}.")
    return shipped[wanted]


def title(path: Path) -> str:
    """The first line of the recipe's header comment."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")

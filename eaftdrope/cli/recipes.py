"""`eaftdrope recipes`: the recipes that come with the package, to read, copy and own; and those made from other tools'
configurations."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from eaftdrope.errors import UserError
from eaftdrope.files import write_atomically
from eaftdrope.recipe.suggest import did_you_mean

from .terminal import echo

DOMAINS = ("math", "medical", "tool_use")
FORMER_MODELS = {
    "gemma3_4b": "google/gemma-3-4b-it",
    "glm4_9b": "zai-org/GLM-4-9B-0414",
    "llama3.1_8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5_32b": "Qwen/Qwen2.5-32B-Instruct",
    "qwen3_4b_instruct": "Qwen/Qwen3-4B-Instruct-2507",
    "qwen3_4b_thinking": "Qwen/Qwen3-4B-Thinking-2507",
    "smollm2_135m": None,
}
"""The recipes that each domain had, one for each model -> the model's hub id; None: the recipe for a CPU."""


class Action(enum.Enum):
    ls = "ls"
    show = "show"
    cp = "cp"
    translate = "from"


def recipes(
    action: Annotated[
        Action,
        typer.Argument(help="ls: list; show NAME: print; cp NAME [DST]: copy; from CONFIG [DST]: translate."),
    ] = Action.ls,
    name: Annotated[
        str | None,
        typer.Argument(help="A name from `ls`; or a YAML file of LLaMA-Factory, Axolotl or TRL.", show_default=False),
    ] = None,
    destination: Annotated[
        Path | None, typer.Argument(help="File or folder; `from` prints without it.", show_default=False)
    ] = None,
    tool: Annotated[
        str | None,
        typer.Option(help="With `from`: llamafactory, axolotl or trl.", show_default="detected from the keys"),
    ] = None,
) -> None:
    """List, show or copy the recipes that come with eaftdrope: `recipes ls`, `recipes show quickstart`,
    `recipes cp quickstart mine.yaml`.

    `recipes from config.yaml mine.yaml` translates a configuration of LLaMA-Factory, Axolotl or TRL's command line. On stderr
    it prints what became of every key and whether the recipe is valid here; the recipe has what was lost as comments.
    """
    if tool is not None and action is not Action.translate:
        raise UserError(f"--tool belongs to `recipes from`, not to `recipes {action.value}`. Leave it out.")
    if action is Action.ls:
        shipped = shipped_recipes()
        width = max(map(len, shipped))
        for entry, path in shipped.items():
            typer.echo(f"{entry:{width}}  {title(path)}")
        return
    if name is None:
        if action is Action.translate:
            raise UserError("`eaftdrope recipes from` needs a file: `eaftdrope recipes from config.yaml mine.yaml`.")
        raise UserError(f"`eaftdrope recipes {action.value}` needs a name. `eaftdrope recipes ls` lists the names.")
    if action is Action.translate:
        _translate(Path(name), destination, tool)
        return
    source = find_recipe(name)
    if action is Action.show:
        typer.echo(source.read_text(encoding="utf-8"), nl=False)
        return
    target = _new_file(Path(destination) if destination else Path(source.name), source.name)
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    echo(f"written: {target}. Edit it, then run: eaftdrope validate {target}")


def _new_file(target: Path, name: str) -> Path:
    """`target`, or `name` in it if it is a folder. Raises UserError if it exists, or its folder does not."""
    if target.is_dir():
        target = target / name
    if target.exists():
        raise UserError(f"{target} already exists and was not changed. Choose another destination.")
    if not target.parent.is_dir():
        raise UserError(f"the folder {target.parent} does not exist. Create it, or choose another destination.")
    return target


def _translate(source: Path, destination: Path | None, tool: str | None) -> None:
    """Translate a configuration of another tool, and report on stderr. Raises UserError if it cannot become a recipe."""
    from eaftdrope.recipe import make_recipe
    from eaftdrope.recipe.translate import TOOLS, translate
    from eaftdrope.recipe.translate.recipe_text import fates_table, recipe_text

    if tool is not None and tool not in TOOLS:
        raise UserError(f"--tool {tool}: not one of {', '.join(TOOLS)}.{did_you_mean(tool, TOOLS)}")
    target = None if destination is None else _new_file(destination, f"{source.stem}.recipe.yaml")
    translation = translate(_read_config(source), source.parent, tool)
    text = recipe_text(translation, source.name)
    if target is None:
        typer.echo(text, nl=False)
    else:
        write_atomically(target, text)
    echo(fates_table(translation), err=True)
    try:
        make_recipe(translation.recipe, folder=Path() if target is None else target.parent)
    except UserError as error:
        problems = str(error).splitlines()[1:-1]
        echo("\n".join(["to correct before training:", *problems]), err=True)
    else:
        echo("ok: the recipe is valid", err=True)
    if target is not None:
        echo(f"written: {target}. Then run: eaftdrope validate {target}", err=True)


def _read_config(source: Path) -> dict:
    """The plain data of a configuration. Raises UserError if it is not a YAML mapping."""
    from eaftdrope.recipe.yaml_lines import read_yaml

    try:
        document = read_yaml(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{source} cannot be read: {reason}.") from None
    if document.problems:
        first = document.problems[0]
        raise UserError(f"{source}, line {first.line}: {first.text}.")
    if not isinstance(document.data, dict):
        raise UserError(f"{source} is not a configuration: a mapping of keys was expected.")
    return document.data


def shipped_recipes() -> dict[str, Path]:
    """Name (`medical`, `drope/qwen3_4b`) -> file, from the wheel's `eaftdrope/_recipes` or the source tree's `recipes`; what
    to run first comes first."""
    package = Path(__file__).resolve().parent.parent
    folder = next((place for place in (package / "_recipes", package.parent / "recipes") if place.is_dir()), None)
    if folder is None:
        raise UserError("the recipes are missing from this installation. Install eaftdrope again.")
    named = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return {name: named[name] for name in sorted(named, key=_what_runs_first)}


def find_recipe(name: str) -> Path:
    """The shipped recipe called `name` (with or without .yaml). Raises UserError with the nearest names."""
    shipped = shipped_recipes()
    wanted = name.removesuffix(".yaml").removeprefix("recipes/")
    if wanted not in shipped:
        _point_to_the_domain(wanted)
        raise UserError(f"no recipe '{name}'.{did_you_mean(wanted, shipped)} Recipes: {', '.join(shipped)}.")
    return shipped[wanted]


def _what_runs_first(name: str) -> tuple[bool, int, bool, str]:
    return name != "quickstart", name.count("/"), not name.endswith("_cpu"), name


def _point_to_the_domain(name: str) -> None:
    """Raises UserError for a name like `medical/qwen3_4b_instruct`: until 0.1 there was one recipe for each model."""
    domain, _, model = name.partition("/")
    if domain not in DOMAINS or model not in FORMER_MODELS:
        return
    hub_id = FORMER_MODELS[model]
    if hub_id is None:
        raise UserError(f"'{name}' is now '{domain}_cpu'. `eaftdrope recipes cp {domain}_cpu`.")
    thinking = " Its header has what else a thinking model needs." if "thinking" in model else ""
    raise UserError(
        f"'{name}' is now '{domain}', one recipe for every model. `eaftdrope recipes cp {domain}`, then `eaftdrope train "
        f"{domain}.yaml model={hub_id}`.{thinking}"
    )


def title(path: Path) -> str:
    """The first line of the recipe's header comment."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")

"""What each stage of a pipeline is worth: the same recipe with stages left out, or in another order.

    output.dir/ablations/without-eaft/...            a pipeline of its own
    output.dir/ablations/ttt-before-eaft/...

An ablation shares the stages before the first difference with the whole pipeline: they are linked, not trained again. A
killed command resumes, and the report of the whole has the table.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from eaftdrope.errors import UserError
from eaftdrope.files import atomic_folder
from eaftdrope.recipe.schema import Recipe
from eaftdrope.report import page
from eaftdrope.report.system import ABLATIONS
from eaftdrope.run.record import read_record
from eaftdrope.run.train import run_recipe

_ORDERS = (("eaft", "drope"), ("ttt", "eaft"))
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Ablation:
    """A pipeline that differs from the whole in its stages.

    Attributes:
        shared: its first stages, which are those of the whole.
    """

    name: str
    stages: list[str]
    shared: int

    @property
    def trained(self) -> list[str]:
        """The stages that it runs itself."""
        return self.stages[self.shared :]


def plan_ablations(recipe: Recipe, *, leave_out: Sequence[str] | None = None, orders: bool = False) -> list[Ablation]:
    """The ablations of a recipe.

    Args:
        leave_out: stages, each left out of one ablation; None for every stage but pretrain.
        orders: also eaft before drope, and ttt before eaft, as far as the recipe has these stages.

    Raises:
        UserError: the recipe has no stages to leave out, or lacks one of `leave_out`.
    """
    stages = recipe.stages or []
    if len(stages) < 2:
        raise UserError("a recipe with one stage has nothing to leave out. Set stages, such as [eaft, ttt].")
    wanted = [stage for stage in stages if stage != "pretrain"] if leave_out is None else list(leave_out)
    for stage in wanted:
        if stage not in stages or stage == "pretrain":
            known = ", ".join(other for other in stages if other != "pretrain")
            raise UserError(f"--leave-out {stage}: not one of the recipe's stages that can be left out ({known}).")
    found = [(f"without-{stage}", [other for other in stages if other != stage]) for stage in wanted]
    if orders:
        found += [
            (f"{first}-before-{second}", _moved(stages, first, second))
            for first, second in _ORDERS
            if first in stages and second in stages and stages.index(second) < stages.index(first)
        ]
    if recipe.data is not None and recipe.data.packing and any(name == "ttt-before-eaft" for name, _ in found):
        raise UserError("ttt-before-eaft: packed rows would share what is learned. Set data.packing=false.")
    return [Ablation(name, chain, _shared(stages, chain)) for name, chain in found]


def run_ablations(recipe: Recipe, ablations: Sequence[Ablation], console: Console, *, command: str) -> Path:
    """Run the whole pipeline and its ablations, as far as they are not finished; returns the folder of the whole.

    Raises:
        UserError, RunInterrupted: as `run_recipe`.
    """
    top = Path(recipe.output.dir).expanduser()
    _run(recipe, top, console, command)
    for ablation in ablations:
        folder = top / ABLATIONS / ablation.name
        console.rule(f"{ablation.name}: {' → '.join(ablation.stages)}", align="left")
        for stage in ablation.stages[: ablation.shared]:
            _link(top / stage, folder / stage)
        output = recipe.output.model_copy(update={"dir": str(folder), "push_to_hub": None})
        changes = {"stages": ablation.stages, "any_order": True, "serve": None, "output": output}
        _run(recipe.model_copy(update=changes), folder, console, command)
    page.try_write_report(top, console)
    return top


def _run(recipe: Recipe, folder: Path, console: Console, command: str) -> None:
    records = [read_record(folder / stage) for stage in recipe.stages or []]
    if all(record is not None and record["status"] == "finished" for record in records):
        console.print(f"finished in {folder}", highlight=False, markup=False, soft_wrap=True)
        return
    run_recipe(recipe, console, command=command)


def _moved(stages: list[str], first: str, second: str) -> list[str]:
    """The stages with `first` moved to before `second`."""
    others = [stage for stage in stages if stage != first]
    place = others.index(second)
    return [*others[:place], first, *others[place:]]


def _shared(stages: list[str], other: list[str]) -> int:
    count = 0
    while count < min(len(stages), len(other)) and stages[count] == other[count]:
        count += 1
    return count


def _link(source: Path, target: Path) -> None:
    """Make the finished stage `source` appear as `target`: its files are shared, which are only ever replaced whole."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as made:
        ignored = shutil.ignore_patterns(_CHECKPOINTS, "*.lock")
        shutil.copytree(source, made, ignore=ignored, copy_function=_link_file, symlinks=True, dirs_exist_ok=True)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # another disk, or one without links
        shutil.copy2(source, target)

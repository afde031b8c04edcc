"""Options that the commands of `eaftdrope ttt` share: the settings of test-time training, and files of states."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eaftdrope.errors import UserError
from eaftdrope.files import check_writable, usable_path

if TYPE_CHECKING:
    from eaftdrope.ttt.loading import TTTSource

_UNSHOWN = {"show_default": False}
_SAVED = "the model's own, else "
_PLAIN = "Only for a model without ttt_config.json"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder (adapters too), hub id, package:NAME.", **_UNSHOWN)]
Rate = Annotated[
    float | None,
    typer.Option("--lr", min=0, help="Learning rate while reading; 0 is off.", show_default=f"{_SAVED}0.3"),
]
Window = Annotated[int | None, typer.Option(min=1, help=f"{_PLAIN}: tokens in view.", show_default="1024")]
Sink = Annotated[int | None, typer.Option(min=0, help=f"{_PLAIN}: first tokens kept in view.", show_default="4")]
ChunkSize = Annotated[
    int | None, typer.Option("--chunk", min=1, help=f"{_PLAIN}: tokens learned at once.", show_default="512")
]
FastBlocks = Annotated[
    int | None, typer.Option(min=1, help=f"{_PLAIN}: last blocks that learn.", show_default="a quarter")
]
Layout = Annotated[str | None, typer.Option(help=f"{_PLAIN}: prime or in_place.", show_default="prime")]
StateFile = Annotated[Path | None, typer.Option("--state", help="A state to continue from.", **_UNSHOWN)]
SaveState = Annotated[Path | None, typer.Option("--save", help="Write the state to this file.", **_UNSHOWN)]
OverwriteState = Annotated[bool, typer.Option("--overwrite", help="Replace the file of --save.")]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were passed: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def heading(source: TTTSource) -> str:
    """Return the line that states which model reads, and how it learns."""
    config = source.config
    attention = "its own attention" if config.window is None else f"window {config.window:,} + {config.sink}"
    blocks = "the last quarter of the blocks" if config.fast_blocks is None else f"the last {config.fast_blocks} blocks"
    settings = f"lr {config.lr:g}, chunk {config.chunk:,}, {attention}, {blocks} ({config.layout})"
    if source.naive:
        return f"{source.reference}: naive TTT (no ttt_config.json: not trained to learn while it reads); {settings}"
    return f"{source.reference}: TTT as in its ttt_config.json; {settings}"


def state_problems(state: Path | None, save: Path | None, *, overwrite: bool) -> list[str]:
    """Return what is wrong with the files of a state before anything is loaded."""
    problems = []
    for check in (lambda: _check_state(state), lambda: _check_target(save, state, overwrite=overwrite)):
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return problems


def _check_state(state: Path | None) -> None:
    if state is not None and not usable_path(state).is_file():
        raise UserError(f"--state {state}: no such file.")


def _check_target(save: Path | None, state: Path | None, *, overwrite: bool) -> None:
    if save is None:
        return
    path = usable_path(save)
    if path.is_dir():
        raise UserError(f"--save {save} is a folder. Pass the name of a file, such as {path / 'state.safetensors'}.")
    check_writable(path.parent, "--save")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"--save {save}: no permission to write it.")
    is_same = state is not None and path.exists() and usable_path(state).exists() and path.samefile(usable_path(state))
    if path.exists() and not is_same and not overwrite:
        raise UserError(f"--save {save} exists already. Choose another file, or pass --overwrite to replace it.")

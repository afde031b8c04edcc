"""`eaftdrope ttt read`: read a text with a model that learns from it, and keep what it learned in a state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .measure import DeviceName, Dtype
from .ttt_options import (
    ChunkSize,
    FastBlocks,
    Layout,
    Model,
    OverwriteState,
    Rate,
    SaveState,
    Sink,
    StateFile,
    Window,
    given,
    heading,
    state_problems,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from eaftdrope.ttt.loading import TTTSource
    from eaftdrope.ttt.reading import Piece


def read(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A text file in UTF-8.", show_default=False)],
    save: SaveState = None,
    state: StateFile = None,
    overwrite: OverwriteState = False,
    skip: Annotated[int, typer.Option(min=0, help="Leave out this many tokens at the beginning of FILE.")] = 0,
    lr: Rate = None,
    window: Window = None,
    sink: Sink = None,
    chunk: ChunkSize = None,
    fast_blocks: FastBlocks = None,
    layout: Layout = None,
    device: DeviceName = "auto",
    dtype: Dtype = None,
) -> None:
    """Read FILE with a model that learns from every chunk of it; print speed and loss by position.

    A model that was trained for this has a ttt_config.json. Any other reads with naive test-time training, as the output
    states: find its learning rate on other text first (`eaftdrope ttt eval`). A state contains what was read and is as
    private as the text. After Ctrl-C, --save has the state up to the last complete piece.
    """
    from eaftdrope.errors import raise_problems
    from eaftdrope.ttt.loading import find_ttt
    from eaftdrope.ttt.reading import read_pieces, read_text

    from .measure import device_and_dtype
    from .terminal import make_console, silence_libraries

    silence_libraries(bars=False)
    console = make_console(width=120)
    changes = given(lr=lr, window=window, sink=sink, chunk=chunk, fast_blocks=fast_blocks, layout=layout)
    device, dtype, problems = device_and_dtype(device, dtype)
    problems += state_problems(state, save, overwrite=overwrite)
    text = ""
    try:
        text = read_text(file)
    except ValueError as error:
        problems.append(str(error))
    raise_problems(problems)
    source = find_ttt(model, changes, state)
    prefix, tokens = _tokens(source, text, skip, is_fresh=state is None)
    console.print(heading(source), highlight=False, markup=False, soft_wrap=True)
    with console.status("loading"):
        loaded = source.load(dtype, device)
        beginning = source.state(loaded, state)
    pieces: list[Piece] = []
    try:
        for piece in read_pieces(loaded, beginning, prefix + tokens):
            pieces.append(piece)
            done = sum(piece.tokens for piece in pieces) - len(prefix)
            console.print(_line(piece, done, len(tokens)), highlight=False, markup=False)
    except KeyboardInterrupt:
        done = sum(piece.tokens for piece in pieces) - len(prefix)
        message = f"Interrupted after {done:,} of {len(tokens):,} tokens."
        if not pieces:
            message = "Interrupted before the first piece was read; nothing is saved."
        console.print(message, highlight=False, markup=False, soft_wrap=True)
        _finish(pieces, save, console)
        if pieces and save is not None:
            console.print(
                f"To read the rest: --state {save} --skip {skip + done}", highlight=False, markup=False, soft_wrap=True
            )
        raise
    _finish(pieces, save, console)


def _tokens(source: TTTSource, text: str, skip: int, *, is_fresh: bool) -> tuple[list[int], list[int]]:
    """Return the BOS token that a fresh state reads first, if the tokenizer has one, and the tokens of the text."""
    from eaftdrope.errors import UserError
    from eaftdrope.evaluate.likelihood import bos_prefix

    tokenizer = source.tokenizer()
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if skip >= len(tokens):
        raise UserError(f"--skip {skip:,} leaves nothing to read: the text has {len(tokens):,} tokens.")
    return (bos_prefix(tokenizer) if is_fresh else []), tokens[skip:]


def _line(piece: Piece, done: int, total: int) -> str:
    loss = f"{piece.nll.mean().item():.3f}" if len(piece.nll) else "-"
    return (
        f"{done:,} of {total:,} tokens, {piece.tokens_per_second:,.0f} tokens/s, loss {loss}, "
        f"{piece.state.updates:,} chunks learned"
    )


def _finish(pieces: list[Piece], save: Path | None, console: Console) -> None:
    """Print loss by position and write the state, as far as the text was read."""
    if not pieces:
        return
    from eaftdrope.run.machine import format_bytes

    console.print(_table(pieces))
    state = pieces[-1].state
    if not state.updates:
        note = f"nothing was learned yet: the first chunk of {state.chunk:,} tokens is learned when a further token follows"
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if save is not None:
        state.save(save)
        size = format_bytes(save.stat().st_size)
        console.print(
            f"written: {save} ({size}, {state.position:,} tokens, {state.updates:,} chunks learned). It contains what was "
            "read: keep it as private as the text.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _table(pieces: list[Piece]) -> Table:
    import torch
    from rich.table import Table

    from eaftdrope.ttt.reading import loss_by_position

    table = Table(title="Loss by position", title_justify="left", box=None, pad_edge=False)
    table.add_column("tokens")
    table.add_column("loss (nats)", justify="right")
    nll = torch.cat([piece.nll for piece in pieces])
    for first, end, loss in loss_by_position(nll, pieces[0].start):
        table.add_row(f"{first:,} to {end:,}", f"{loss:.3f}")
    return table

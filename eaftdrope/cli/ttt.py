"""`eaftdrope ttt`: the commands of test-time training.

`read` reads a text and learns from it, `ask` answers with what was read, `eval` measures what learning while reading adds.
"""

from __future__ import annotations

import typer

from .ttt_ask import ask
from .ttt_eval import evaluate
from .ttt_read import read

ttt = typer.Typer(
    help="Test-time training, a model that learns as it reads: read a text into a state, ask about it, measure the gain.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)
ttt.command("read")(read)
ttt.command("ask")(ask)
ttt.command("eval")(evaluate)

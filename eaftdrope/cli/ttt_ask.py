"""`eaftdrope ttt ask`: answer a question with a model that has read a text, streaming the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from eaftdrope.ttt import TTTState

_Temperature = Annotated[
    float | None, typer.Option(min=0.01, help="Draw each token at this temperature.", show_default="greedy")
]


def ask(
    model: Model,
    question: Annotated[
        str,
        typer.Argument(
            metavar="QUESTION", help="The question, or with --raw the text to continue.", show_default=False
        ),
    ],
    state: StateFile = None,
    save: SaveState = None,
    overwrite: OverwriteState = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, without the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: _Temperature = None,
    seed: Annotated[int, typer.Option(help="Seed of drawn answers.")] = 0,
    lr: Rate = None,
    window: Window = None,
    sink: Sink = None,
    chunk: ChunkSize = None,
    fast_blocks: FastBlocks = None,
    layout: Layout = None,
    device: DeviceName = "auto",
    dtype: Dtype = None,
) -> None:
    """Answer a question after what a state has read; without --state the model has read nothing.

    The file of --state stays as it is; --save writes the state with the question and the answer in it. What lies outside
    the model's window cannot be quoted: test-time training compresses, it does not recall.
    """
    from eaftdrope.ask.reader import generation_settings, question_tokens
    from eaftdrope.errors import UserError, raise_problems
    from eaftdrope.ttt.loading import find_ttt

    from .measure import device_and_dtype
    from .terminal import echo, make_console, silence_libraries

    silence_libraries(bars=False)
    changes = given(lr=lr, window=window, sink=sink, chunk=chunk, fast_blocks=fast_blocks, layout=layout)
    device, dtype, problems = device_and_dtype(device, dtype)
    problems += state_problems(state, save, overwrite=overwrite)
    if not question.strip():
        problems.append("the question is empty.")
    raise_problems(problems)
    source = find_ttt(model, changes, state)
    tokenizer = source.tokenizer()
    if tokenizer.chat_template is None and not raw:
        raise UserError(f"model {model!r} has no chat template. Pass --raw to have it continue the text as it is.")
    console = make_console(width=120)
    echo(heading(source), err=True)
    with console.status("loading"):
        loaded = source.load(dtype, device)
        reading = source.state(loaded, state)
    prompt = question_tokens(tokenizer, question, raw=raw, is_fresh=state is None)
    settings = generation_settings(loaded, tokenizer, max_new_tokens, temperature)
    _answer(loaded, tokenizer, reading, prompt, settings, seed)
    if save is not None:
        reading.save(save)
        echo(f"written: {save} ({reading.position:,} tokens). Keep it as private as what was read.", err=True)


def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    state: TTTState,
    prompt: list[int],
    settings: GenerationConfig,
    seed: int,
) -> None:
    """Print the answer as it is generated; `state` has then read the prompt and all of the answer."""
    import torch
    from transformers import TextStreamer

    from eaftdrope.errors import printable
    from eaftdrope.versions import cache_argument

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            typer.echo(printable(text, lines=True), nl=stream_end)

    torch.manual_seed(seed)
    ids = torch.tensor([prompt], device=model.device)
    # as long as what was read and the prompt together: the tokens that were read are not passed again
    mask = torch.ones(1, state.position + len(prompt), dtype=torch.long, device=model.device)
    streamer = Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    found = model.generate(
        ids, attention_mask=mask, **cache_argument(state), generation_config=settings, streamer=streamer
    )
    with torch.no_grad():
        # generation ends with a token that was not read
        model(found[:, -1:], **cache_argument(state), use_cache=True, logits_to_keep=1)

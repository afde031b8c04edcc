"""Options that the commands of `eaftdrope rlm` share: which models, and where they are."""

from __future__ import annotations

from typing import Annotated

import typer

_UNSHOWN = {"show_default": False}

Model = Annotated[
    str, typer.Option(help="Folder (adapters too), hub id, package:NAME; a name with --endpoint.", **_UNSHOWN)
]
ShortPrompt = Annotated[bool, typer.Option("--short-prompt", help="The system prompt for tiny models.")]
SubModel = Annotated[str | None, typer.Option(help="Answers llm_query.", show_default="the same model")]
Endpoint = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="An OpenAI-compatible server that has the models; its key: EAFTDROPE_API_KEY.", **_UNSHOWN
    ),
]
Window = Annotated[
    int | None,
    typer.Option(min=1, help="Context of served models in tokens.", show_default="as the server states it"),
]


def served_problems(endpoint: str | None, window: int | None, device: str, dtype: str | None) -> list[str]:
    """What would be ignored: options of served models without a server, and of models in this process beside one."""
    if endpoint is None:
        return [] if window is None else ["--window is the context of served models. Pass --endpoint, or leave it out."]
    unused = [name for name, given in (("--device", device != "auto"), ("--dtype", dtype is not None)) if given]
    return [f"{name} does not reach the server at --endpoint. Leave it out." for name in unused]

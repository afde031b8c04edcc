"""`eaftdrope preview`: the tokens that a recipe trains on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eaftdrope.data import Source
from eaftdrope.errors import UserError
from eaftdrope.recipe import Recipe, load_recipe

from .terminal import make_console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eaftdrope.data.preview import Preview

# Tokens of a document that are shown if the block length is the model's own.
_DOCUMENT = 1024


def preview(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of its keys, such as data.max_length=512.", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to show, spread over the data.")] = 3,
    scan: Annotated[int, typer.Option(min=1, help="Rows of each source to read for the counts.")] = 2000,
) -> None:
    """Show the rows of a recipe with the trained tokens in colour ([[ ]] around them without colour), the fields that were
    read, the share of truncated rows, whether the stop token is trained, and the rows that cannot be used."""
    loaded = load_recipe(recipe, overrides or [])

    from eaftdrope.data.preview import preview_text

    console = make_console(None)
    marks = not console.is_terminal or console.no_color
    for stage, shown in stage_previews(loaded, recipe, rows=rows, scan=scan):
        if loaded.stages:
            console.print(stage_heading(stage, loaded), highlight=False, markup=False)
        console.print(preview_text(shown, marks=marks), soft_wrap=True)
        if stage == "eaft" and (note := replay_note(loaded, shown)):
            console.print(note, highlight=False, markup=False, soft_wrap=True)


def replay_sources(loaded: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Source]:
    """Return the source of a recipe's replay: a file, or the replies in the cache, the newest file of them."""
    replay = loaded.data.replay
    if replay is None:
        return []
    if not replay.is_generated:
        return [Source(replay.origin)]
    from eaftdrope.run.replay import find_replies
    from eaftdrope.run.settings import eaft_settings

    file = find_replies(eaft_settings(loaded), tokenizer).newest
    return [] if file is None else [Source(str(file))]


def replay_note(loaded: Recipe, shown: Preview) -> str | None:
    """Return a line about the replay of the stage eaft; None without replay."""
    replay = loaded.data.replay if loaded.data else None
    if replay is None:
        return None
    what = f"replay: {replay.share:.0%} of the training rows"
    if len(shown.report.by_source) > len(loaded.data.train):
        return f"{what}, chosen from the last source"
    return (
        f"{what}, which the model generates from {replay.prompts} when the training starts; no replies are stored yet"
    )


def stage_heading(stage: str, loaded: Recipe) -> str:
    in_blocks = stage in ("pretrain", "recalibrate") or (stage == "ttt" and loaded.ttt.data.sequences == "blocks")
    joined = " (documents are joined and cut into blocks; here each is cut)" if in_blocks else ""
    return f"=== stage {stage}{joined}"


def stage_previews(
    loaded: Recipe, recipe: Path, *, rows: int, scan: int | None, held_out: bool = False
) -> Iterator[tuple[str, Preview]]:
    """Yield (stage, preview) for each training stage of a recipe; with `held_out`, its held-out rows too.

    Args:
        scan (`int`, *optional*): rows of each source to read; None for all.

    Raises:
        UserError: no stage trains, a source cannot be read, or a row has a token that the model has no embedding for.
    """
    from eaftdrope.data.preview import make_preview
    from eaftdrope.models import load_config, load_tokenizer

    trained = {
        "pretrain": loaded.pretrain and (loaded.pretrain.data, loaded.pretrain),
        "recalibrate": loaded.recalibrate and (loaded.recalibrate.data, loaded.recalibrate),
        "eaft": loaded.data and (loaded.data, loaded),
        "ttt": loaded.ttt and (loaded.ttt.data.resolved(), loaded.ttt),
    }
    stages = [stage for stage in loaded.stages or ["eaft"] if trained.get(stage)]
    if not stages:
        raise UserError(f"{recipe} trains on nothing: its stages are {', '.join(loaded.stages)}.")
    model = loaded.model
    if loaded.pretrain:
        from eaftdrope.run.new_model import new_model

        model = model.model_copy(update={"reference": str(new_model(model, loaded.pretrain)), "revision": None})
    how = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    tokenizer = load_tokenizer(model.reference, **how)
    vocabulary = load_config(model.reference, **how).get_text_config().vocab_size
    for stage in stages:
        data, training = trained[stage]
        replay = replay_sources(loaded, tokenizer) if stage == "eaft" else []
        yield (
            stage,
            make_preview(
                [*data.train_sources(), *replay, *(data.held_out_sources() if held_out else ())],
                tokenizer,
                rows=rows,
                format=data.format,
                train_on=data.train_on,
                max_length=data.max_length or _DOCUMENT,
                on_bad_row=data.on_bad_row,
                seed=data.data_seed(training.train.seed),
                exempt=training.loss.exempt,
                scan=scan,
                vocabulary=vocabulary,
            ),
        )

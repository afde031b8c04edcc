"""The model card of a converted checkpoint: the conversion, the engines that serve it, then the source's own card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from eaftdrope.files import write_atomically

from .config import RECORD, one_line
from .engines import Serving, serving_markdown

_TEXT = """\
# {name}

The rotary position embedding of this checkpoint is switched off (DroPE, [arXiv 2512.12167](https://arxiv.org/abs/2512.12167))
by its configuration only: it loads with stock libraries, without remote code. {state}

- layers without rotation: {layers}
- trained length: {trained:,} tokens; announced length: {announced:,} tokens
- attention temperature folded into the query weights: {temperature:g}
- `config.json` keeps the original values under `drope`; `eaftdrope convert --undo` restores the files that the conversion
  found, if this folder has `drope_original`

## Engines

{engines}
"Silently wrong" engines would still rotate: fluent text, no error, and not this model.
"""
_RAW = (
    "**Dropping alone costs quality**: this checkpoint has to be recalibrated (trained briefly on pretraining-like text) "
    "before it is used."
)


def _state(record: dict[str, Any]) -> str:
    # written by the stage recalibrate
    done = record.get("recalibrated")
    return _RAW if done is None else f"It was recalibrated on {done['tokens']:,} tokens."


def write_card(folder: Path, raw: dict[str, Any], engines: list[Serving]) -> list[str]:
    """Write README.md of the converted checkpoint `folder`, around the source's card (its metadata stays).

    Returns:
        Notes about a card that could not be kept.
    """
    path, record = folder / "README.md", raw[RECORD]
    old, notes = _old_card(path)
    data = old.data if old else ModelCardData(library_name="transformers", pipeline_tag="text-generation")
    assert isinstance(data, ModelCardData)
    data.tags = sorted({*(data.tags or []), "drope", "nope", "long-context"})
    text = _TEXT.format(
        # the folder does not have its name yet
        name=folder.name.removeprefix(".").removesuffix(".partial"),
        state=_state(record),
        layers=record["layers"],
        trained=record["trained_length"],
        announced=raw.get("text_config", raw)["max_position_embeddings"],
        temperature=record["temperature"],
        engines=serving_markdown(engines),
    )
    if old and old.text.strip():
        text += f"\n## The card of the source\n\n{old.text.strip()}\n"
    write_atomically(path, f"---\n{data}\n---\n\n{text}")
    return notes


def _old_card(path: Path) -> tuple[ModelCard | None, list[str]]:
    """Return the source's card if it can be read, and a note if it cannot."""
    if not path.is_file():
        return None, []
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        # a card that cannot be written again is not kept either
        str(card.data)
        return card, []
    # a YAML parser's errors, and the hub library's own
    except Exception as error:
        reason = one_line(error)
    return None, [f"the source's README.md is kept in drope_original only, because it cannot be read: {reason}"]

"""Data: sources, formats, and what is trained. No module here loads torch, transformers or datasets when imported.

source (`sources.py`, `folders.py`, `readers.py`, `bfcl.py`, `shipped.py`) -> row -> `formats.py` (`fields.py`,
`messages.py`) -> Example -> `chat.py` (`template.py`, `audit.py`, `tools.py`) -> text and answers -> `encoding.py` -> ids
and labels -> `build.py` (`counts.py`, `copies.py`) -> dataset and report -> `preview.py`; to pretrain on: dataset ->
`blocks.py` -> blocks of one length

Names are loaded on first use: checking a source needs only `sources.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

_HOMES = {
    "FORMATS": "formats",
    "TRAIN_ON": "encoding",
    "DataReport": "counts",
    "Encoded": "encoding",
    "Example": "formats",
    "Row": "sources",
    "Source": "sources",
    "build_dataset": "build",
    "check_source": "sources",
    "detect_format": "formats",
    "encode": "encoding",
    "encode_prompt": "encoding",
    "examples_for_probe": "build",
    "held_out_warnings": "copies",
    "hold_out": "build",
    "iter_examples": "build",
    "iter_rows": "sources",
    "normalise": "formats",
    "parse_tool_calls": "tools",
    "render_prompt": "chat",
    "text_blocks": "blocks",
}

__all__ = [
    "FORMATS",
    "TRAIN_ON",
    "DataReport",
    "Encoded",
    "Example",
    "Row",
    "Source",
    "build_dataset",
    "check_source",
    "detect_format",
    "encode",
    "encode_prompt",
    "examples_for_probe",
    "held_out_warnings",
    "hold_out",
    "iter_examples",
    "iter_rows",
    "normalise",
    "parse_tool_calls",
    "render_prompt",
    "text_blocks",
]

if TYPE_CHECKING:
    from .blocks import text_blocks
    from .build import build_dataset, examples_for_probe, hold_out, iter_examples
    from .chat import render_prompt
    from .copies import held_out_warnings
    from .counts import DataReport
    from .encoding import TRAIN_ON, Encoded, encode, encode_prompt
    from .formats import FORMATS, Example, detect_format, normalise
    from .sources import Row, Source, check_source, iter_rows
    from .tools import parse_tool_calls


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

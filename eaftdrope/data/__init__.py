"""Data: sources, formats, and what is trained. No module here loads torch, transformers or datasets when imported.

    sources, readers, bfcl          a source -> its rows
    formats, fields, messages,
    tools, published                a row -> an `Example`, every key read or reported
    template, chat, audit,
    plain_places                    an `Example` -> text and the positions of its answers, every value found in it
    encoding                        text -> ids and labels
    build, counts, arrow_file       rows -> a dataset, its report, blocks of one length for pretraining
    preview                         a few rows and the report, for people

Read in this order. Names are imported on first use: checking a source needs only `sources`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eaftdrope.lazy import lazy_names

_LAZY = {
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
    "held_out_warnings": "counts",
    "hold_out": "build",
    "iter_examples": "build",
    "iter_rows": "sources",
    "join_rows": "build",
    "normalise": "formats",
    "parse_tool_calls": "tools",
    "render_prompt": "chat",
    "text_blocks": "arrow_file",
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
    "join_rows",
    "normalise",
    "parse_tool_calls",
    "render_prompt",
    "text_blocks",
]

if TYPE_CHECKING:
    from .arrow_file import text_blocks
    from .build import build_dataset, examples_for_probe, hold_out, iter_examples, join_rows
    from .chat import render_prompt
    from .counts import DataReport, held_out_warnings
    from .encoding import TRAIN_ON, Encoded, encode, encode_prompt
    from .formats import FORMATS, Example, detect_format, normalise
    from .sources import Row, Source, check_source, iter_rows
    from .tools import parse_tool_calls


__getattr__, __dir__ = lazy_names(__name__, _LAZY)

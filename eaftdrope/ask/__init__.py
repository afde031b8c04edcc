"""Questions about texts of any length, answered by what a run built.

    run = find_run("runs/mine")
    answer(run, text, "Who wrote it?").text

Three readers, composed by length: a plain call, a model that learns as it reads (TTT), and a recursive language model (RLM)
whose root may hand passages to the second (`reader.py`).

    built.py       a run folder, or its recipe -> its models and its section `serve`
    choice.py      the number of tokens -> the reader
    reader.py      the model of the stage ttt as a reader
    answering.py   one question: the answer and what it cost
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eaftdrope.lazy import lazy_names

_LAZY = {"Answered": "answering", "answer": "answering", "BuiltRun": "built", "find_run": "built"}

__all__ = ["Answered", "BuiltRun", "answer", "find_run"]

if TYPE_CHECKING:
    from .answering import Answered, answer
    from .built import BuiltRun, find_run

__getattr__, __dir__ = lazy_names(__name__, _LAZY)

"""Stored scores of a comparison: one file for the base model and one per arm, written probe by probe.

    {"stamp": identity of the model, "shares": {share: {key: [scores]}}}

A share is the position of the weights between the base model's (0) and the trained ones (1); "trained" is the model as it
was saved. A key is a hash of the probe with its options and items, so a change of the recipe's probes keeps the scores of
the others. A file that is damaged, or whose stamp does not match the model (an arm that was trained again), is discarded.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.evaluate import Score
from eaftdrope.evaluate.score_cache import content_hash
from eaftdrope.evaluate.scores import scores_from_dicts
from eaftdrope.files import write_atomically

if TYPE_CHECKING:
    from eaftdrope.evaluate import Probe


class StoredScores:
    """Stored scores of one model. The constructor only reads; `put` writes.

    Args:
        file: in the comparison's folder.
        stamp: distinguishes the model from others of the same name.
    """

    def __init__(self, file: Path, stamp: str) -> None:
        self._file = file
        kept = _read(file) if file.is_file() else {}
        self._content = kept if kept.get("stamp") == stamp else {"stamp": stamp, "shares": {}}

    def get(self, key: str, share: float | None = None) -> list[Score] | None:
        """Return the scores of a probe; None if it was not measured."""
        found = self._content["shares"].get(_name(share), {}).get(key)
        return None if found is None else scores_from_dicts(found)

    def put(self, key: str, scores: list[Score], share: float | None = None) -> None:
        """Store the scores of a probe."""
        self._content["shares"].setdefault(_name(share), {})[key] = [asdict(score) for score in scores]
        write_atomically(self._file, json.dumps(self._content))


def _read(file: Path) -> dict:
    """Read a file of scores; {} if it is damaged, so that the model is measured again."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        for scores in (scores for share in kept["shares"].values() for scores in share.values()):
            scores_from_dicts(scores)
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
    return kept


def _name(share: float | None) -> str:
    return "trained" if share is None else repr(share)


def probe_key(probe: Probe) -> str:
    """Return an identifier of the probe with its options and items."""
    return f"{probe.name}-{content_hash(probe)[:16]}"

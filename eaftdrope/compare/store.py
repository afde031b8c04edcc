"""Scores of a comparison on disk: one file for the base model and one for each arm, written probe by probe.

    {"stamp": what was measured, "shares": {share: {key: [scores]}}}

A share is how far the weights are from the base model's (0) to the trained ones; "trained" is the model as it was saved. A
key is a hash of the probe with its options and items, so a recipe whose probes change keeps what is still the same. A file
whose stamp is not that of the model as it is now (an arm that was trained again) starts from scratch, as does a damaged
one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.evaluate import Score, scores_from_json
from eaftdrope.files import write_atomically

if TYPE_CHECKING:
    from eaftdrope.evaluate import Probe


class Scores:
    """What is known of one model. Making one only looks; `put` is the first to write.

    Args:
        file: in the comparison's folder.
        stamp: tells the model from another that bore its name.
    """

    def __init__(self, file: Path, stamp: str):
        self._file = file
        kept = _read(file) if file.is_file() else {}
        self._content = kept if kept.get("stamp") == stamp else {"stamp": stamp, "shares": {}}

    def get(self, key: str, share: float | None = None) -> list[Score] | None:
        """Scores of a probe; None where it was not measured."""
        found = self._content["shares"].get(_name(share), {}).get(key)
        return None if found is None else scores_from_json(json.dumps(found))

    def put(self, key: str, scores: list[Score], share: float | None = None) -> None:
        self._content["shares"].setdefault(_name(share), {})[key] = [asdict(score) for score in scores]
        write_atomically(self._file, json.dumps(self._content))


def _read(file: Path) -> dict:
    """What a file of scores holds; {} where it is damaged: then it is measured again."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        for scores in (scores for share in kept["shares"].values() for scores in share.values()):
            scores_from_json(json.dumps(scores))
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
    return kept


def _name(share: float | None) -> str:
    return "trained" if share is None else repr(share)


def probe_key(probe: Probe) -> str:
    """The same for the same probe with the same options and items."""
    from eaftdrope.evaluate.score_cache import plain

    return f"{probe.name}-{hashlib.sha256(json.dumps(plain(probe), sort_keys=True).encode()).hexdigest()[:16]}"

"""Whether a turn is trained, under the names that data sets and trainers have for it.

| meaning                             | keys                                                                           |
|-------------------------------------|--------------------------------------------------------------------------------|
| 1 or true: trained, 0 or false: not | `weight`, `train`, `trainable`, `training`, `loss`, `loss_mask`, `loss_scale`... |
| true: not trained, false: trained   | `mask`, `masked`, `is_masked`, `ignore`, `ignore_loss`...                      |

Anything between, and a part of a turn (`train_detail`), cannot be honoured and is refused.
"""

from __future__ import annotations

from typing import Any

from eaftdrope.errors import DataError

from .fields import Fields, is_empty, plain_name

_TRAINED = frozenset(
    {"weight", "weights", "train", "trained", "trainable", "training", "istrained", "istrainable", "trainonturn"}
    | {"trainon", "trainthis", "trainturn", "trainmask", "trainweight", "trainingweight", "shouldtrain", "learn"}
    | {"loss", "lossmask", "lossweight", "lossweights", "lossscale", "computeloss", "calculateloss", "hasloss"}
    | {"useloss", "lossonturn", "inloss", "includeinloss", "supervise", "supervised"}
)
_CONTEXT = frozenset(
    {"mask", "masked", "ismasked", "maskloss", "maskout", "ignore", "ignored", "isignored", "ignoreloss", "lossignore"}
    | {"ignoreinloss", "noloss", "skiploss", "skiptraining", "skiptrain", "notrain", "donttrain", "donottrain"}
    | {"excludefromloss", "excludefromtraining", "nottrained", "iscontext", "contextonly"}
)
_PARTS = frozenset(
    {"traindetail", "trainingdetail", "traindetails", "trainspans", "trainablespans", "trainedspans", "lossspans"}
    | {"maskspans", "maskedspans"}
)
MARKS = _TRAINED | _CONTEXT | _PARTS
# Those of a whole row that mean nothing else there: a row's `weight` or `loss` may be a measurement.
_OF_ROWS = MARKS - {"weight", "weights", "loss", "training", "trainon", "learn", "ignored", "supervised"}


def turn_weight(turn: Fields, role: str) -> int | None:
    """1 (trained) or 0 (context), by what the turn says of itself; None if it says nothing.

    Raises:
        DataError: a value between or of another type, two keys that disagree, a part of a turn, or a turn that is not the
            assistant's and asks to be trained.
    """
    found: tuple[str, int] | None = None
    for key, value in turn.among(MARKS):
        weight = _weight(plain_name(key), value, turn.place(key))
        if weight is None:
            continue
        if found and found[1] != weight:
            raise DataError(f"{turn.place(found[0])} and {turn.place(key)} disagree on whether the turn is trained")
        found = key, weight
    if found is None:
        return None
    if found[1] and role != "assistant":
        raise DataError(
            f"{turn.place(found[0])} marks a {role} turn as trained, but only assistant turns are. Remove the key "
            "(`train_on: all` trains every turn)"
        )
    return found[1]


def refuse_marked_row(row: Fields) -> None:
    """A row may be marked as well, by what this project cannot honour: leaving it out of the file is clearer.

    Raises:
        DataError: the row is marked as not trained, or carries one mark for each turn or token.
    """
    for key, value in row.values.items():
        name = plain_name(str(key))
        if name not in MARKS or is_empty(value):
            continue
        if isinstance(value, list | tuple | dict):
            raise DataError(
                f"{row.place(key)} marks parts of the row, which is not read. Mark each message with `weight`: 0 (not "
                "trained) or 1"
            )
        if name not in _OF_ROWS and value not in (0, 1):
            continue
        if _weight(name, value, row.place(key)) == 0:
            raise DataError(f"{row.place(key)} marks the whole row as not trained: leave the row out")
        row.get(key)


def _weight(name: str, value: Any, where: str) -> int | None:
    if name in _PARTS:
        if is_empty(value):
            return None
        raise DataError(
            f"{where} marks parts of a turn, which is not read: a turn is trained whole or not at all (weight: 1 or 0)"
        )
    if name in _CONTEXT:
        # A mask of 1 means "trained" to some and "left out" to others.
        if not isinstance(value, bool):
            raise DataError(f"{where} is {value!r}; it must be true (not trained) or false (trained)")
        return int(not value)
    if not isinstance(value, int | float) or value not in (0, 1):
        raise DataError(f"{where} is {value!r}; it must be 0 (not trained) or 1 (trained)")
    return int(value)

"""Results of a run: `miniature.json` (environment, settings, rules, verdict, every piece) and `miniature.csv`, one line per
group, arm, length and temperature."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path

from eaftdrope.files import write_atomically

from ..loss.results import environment
from . import data
from .arms import OPTIMISERS, RECALIBRATED, TITLES, MiniatureSettings
from .evaluate import DENSE, SCALES
from .train import HEADS, HIDDEN
from .verdict import RULES, judge

SCHEMA = 1
COLUMNS = {
    "optimiser": "muon (with per-head QK-norm) or adamw (without)",
    "theta": "rope theta; empty for NoPE from scratch",
    "seed": "",
    "arm": "",
    "scale": "length of the text / training length",
    "dense": "1 for text with 24 needles instead of 6",
    "temperature": "plain (none) or fitted",
    "slope": "of beta = 1 + slope * ln(scale)",
    "beta": "factor on the attention scores",
    "accuracy": "of the answers",
    "standard_error": "of the accuracy, over sequences",
    "quarter_1": "accuracy where the needle is in the first quarter of the text, the farthest from its question",
    "quarter_2": "",
    "quarter_3": "",
    "quarter_4": "the nearest",
    "answer_loss": "nats",
    "filler_loss": "nats per symbol, over the last training length of tokens",
}


def document(
    pieces: list[dict], missing: list[str], failures: list[str], settings: MiniatureSettings, command: str
) -> dict:
    knowing, not_knowing = data.entropies()
    seconds = {
        kind: round(sum(piece["cpu_seconds"][kind] for piece in pieces), 1) for kind in ("training", "evaluation")
    }
    return {
        "schema": SCHEMA,
        "what": "DroPE in miniature: needles and filler beyond the training length",
        "command": command,
        "environment": environment(None),
        "settings": asdict(settings)
        | {
            "trained_length": data.TRAINED_LENGTH,
            "needles": data.ASKED,
            "dense_needles": data.DENSE_NEEDLES,
            "scales": SCALES,
            "recalibration": RECALIBRATED,
            "optimisers": OPTIMISERS,
            "arms": TITLES,
        },
        "filler_entropy": {"nats": round(knowing, 4), "without_the_symbol_before_the_last": round(not_knowing, 4)},
        "rotary_pairs_that_turn_once_in_training": {f"{theta:g}": turning_share(theta) for theta in settings.thetas},
        "cpu_seconds": seconds | {"all": round(sum(seconds.values()), 1)},
        "rules": RULES,
        "verdict": {optimiser: judge(pieces, optimiser) for optimiser in _optimisers(pieces)},
        "missing": missing,
        "failures": failures,
        "columns": COLUMNS,
        "pieces": pieces,
    }


def turning_share(theta: float, length: int = data.TRAINED_LENGTH, head_dim: int = HIDDEN // HEADS) -> float:
    """Return the share of a head's rotary pairs that complete a turn within `length` tokens. The others reach untrained
    angles beyond the training length, so this share makes thetas comparable across training lengths."""
    pairs = head_dim // 2
    return sum(2 * math.pi * theta ** (pair / pairs) <= length for pair in range(pairs)) / pairs


def _optimisers(pieces: list[dict]) -> list[str]:
    return [name for name in OPTIMISERS if any(piece["optimiser"] == name for piece in pieces)]


def rows(pieces: list[dict]) -> list[dict]:
    found = []
    for piece in pieces:
        for temperature in ("plain", "fitted"):
            for scale, cell in piece[temperature].items():
                quarters = {f"quarter_{number}": value for number, value in enumerate(cell["by_quarter"], 1)}
                about = {name: piece[name] for name in ("optimiser", "theta", "seed", "arm")}
                where = {"scale": int(scale.split()[0]), "dense": int(scale == DENSE), "temperature": temperature}
                row = about | where | cell | quarters
                found.append({column: row[column] for column in COLUMNS})
    return found


def write(folder: Path, result: dict) -> list[Path]:
    """Write `miniature.json`, with one piece per line so that it stays small, and `miniature.csv`."""
    head = json.dumps({name: value for name, value in result.items() if name != "pieces"}, indent=1)
    pieces = ",\n".join("  " + json.dumps(piece, separators=(",", ":")) for piece in result["pieces"])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(result["pieces"]))
    written = []
    for name, content in (
        ("miniature.json", f'{head.removesuffix("}").rstrip()},\n "pieces": [\n{pieces}\n ]\n}}\n'),
        ("miniature.csv", text.getvalue()),
    ):
        written.append(write_atomically(folder / name, content))
    return written

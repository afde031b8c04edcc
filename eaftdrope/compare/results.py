"""compare.json: the document of a comparison, in the form that the report reads."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from functools import cached_property

from eaftdrope.evaluate import Score
from eaftdrope.evaluate.scores import scores_from_dicts
from eaftdrope.files import write_atomically
from eaftdrope.recipe.dump import dump_recipe

from .measurement import Measurement
from .plan import Arm
from .table import by_metric, main_metric, table_rows
from .training import training_facts
from .verdict import ScoresBySeed, compare_pair, judge, overall

NAME = "compare.json"


class ComparisonResults:
    """The document of a comparison whose arms are trained.

    Args:
        measurement: the plan and the stored scores.
        command: the command line.
        about: date, hardware and versions.

    Attributes:
        matched: the result of [`match`]; None before it, or if it was not requested.
    """

    def __init__(self, measurement: Measurement, command: str, about: dict) -> None:
        self._measurement, self._plan = measurement, measurement.plan
        self._command, self._about = command, about
        self.matched: dict | None = None

    def store(self, status: str) -> dict:
        """Write the document with this status ("running" or "finished") and return it."""
        document = self._document(status)
        write_atomically(self._plan.folder / NAME, json.dumps(document) + "\n")
        return document

    @cached_property
    def _facts(self) -> dict[Arm, dict]:
        return {arm: training_facts(self._plan.path(arm)) for arm in self._plan.arms}

    def _document(self, status: str) -> dict:
        base = self._measurement.known(None)
        scores = {arm: self._measurement.known(arm) for arm in self._plan.arms}
        names = by_metric(base)
        is_complete = {score.group for score in base} >= {"target", "general"}
        document = {
            "kind": "compare",
            "about": self._about,
            "command": self._command,
            "recipe": dump_recipe(self._plan.recipe, folder=self._plan.folder),
            "status": status,
            "base": [asdict(score) for score in base],
            "target": main_metric(names, "target") if is_complete else None,
            "general": main_metric(names, "general") if is_complete else None,
            "arms": [self._arm(arm, scores[arm]) for arm in self._plan.arms],
            "matched": self.matched,
            "table": self._table(base, scores) if is_complete else [],
            "verdicts": [],
            "verdict": "",
        }
        return document | self._verdicts(names, scores, document) if status == "finished" else document

    def _arm(self, arm: Arm, scores: list[Score]) -> dict:
        return {
            "gate": arm.gate.name,
            "label": arm.label,
            "seed": arm.seed,
            "learning_rate": arm.learning_rate,
            "folder": f"arms/{arm.name}",
            **self._facts[arm],
            "scores": [asdict(score) for score in scores],
        }

    def _table(self, base: list[Score], scores: dict[Arm, list[Score]]) -> list[dict]:
        by_label: dict[str, list[Arm]] = {}
        for arm in self._plan.arms:
            if len(scores[arm]) == len(base):
                by_label.setdefault(arm.label, []).append(arm)
        return table_rows(
            base,
            {label: [scores[arm] for arm in arms] for label, arms in by_label.items()},
            {label: [self._facts[arm]["mean_gate"] for arm in arms] for label, arms in by_label.items()},
        )

    def _verdicts(self, base: dict[str, Score], scores: dict[Arm, list[Score]], document: dict) -> dict:
        target, general = document["target"], document["general"]
        runs = {label: self._runs(label, scores) for label in self._plan.labels}
        pairs, controls = [], []
        for arm in self._plan.arms:
            if arm.seed != self._plan.seeds[0]:
                continue
            reference = self._plan.reference_of(arm)
            if arm != reference:
                pairs.append(compare_pair(runs[arm.label], runs[reference.label], target, general))
            if arm.gate.is_matched_scale:
                source = self._plan.weight_source(arm)
                controls.append(compare_pair(runs[source.label], runs[arm.label], target, general))
        plain = runs[self._plan.reference_of(self._plan.arms[0]).label]
        forgotten = judge(general, [(base[general], found[general]) for found in plain.scores.values()])
        levels = (self.matched or {}).get("levels")
        level = statistics.mean(level["of_largest_gain"] for level in levels) if levels else None
        text = overall(pairs, target=target, general=general, base=forgotten, level=level, controls=controls)
        return {"verdicts": [*pairs, *controls], "verdict": text}

    def _runs(self, label: str, scores: dict[Arm, list[Score]]) -> ScoresBySeed:
        arms = [arm for arm in self._plan.arms if arm.label == label]
        matched = {}
        for entry in (self.matched or {"arms": []})["arms"]:
            if entry["label"] == label:
                matched[entry["seed"]] = by_metric(scores_from_dicts(entry["scores"]))
        return ScoresBySeed(label, {arm.seed: by_metric(scores[arm]) for arm in arms}, matched)

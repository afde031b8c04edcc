"""compare.json: the document of a comparison, in the form that the report reads."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict

from eaftdrope.evaluate import Score
from eaftdrope.evaluate.scores import scores_from_dicts
from eaftdrope.files import write_atomically
from eaftdrope.recipe.dump import dump_recipe

from .measurement import Measurement
from .plan import Arm
from .table import by_metric, main_metric, table_rows
from .training import is_trained, training_facts
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
        self._facts: dict[str, dict] = {}

    def store(self, status: str) -> dict:
        """Write the document with this status ("running" or "finished") and return it."""
        document = self._document(status)
        write_atomically(self._plan.folder / NAME, json.dumps(document) + "\n")
        return document

    @property
    def _finished(self) -> list[Arm]:
        """The arms that are trained; all of them but while an early stop is still to be trained."""
        return [arm for arm in self._plan.arms if is_trained(self._plan, arm, self._measurement.held_out_loss)]

    def _document(self, status: str) -> dict:
        base = self._measurement.known(None)
        scores = {arm: self._measurement.known(arm) for arm in self._finished}
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
            "arms": [self._arm(arm, found) for arm, found in scores.items()],
            "matched": self.matched,
            "table": self._table(base, scores) if is_complete else [],
            "verdicts": [],
            "verdict": "",
        }
        return document | self._verdicts(names, scores, document) if status == "finished" else document

    def _arm(self, arm: Arm, scores: list[Score]) -> dict:
        return {
            "gate": arm.spec.gate,
            "label": arm.label,
            "seed": arm.seed,
            "learning_rate": arm.learning_rate,
            "folder": f"arms/{self._plan.path(arm).name}",
            "repair": asdict(arm.spec.repair) if arm.spec.repair else None,
            **self._training(arm),
            "scores": [asdict(score) for score in scores],
        }

    def _training(self, arm: Arm) -> dict:
        """Return the facts on an arm's training, read once."""
        path = self._plan.path(arm)
        if path.name not in self._facts:
            self._facts[path.name] = training_facts(path)
        return self._facts[path.name]

    def _table(self, base: list[Score], scores: dict[Arm, list[Score]]) -> list[dict]:
        by_label: dict[str, list[Arm]] = {}
        for arm, found in scores.items():
            if len(found) == len(base):
                by_label.setdefault(arm.label, []).append(arm)
        return table_rows(
            base,
            {label: [scores[arm] for arm in arms] for label, arms in by_label.items()},
            {label: [self._training(arm)["mean_gate"] for arm in arms] for label, arms in by_label.items()},
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
            if arm.spec.is_matched_scale and not arm.spec.repair:
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

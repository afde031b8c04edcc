"""Ablations of a pipeline: which stages each has and trains, and the table that they leave in the report of the whole."""

import json

import pytest
import yaml

from eaftdrope.compare.ablations import plan_ablations
from eaftdrope.errors import UserError
from eaftdrope.recipe import load_recipe
from eaftdrope.report.system import collect_system, is_pipeline, states_of
from tests import forked
from tests.tiny_run import hashes, make_staged_project

ALL = ["pretrain", "drope", "recalibrate", "eaft", "ttt"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """pipeline.yaml: eaft and ttt, two steps each, both with the probe long_loss."""
    folder = tmp_path_factory.mktemp("project")
    staged = yaml.safe_load(make_staged_project(folder).read_text())
    (folder / "text.txt").write_text("The rain fell on the town, and nobody minded. " * 40)
    probes = {"target": [], "general": [{"long_loss": {"files": ["text.txt"], "length": 64, "passages": 6}}]}
    recipe = {key: staged[key] for key in ("model", "data", "output")}
    recipe |= {"stages": ["eaft", "ttt"], "train": {**staged["train"], "steps": 2}, "probes": probes}
    recipe["ttt"] = {
        **{"window": 32, "sink": 2, "chunk": 16, "fast_blocks": 1},
        "data": {"train": "text.jsonl", "max_length": 96},
        "train": {**staged["train"], "steps": 2, "batch_size": 2},
        "probes": probes,
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


def planned(project, stages, **how):
    recipe = load_recipe(project / "pipeline.yaml").model_copy(update={"stages": stages})
    return {ablation.name: (ablation.stages, ablation.trained) for ablation in plan_ablations(recipe, **how)}


def test_each_stage_is_left_out_once_and_what_comes_before_is_shared(project):
    assert planned(project, ALL) == {
        "without-drope": (["pretrain", "recalibrate", "eaft", "ttt"], ["recalibrate", "eaft", "ttt"]),
        "without-recalibrate": (["pretrain", "drope", "eaft", "ttt"], ["eaft", "ttt"]),
        "without-eaft": (["pretrain", "drope", "recalibrate", "ttt"], ["ttt"]),
        "without-ttt": (["pretrain", "drope", "recalibrate", "eaft"], []),
    }


def test_other_orders_are_wanted_explicitly(project):
    found = planned(project, ALL, leave_out=["ttt"], orders=True)
    assert list(found) == ["without-ttt", "eaft-before-drope", "ttt-before-eaft"]
    assert found["eaft-before-drope"][0] == ["pretrain", "eaft", "drope", "recalibrate", "ttt"]
    assert found["ttt-before-eaft"] == (["pretrain", "drope", "recalibrate", "ttt", "eaft"], ["ttt", "eaft"])


@pytest.mark.parametrize(
    ("stages", "leave_out", "problem"),
    [
        (["eaft"], None, "nothing to leave out"),
        (
            ["eaft", "ttt"],
            ["drope"],
            r"--leave-out drope: not one of the recipe's stages that can be left out \(eaft, ttt\)",
        ),
        (ALL, ["pretrain"], "--leave-out pretrain"),
    ],
)
def test_what_cannot_be_left_out_is_refused(project, stages, leave_out, problem):
    with pytest.raises(UserError, match=problem):
        planned(project, stages, leave_out=leave_out)


@pytest.mark.end_to_end
def test_whole_and_ablations_in_one_command_which_does_nothing_twice(project, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"

    def ablate():
        process = forked.start(_main, ["ablate", str(project / "pipeline.yaml"), f"output.dir={run}"], out=out)
        process.join(400)
        assert process.exitcode == 0, out.read_text()
        return out.read_text()

    first = ablate()
    assert is_pipeline(run) and not is_pipeline(run / "eaft")
    whole = {name: value for name, value in hashes(run).items() if name.endswith(".safetensors")}
    # shared, and not trained again
    assert whole["ablations/without-ttt/eaft/model.safetensors"] == whole["eaft/model.safetensors"]
    assert (run / "ablations/without-ttt/eaft/model.safetensors").stat().st_ino == (
        run / "eaft/model.safetensors"
    ).stat().st_ino
    assert whole["ablations/without-eaft/ttt/model.safetensors"] != whole["ttt/model.safetensors"]
    found = json.loads((run / "system.json").read_text())
    assert found == json.loads(json.dumps(collect_system(run)))
    assert (found["stages"], found["states"]) == (["eaft", "ttt"], ["start", "eaft", "ttt"])
    arms = {ablation["name"]: ablation for ablation in found["ablations"]}
    assert {name: arm["stages"] for name, arm in arms.items()} == {"without-eaft": ["ttt"], "without-ttt": ["eaft"]}
    # the last states, over the same units
    change = arms["without-ttt"]["changes"][0]
    states = {state.label: state.scores for state in states_of(run)}
    assert (change["from"], change["to"]) == (states["ttt"][0].value, states["eaft"][0].value)
    differences = [(b - a) / w for (a, w), (b, _) in zip(states["ttt"][0].units, states["eaft"][0].units)]
    mean = sum(differences) / 6
    assert change["difference"] == pytest.approx(mean, abs=1e-6)
    spread = (sum((d - mean) ** 2 for d in differences) / 5 / 6) ** 0.5
    assert change["stderr"] == pytest.approx(spread, rel=1e-3)
    page = (run / "report.html").read_text()
    for words in (
        "Ablations: the last state",
        "nats per token by length",
        "Retention: every metric",
        "without-eaft",
    ):
        assert words in page
    assert 'id="system"' in page
    before = hashes(run)
    # one file has the output of both
    again = ablate().removeprefix(first)
    assert again.count("finished in") == 3 and "step" not in again
    assert {name: value for name, value in hashes(run).items() if "figures" not in name} == {
        name: value for name, value in before.items() if "figures" not in name
    }


def _main(arguments):
    from eaftdrope.cli import main
    from eaftdrope.report import page
    from eaftdrope.report.page import page_builder
    from eaftdrope.run.probing import RunProbes

    # sample answers take longer than the rest of so small a run
    RunProbes._take_samples = lambda *_: None
    write = page._write

    def pipelines_only(source, output):
        if page_builder(source)[0] == "":
            return write(source, output)
        (source / "report.html").write_text("")
        return source / "report.html"

    page._write = pipelines_only
    main(arguments)

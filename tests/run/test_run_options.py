"""Options of a recipe that change how a whole run trains: packing, gates, evaluation while training."""

import json

import pytest

from tests.tiny_run import make_project, train

SHORT = ("train.steps=2", "probes.general=[]", "probes.target=[]")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder


def logs(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_packing_trains_the_same_tokens_in_fewer_sequences(project, tmp_path):
    ended = {}
    for name in ("true", "false"):
        run = tmp_path / name
        options = ("train.epochs=1", "train.steps=null", f"data.packing={name}", *SHORT[1:])
        ended[name] = train(project / "recipe.yaml", f"output.dir={run}", *options)
        assert ended[name].code == 0, ended[name].out
    packed, plain = (logs(tmp_path / name) for name in ("true", "false"))
    totals = [[line for line in lines if "eaft/trained_tokens" in line][-1] for lines in (packed, plain)]
    assert totals[0]["eaft/trained_tokens"] == totals[1]["eaft/trained_tokens"]
    assert totals[0]["step"] < totals[1]["step"]


@pytest.mark.parametrize("gate", ["none", "eaft-vocab", "eaft-mask", "dft", "talr"])
def test_gates_by_recipe(project, tmp_path, gate):
    run = tmp_path / "run"
    ended = train(project / "recipe.yaml", f"output.dir={run}", f"loss.gate={gate}", *SHORT)
    assert ended.code == 0, ended.out
    first = logs(run)[0]
    if gate == "none":
        assert first["eaft/gate_mean"] == 1.0
        assert first["eaft/weighted_loss"] == pytest.approx(first["eaft/cross_entropy"])
    else:
        assert first["eaft/gate_mean"] < 1.0
    assert gate in (run / "README.md").read_text()


def test_evaluation_while_training(project, tmp_path):
    run = tmp_path / "run"
    ended = train(project / "recipe.yaml", f"output.dir={run}", "train.eval_every=1", *SHORT)
    assert ended.code == 0, ended.out
    losses = [line["eval_loss"] for line in logs(run) if "eval_loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0]

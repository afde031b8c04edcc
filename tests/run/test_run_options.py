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


def test_weights_and_exempt_strings(project, tmp_path):
    """Adapters, an evaluation while training, and packing: the weights of the rows reach the loss of every step."""
    rows = [json.loads(line) for line in (project / "rows.jsonl").read_text().splitlines()]
    weighted = project / "weighted.jsonl"
    weighted.write_text("".join(json.dumps({**row, "weight": 0.5}) + "\n" for row in rows), encoding="utf-8")
    first = {}
    for name, options in {
        "plain": (),
        "half": (f"data.train={weighted}",),
        "exempt": ("loss.gate=constant", "loss.weight=0", 'loss.exempt=["<|im_end|>"]'),
        "packed": (f"data.train={weighted}", "data.packing=true", 'loss.exempt=["It is"]'),
    }.items():
        run = tmp_path / name
        always = ("train.steps=1", "train.eval_every=1", "loss.gate=none", *SHORT[1:])
        ended = train(project / "recipe.yaml", f"output.dir={run}", *always, *options)
        assert ended.code == 0, ended.out
        first[name] = logs(run)[0]
    plain, half, exempt = (first[name] for name in ("plain", "half", "exempt"))
    assert half["eaft/weighted_loss"] == pytest.approx(plain["eaft/weighted_loss"] / 2, rel=1e-6)
    assert half["eaft/trained_tokens"] == plain["eaft/trained_tokens"]
    assert half["eaft/gate_mean"] == 1.0
    # the gate closes every token but the stop token of each of the four rows
    assert exempt["eaft/gate_mean"] == 0.0 and exempt["eaft/gate_hist_09"] == pytest.approx(
        4 / exempt["eaft/trained_tokens"]
    )
    assert 0 < exempt["eaft/weighted_loss"] < plain["eaft/weighted_loss"]
    assert first["packed"]["eaft/weighted_loss"] == pytest.approx(first["packed"]["eaft/cross_entropy"] / 2, rel=1e-5)
    assert "except those of '<|im_end|>'" in (tmp_path / "exempt" / "README.md").read_text()


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "full"])
def test_an_anchor_holds_the_model_near_its_base(project, tmp_path, adapters):
    """The base is the model without its adapters, or a second copy; a killed run resumes with the same losses."""
    options = ("train.steps=6", "probes.target=[]", "probes.general=[]", *(() if adapters else ("lora=null",)))
    ends = {}
    for name, anchor in {"free": (), "anchored": ("loss.anchor={kl: 5}",), "killed": ("loss.anchor={kl: 5}",)}.items():
        command = (project / "recipe.yaml", f"output.dir={tmp_path / name}", *options, *anchor)
        if name == "killed":
            assert train(*command, moment="in step 4, after a checkpoint").code == -9
        ended = train(*command)
        assert ended.code == 0, ended.out
        ends[name] = [line for line in logs(tmp_path / name) if "eaft/cross_entropy" in line]
    keys = ("step", "eaft/cross_entropy", "eaft/anchor_kl")
    divergences = [line["eaft/anchor_kl"] for line in ends["anchored"]]
    # LoRA's dropout, which the base has not, moves the first step a little
    assert divergences[0] == pytest.approx(0, abs=1e-3) and all(value >= 0 for value in divergences)
    assert "eaft/anchor_kl" not in ends["free"][0]
    assert ends["anchored"][-1]["eaft/cross_entropy"] > ends["free"][-1]["eaft/cross_entropy"]
    assert [[line[key] for key in keys] for line in ends["killed"]] == [
        [line[key] for key in keys] for line in ends["anchored"]
    ]


def test_a_training_ends_once_its_held_out_loss_is_low_enough(project, tmp_path):
    """Killed after it has ended and before its result is written, it does not train on."""
    options = ("train.steps=6", "train.stop_at=100", "train.save_every=50", *SHORT[1:])
    runs = [tmp_path / name for name in ("whole", "killed")]
    ended = train(project / "recipe.yaml", f"output.dir={runs[0]}", "train.eval_every=2", *options)
    assert ended.code == 0, ended.out
    assert [line["step"] for line in logs(runs[0]) if "eval_loss" in line] == [2]
    assert max(line["step"] for line in logs(runs[0])) == 2
    killed = train(
        project / "recipe.yaml", f"output.dir={runs[1]}", "train.eval_every=2", *options, moment="after training"
    )
    assert killed.code == -9
    ended = train(project / "recipe.yaml", f"output.dir={runs[1]}", "train.eval_every=2", *options)
    assert ended.code == 0 and "resuming from checkpoint-2 of 6" in ended.out, ended.out
    assert max(line["step"] for line in logs(runs[1])) == 2
    # without eval_every, every step of so short a training is watched
    ended = train(project / "recipe.yaml", f"output.dir={tmp_path / 'watched'}", *options)
    assert ended.code == 0 and max(line["step"] for line in logs(tmp_path / "watched")) == 1, ended.out

"""The plan of a comparison, made without data or weights, and the comparisons that are refused, with the reason."""

import pytest
import yaml

from eaftdrope.compare.plan import arm_recipe, plan_comparison
from eaftdrope.compare.training import is_trained
from eaftdrope.errors import UserError
from eaftdrope.recipe.load import load_recipe
from eaftdrope.run.data import build_data
from eaftdrope.run.settings import eaft_settings
from tests.tiny_models import byte_tokenizer
from tests.tiny_run import make_project, make_staged_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


def plan(project, *overrides, gates="none,eaft", **options):
    return plan_comparison(project, list(overrides), gates=gates, **options)


def test_every_seed_and_rate_has_every_gate(project, tmp_path):
    found = plan(project, gates="none,constant,eaft:alpha=2", seeds=2, rates="1e-4,0.01", folder=tmp_path)
    assert [arm.name for arm in found.arms] == [
        f"{label}@{rate}-seed{seed}"
        for seed in (42, 43)
        for rate in ("0.0001", "0.01")
        for label in ("none", "eaft-alpha=2", "constant")
    ]
    constant = found.arms[-1]
    assert found.weight_source(constant).name == "eaft-alpha=2@0.01-seed43"
    assert found.reference_of(constant).name == "none@0.01-seed43"
    assert plan(project, gates="eaft,dft").reference_of(plan(project, gates="eaft,dft").arms[1]).label == "eaft"


def test_an_arm_is_the_recipe_of_the_command_that_trains_it(project, tmp_path):
    found = plan(project, "loss.alpha=2.0", gates="none,eaft,dft,eaft-vocab", folder=tmp_path)
    for arm, more in zip(found.arms, (["loss.alpha=null"], [], ["loss.alpha=null"], [])):
        typed = load_recipe(
            project,
            [
                "loss.alpha=2.0",
                *more,
                f"loss.gate={arm.gate.name}",
                f"train.seed={arm.seed}",
                "probes.target=[]",
                "probes.general=[]",
                f"output.dir={tmp_path}/arms/{arm.gate.name}-seed{arm.seed}",
            ],
        )
        assert arm_recipe(found, arm) == typed
        assert is_trained(found, arm) is False
    assert [arm_recipe(found, arm).loss.alpha for arm in found.arms[:4]] == [None, 2.0, None, 2.0]


def test_held_out_rows_are_those_of_every_seed_and_never_trained_on(project):
    found = plan(project, "data.held_out=0.25", seeds=3)
    recipes = [arm_recipe(found, arm) for arm in found.arms if arm.gate.name == "eaft"]
    data = [build_data(eaft_settings(recipe), byte_tokenizer()) for recipe in (*recipes, found.recipe)]
    held_out = {tuple(one.held_out["origin"]) for one in data}
    assert len(held_out) == 1 and len(data) == 4
    for one in data:
        assert not set(one.train["origin"]) & set(*held_out)
    # a file is the same for every seed, and a run without the key counts as an arm
    assert arm_recipe(plan(project), plan(project).arms[0]).data.seed is None


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ((), {"gates": "none,eeft"}, "--gates eeft: no such gate. Did you mean `eaft`"),
        ((), {"gates": "none,eaft:beta=2"}, "loss.beta"),
        ((), {"gates": "none,eaft:alpha=-1"}, "loss.alpha: must be at least 0"),
        ((), {"gates": "none,dft:alpha=2"}, "gate dft has no option alpha"),
        ((), {"gates": "none,eaft:alpha"}, "gate:option=value"),
        ((), {"gates": "eaft"}, "pass at least two"),
        ((), {"gates": "none,constant"}, "its weight is the mean gate of the eaft arm, which is missing"),
        ((), {"rates": "1e-4,fast"}, "--lr 1e-4,fast: pass learning rates above 0"),
        ((), {"rates": "0"}, "--lr 0"),
        (("probes.general=[]",), {}, "probes.general is empty"),
        (("probes.target=[function_calls]",), {"match": True}, "which is not measured"),
        (("lora.use_dora=true",), {"match": True}, "DoRA"),
        (("train.stepps=3",), {}, "Did you mean `steps`"),
    ],
)
def test_what_cannot_be_compared(project, overrides, options, message):
    with pytest.raises(UserError) as error:
        plan(project, *overrides, **options)
    assert message in str(error.value)


def test_problems_are_reported_together(project):
    with pytest.raises(UserError) as error:
        plan(project, "probes.general=[]", gates="none,eeft", rates="x")
    assert all(part in str(error.value) for part in ("probes.general", "eeft", "--lr x"))


def test_stages_and_several_processes_are_refused(tmp_path, project, monkeypatch):
    with pytest.raises(UserError, match="a recipe with stages cannot be compared"):
        plan(make_staged_project(tmp_path / "staged"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="in one process"):
        plan(project)


def test_the_verb_refuses_before_anything_is_loaded(project, capsys):
    from eaftdrope.cli import main

    for arguments, message in (
        (["--match", "general"], "only `target` can be matched"),
        (["--gates", "none,dtf"], "Did you mean `dft`"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["compare", str(project), *arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_recipes_name_their_gate_in_yaml(tmp_path, project):
    """A recipe without a loss section can be compared."""
    data = yaml.safe_load(project.read_text(encoding="utf-8"))
    assert "loss" not in data
    found = plan(project, gates="none,conflict-mask:quantile=0.3")
    assert arm_recipe(found, found.arms[1]).loss.quantile == 0.3

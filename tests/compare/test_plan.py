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


def plan(project, *overrides, arms="none,eaft", **options):
    return plan_comparison(project, list(overrides), arms=arms, **options)


def test_every_seed_and_rate_has_every_gate(project, tmp_path):
    found = plan(project, arms="none,constant,eaft:alpha=2", seeds=2, rates="1e-4,0.01", folder=tmp_path)
    assert [arm.name for arm in found.arms] == [
        f"{label}@{rate}-seed{seed}"
        for seed in (42, 43)
        for rate in ("0.0001", "0.01")
        for label in ("none", "eaft-alpha=2", "constant")
    ]
    constant = found.arms[-1]
    assert found.weight_source(constant).name == "eaft-alpha=2@0.01-seed43"
    assert found.reference_of(constant).name == "none@0.01-seed43"
    assert plan(project, arms="eaft,dft").reference_of(plan(project, arms="eaft,dft").arms[1]).label == "eaft"


def test_an_arm_is_the_recipe_of_the_command_that_trains_it(project, tmp_path):
    found = plan(project, "loss.alpha=2.0", arms="none,eaft,dft,eaft-vocab", folder=tmp_path)
    for arm, more in zip(found.arms, (["loss.alpha=null"], [], ["loss.alpha=null"], [])):
        typed = load_recipe(
            project,
            [
                "loss.alpha=2.0",
                *more,
                f"loss.gate={arm.spec.gate}",
                f"train.seed={arm.seed}",
                "probes.target=[]",
                "probes.general=[]",
                f"output.dir={tmp_path}/arms/{arm.spec.gate}-seed{arm.seed}",
            ],
        )
        assert arm_recipe(found, arm) == typed
        assert is_trained(found, arm) is False
    assert [arm_recipe(found, arm).loss.alpha for arm in found.arms[:4]] == [None, 2.0, None, 2.0]


def test_held_out_rows_are_those_of_every_seed_and_never_trained_on(project):
    found = plan(project, "data.held_out=0.25", seeds=3)
    recipes = [arm_recipe(found, arm) for arm in found.arms if arm.spec.gate == "eaft"]
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
        ((), {"arms": "none,eeft"}, "--arms eeft: no such gate or method. Did you mean `eaft`"),
        ((), {"arms": "none,eaft:beta=2"}, "loss.beta"),
        ((), {"arms": "none,eaft:alpha=-1"}, "loss.alpha: must be at least 0"),
        ((), {"arms": "none,dft:alpha=2"}, "gate dft has no option alpha"),
        ((), {"arms": "none,eaft:alpha"}, "gate:option=value"),
        ((), {"arms": "eaft"}, "pass at least two"),
        ((), {"arms": "none,none+denose"}, "--arms none+denose: no such gate or method. Did you mean `denoise`"),
        (
            (),
            {"arms": "none,sdft"},
            "--arms sdft: self-distillation is no arm yet. TRL's experimental SDFTTrainer runs, but",
        ),
        ((), {"arms": "none,lr/x"}, "--arms lr/x: lr/ needs a number above 0, such as lr/2."),
        ((), {"arms": "none,none+share=1.5"}, "share= needs a number above 0 and below 1, such as share=0.5."),
        ((), {"arms": "none,eaft+dft"}, "eaft and dft are two gates, and an arm has one."),
        ((), {"arms": "none,eaft+asft"}, "eaft and dft are two gates, and an arm has one."),
        (
            (),
            {"arms": "none,sft-kl+mask-target"},
            "sft-kl and mask-target both set loss.anchor and loss.preset. Keep one.",
        ),
        ((), {"arms": "none,sft-kl=0"}, "loss.anchor.kl"),
        ((), {"arms": "none,eaft,dft+denoise"}, "a repair needs the finished arm dft, which is missing"),
        ((), {"arms": "none,none+restore="}, "restore needs modules. Write restore=q_proj,k_proj."),
        ((), {"arms": "none,none+denoise=2"}, "denoise has no value. Write denoise."),
        ((), {"arms": "early-stop,early-stop+eaft"}, "it ends at the loss of the weakest other arm. Add another arm."),
        (
            ("probes.target=[function_calls]",),
            {"arms": "none,early-stop"},
            "it ends at the held-out loss of another arm",
        ),
        (
            ("lora.use_dora=true",),
            {"arms": "none,none+denoise"},
            "a repair acts on the change of the weights, and DoRA",
        ),
        (("lora.r=3",), {"arms": "none,none+denoise"}, "adapters of rank 3 have too few singular values"),
        ((), {"arms": "none,replay"}, "data.replay: the model replies to prompts, and there are none"),
        (
            (),
            {"arms": "none,constant+lr/2,eaft"},
            "--arms constant + lr/2: its weight is the mean gate of the eaft arm",
        ),
        ((), {"arms": "none,constant"}, "its weight is the mean gate of the eaft arm, which is missing"),
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
        plan(project, "probes.general=[]", arms="none,eeft", rates="x")
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
    found = plan(project, arms="none,conflict-mask:quantile=0.3")
    assert arm_recipe(found, found.arms[1]).loss.quantile == 0.3


def test_the_language_of_arms(tmp_path):
    from eaftdrope.checkpoints.repair_options import Repair
    from eaftdrope.compare.arms import parse_arms

    text = (
        "none+restore=q_proj,k_proj+denoise, eaft:alpha=2+lr/5, none, none+lr/2, lr/2, early-stop, replay, eaft+replay=0.1,"
        "eaft, constant, replay+share=0.5"
    )
    specs, problems = parse_arms(text)
    assert problems == []
    # what needs other arms comes after them, and an arm that is written twice is one arm
    assert [spec.label for spec in specs] == [
        "eaft alpha=2 + lr/5",
        "none",
        "lr/2",
        "replay 0.2",
        "eaft + replay 0.1",
        "eaft",
        "constant",
        "early stop",
        "none + denoise + restore q_proj k_proj",
        "replay 0.2 + share 0.5",
    ]
    assert specs[-2].repair == Repair(denoise=True, restore=("q_proj", "k_proj"))
    assert specs[-2].training == specs[1] and specs[-1].training == specs[3]


def test_anchors_as_arms(project, tmp_path):
    from eaftdrope.loss.anchor import PRESETS, Anchor

    # the recipe has an anchor of its own, of which no arm keeps anything
    own = ("loss.anchor={kl: 0.9, direction: forward, mask_target: true}",)
    found = plan(project, *own, arms="none,sft-kl,asft,mask-target=0.2,eaft+sft-kl=0.3", folder=tmp_path)
    losses = {arm.label: arm_recipe(found, arm).loss for arm in found.trained}
    assert {label: (loss.gate, loss.anchor_of_loss) for label, loss in losses.items()} == {
        "none": ("none", None),
        "sft-kl 0.5": ("none", PRESETS["sft-kl"].anchor),
        "asft 0.1": ("dft", PRESETS["asft"].anchor),
        "mask-target 0.2": ("none", Anchor(0.2, "forward", True)),
        "eaft + sft-kl 0.3": ("eaft", Anchor(0.3, "reverse")),
    }


def test_arms_change_the_recipe(project, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n')
    found = plan(
        project,
        f"data.replay={{prompts: {prompts}}}",
        arms="none,lr/4,replay=0.5,early-stop,none+denoise,lr/4+share=0.5",
        rates="0.01,0.02",
        folder=tmp_path,
    )
    recipes = {arm.label: arm_recipe(found, arm, {"train.stop_at": "2.5"}) for arm in found.trained}
    assert list(recipes) == [
        f"{label}@{rate}" for rate in ("0.01", "0.02") for label in ("none", "lr/4", "replay 0.5", "early stop")
    ]
    assert recipes["none@0.02"].train.learning_rate == 0.02 and recipes["lr/4@0.02"].train.learning_rate == 0.005
    assert recipes["none@0.01"].data.replay is None and recipes["replay 0.5@0.01"].data.replay.share == 0.5
    assert recipes["replay 0.5@0.01"].data.replay.prompts == str(prompts)
    assert [label for label, recipe in recipes.items() if recipe.train.stop_at == 2.5] == [
        "early stop@0.01",
        "early stop@0.02",
    ]
    repaired = next(arm for arm in found.arms if arm.label == "lr/4 + share 0.5@0.02")
    assert repaired.name == "lr-4-share-0.5@0.02-seed42" and found.source_of(repaired).label == "lr/4@0.02"
    assert found.path(repaired) == tmp_path / "arms" / "lr-4@0.02-seed42"
    assert found.reference_of(repaired).label == "none@0.02"
    # without an arm of replay, the recipe's own is that of every arm
    both = plan(project, f"data.replay={{prompts: {prompts}}}", folder=tmp_path)
    assert all(arm_recipe(both, arm).data.replay is not None for arm in both.arms)

"""`loss.anchor` and `loss.preset`: what they resolve to, and what is refused with its line."""

from dataclasses import fields
from pathlib import Path

import pytest

from eaftdrope.errors import UserError
from eaftdrope.loss.anchor import PRESETS, Anchor
from eaftdrope.recipe import load_recipe, make_recipe
from eaftdrope.recipe.dump import dump_recipe
from eaftdrope.recipe.training_sections import AnchorOptions
from eaftdrope.recipe.yaml_lines import read_yaml


def loss_of(**loss):
    made = make_recipe({"model": "org/model", "data": {"train": "org/rows"}, "loss": loss, "output": {"dir": "runs/a"}})
    return made.loss


def test_the_options_are_those_of_the_loss():
    declared = {option.name: option.default for option in fields(Anchor)}
    assert AnchorOptions().model_dump() == declared
    assert loss_of().anchor_of_loss is None
    assert loss_of(anchor={}).anchor_of_loss == Anchor()
    assert loss_of(anchor={"kl": 1.0, "direction": "reverse"}).anchor_of_loss == Anchor(1.0, "reverse")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_gate_and_anchor(name):
    loss = loss_of(preset=name)
    assert (loss.gate, loss.anchor_of_loss) == (PRESETS[name].gate, PRESETS[name].anchor)


@pytest.mark.parametrize("name", PRESETS)
def test_the_page_has_the_preset(name):
    page = (Path(__file__).parents[2] / "docs" / "anchor.md").read_text(encoding="utf-8")
    formula = PRESETS[name].anchor.formula.replace("|", "\\|")
    assert f"| `{name}` | {PRESETS[name].gate} | {formula} | " in page


def test_what_is_set_beside_a_preset_replaces_its_own():
    loss = loss_of(preset="asft", gate="eaft", alpha=2.0, anchor={"kl": 0.05})
    assert (loss.gate, loss.alpha, loss.anchor_of_loss) == ("eaft", 2.0, Anchor(0.05))
    assert loss_of(preset="sft-kl", anchor={"mask_target": True}).anchor_of_loss == Anchor(0.5, "reverse", True)


def test_a_resolved_recipe_is_read_back(tmp_path):
    text = "model: org/model\ndata: {train: org/rows}\nloss: {preset: mask-target}\noutput: {dir: runs/a}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert read_yaml((tmp_path / "resolved.yaml").read_text()).data["loss"]["anchor"]["mask_target"] is True


WRONG = [
    ("loss: {anchor: {lk: 0.1}}", "loss.anchor.lk: unknown key. Did you mean `kl`?"),
    ("loss: {anchor: {direction: backward}}", "loss.anchor.direction"),
    ("loss: {anchor: {kl: 0}}", "loss.anchor.kl"),
    ("loss: {anchor: asft}", "loss.anchor"),
    ("loss: {preset: aft}", "Did you mean `asft`?"),
    ("loss: {preset: asft, anchor: 3}", "loss.anchor"),
    ("loss: {preset: asft, alpha: 2.0}", "gate dft has no option alpha"),
    ("loss: {anchor: {}, tail: sparse}", "loss.tail: a sparse tail restores what it drops as one mean"),
    ("loss: {preset: asft, tail: sparse}", "loss.tail: a sparse tail restores what it drops as one mean"),
    ("asft_alpha: 0.1", "loss.anchor"),
    (
        "stages: [drope, recalibrate, eaft]\nrecalibrate: {data: {train: org/text}, loss: {anchor: {}}}",
        "recalibrate.loss.anchor: unknown key",
    ),
]


@pytest.mark.parametrize(("part", "message"), WRONG)
def test_a_wrong_anchor_is_reported(tmp_path, part, message):
    (tmp_path / "recipe.yaml").write_text(
        f"model: org/model\ndata: {{train: org/rows}}\noutput: {{dir: runs/a}}\n{part}\n"
    )
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert message in str(error.value)

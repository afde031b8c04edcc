"""An adapter's folder: complete or refused by name, and its base model found again."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eaftdrope.checkpoints.adapters import adapter_settings, attach
from eaftdrope.errors import UserError
from eaftdrope.models import MODEL_PACKAGES
from tests.trainer.tiny import tiny_model

FILE = "adapter_model.safetensors"
DOWN = "base_model.model.model.layers.0.mlp.down_proj.lora_B"
WAY_OUT = (
    "Use another checkpoint, or set `base_model_name_or_path` of its adapter_config.json to the model that the adapter "
    "was trained on."
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_model(tie_word_embeddings=False).save_pretrained(folder)
    return folder


def save(base, folder, edit=None, **options):
    options = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options)).save_pretrained(folder)
    if edit:
        tensors = load_file(folder / FILE)
        edit(tensors)
        save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("options", "edit", "why"),
    [
        ({}, lambda t: t.pop(f"{DOWN}.weight"), f" is incomplete: Found missing adapter keys .*{DOWN}.default.weight"),
        (
            {"modules_to_save": ["lm_head"]},
            lambda t: t.pop("base_model.model.lm_head.weight"),
            r" is incomplete: it has no tensor 'base_model\.model\.lm_head\.weight'\. Use another checkpoint\.$",
        ),
        (
            {},
            lambda t: t.update({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(2, 64)}),
            " has tensors that the model has no place for: base_model.model.model.layers.7.mlp.up_proj.lora_A.weight. "
            + WAY_OUT,
        ),
        (
            {},
            lambda t: t.update({f"{DOWN}.weight": torch.ones(3, 2)}),
            " does not fit its base model: size mismatch for ",
        ),
    ],
    ids=["missing", "missing module", "superfluous", "shape"],
)
def test_an_adapter_that_is_not_whole_is_refused_by_name(base, tmp_path, options, edit, why):
    folder = save(base, tmp_path / "adapter", edit, **options)
    with pytest.raises(UserError, match=f"^{folder}{why}"):
        attach(AutoModelForCausalLM.from_pretrained(base), folder)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft, of embeddings among the targets
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [3, 4]},
        {"bias": "all", "use_dora": True},
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    ],
    ids=lambda options: ", ".join(options),
)
def test_every_kind_of_whole_adapter_is_taken(base, tmp_path, options):
    folder = save(base, tmp_path / "adapter", **options)
    assert attach(AutoModelForCausalLM.from_pretrained(base), folder).peft_config["default"].r == 2


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def folder(tmp_path):
    """An adapter's folder as far as its settings are concerned."""
    made = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    made.mkdir(parents=True)
    save_file({"a": torch.ones(1)}, made / FILE)
    (made / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    return made


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("adapter_config.json", b"[]", "is not a JSON object (it holds a list)"),
        (FILE, b"", "is damaged (it is empty)"),
        (FILE, b"\xff" * 50, "is damaged (Error while deserializing header: header too large)"),
    ],
)
def test_damaged_files_are_named(folder, name, content, why):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        adapter_settings(folder)
    assert str(caught.value) == f"the adapter cannot be loaded: {folder / name} {why}. Download or copy it again."


@pytest.mark.parametrize(("key", "what"), [("base_model_name_or_path", "base model"), ("peft_type", "kind of adapter")])
@pytest.mark.parametrize("value", [None, "", ["a"]])
def test_what_the_settings_must_name(folder, key, what, value):
    edit(folder, **{key: value})
    with pytest.raises(UserError) as caught:
        adapter_settings(folder)
    file = folder / "adapter_config.json"
    assert str(caught.value) == f"{file} has no {what}. Set `{key}` in it."


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga"])
def test_a_base_model_that_loading_cannot_make_again_is_refused(folder, start):
    """peft draws the singular vectors of pissa_niter again, and finds others: the logits are 5 away."""
    edit(folder, init_lora_weights=start)
    with pytest.raises(UserError, match=f"began with init_lora_weights='{start}', which changes the base model"):
        adapter_settings(folder)
    edit(folder, init_lora_weights="pissa")
    assert adapter_settings(folder)["base_model_name_or_path"] == "org/base"


@pytest.mark.parametrize("place", [".", "../.."])
@pytest.mark.parametrize("written", ["model: {}\n", "model:\n  reference: {}\n"])
def test_a_package_is_found_again_behind_the_hub_id_of_its_model(folder, place, written):
    package, hub_id = "package:smollm2-135m-instruct", MODEL_PACKAGES["smollm2-135m-instruct"].hub_id
    edit(folder, base_model_name_or_path=hub_id)
    assert adapter_settings(folder)["base_model_name_or_path"] == hub_id
    recipe = folder / place / "recipe.yaml"
    recipe.write_text(written.format(package))
    assert adapter_settings(folder)["base_model_name_or_path"] == package
    # a run on the hub's own weights, or on another model
    for other in (hub_id, "org/other"):
        recipe.write_text(written.format(other))
        assert adapter_settings(folder)["base_model_name_or_path"] == hub_id
    recipe.write_text("model: [")
    with pytest.raises(UserError, match=r"recipe\.yaml cannot be read, and it records which model the adapter"):
        adapter_settings(folder)

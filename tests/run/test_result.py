"""What a run does for its result to be of use: stop tokens, a configuration that can be saved, uploading."""

import json

import pytest

from eaftdrope.errors import UserError
from tests.tiny_models import byte_tokenizer, save_model
from tests.tiny_run import make_project, no_report, train

FULL = ("lora=null", "train.learning_rate=0.001")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder


# ---- the token that generation stops at ----


@pytest.mark.parametrize(
    ("eos", "expected"),
    [("<|im_end|>", 2), ("<|end|>", [2, 3])],
    ids=["known", "another"],
)
def test_generation_stops_where_answers_end(project, tmp_path, eos, expected):
    """The template ends answers in <|im_end|> (2); a tokenizer that calls <|end|> (3) its end stops at both."""
    save_model(tmp_path / "model", eos=eos)
    run = tmp_path / "run"
    short = ("train.steps=1", "probes.general=[]", "output.merge=true")
    ended = train(project / "recipe.yaml", f"output.dir={run}", f"model={tmp_path / 'model'}", *short)
    assert ended.code == 0, ended.out
    for folder in (run, run / "merged"):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == expected
    assert_base_settings_and_modes(tmp_path / "model", run, run / "merged")


def assert_base_settings_and_modes(model, run, result):
    """config.json is that of the base model, and whoever may read a new file may read every file of the run."""
    saved, base = (json.loads((folder / "config.json").read_text()) for folder in (result, model))
    assert saved == base and base["use_cache"] is True
    new = run.parent / "new"
    new.touch()
    modes = {str(file): file.stat().st_mode for file in run.rglob("*") if file.is_file()}
    assert modes == dict.fromkeys(modes, new.stat().st_mode)
    assert sum(name.endswith(".safetensors") for name in modes) >= 2


def test_stop_tokens_of_a_model_that_knows_none():
    from types import SimpleNamespace

    from eaftdrope.run.build import add_stop_tokens

    tokenizer = byte_tokenizer()
    for known, trained, expected in [
        (None, [], None),
        (None, ["<|im_end|>"], 2),
        (3, [], 3),
        ([3, 2], ["<|im_end|>"], [2, 3]),
    ]:
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=known))
        add_stop_tokens(model, tokenizer, trained)
        assert model.generation_config.eos_token_id == expected


@pytest.mark.parametrize("overrides", [(), FULL], ids=["lora", "full"])
def test_a_temperature_without_sampling_does_not_lose_the_result(project, tmp_path, overrides):
    """transformers loads such a configuration and refuses to save it."""
    config = save_model(tmp_path / "model") / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "temperature": 0.6, "top_p": 0.9}))
    run = tmp_path / "run"
    short = ("train.steps=1", "probes.general=[]", *overrides)
    ended = train(project / "recipe.yaml", f"output.dir={run}", f"model={tmp_path / 'model'}", *short)
    assert ended.code == 0, ended.out
    saved = json.loads((run / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.6, 0.9)
    if overrides == FULL:
        assert_base_settings_and_modes(tmp_path / "model", run, run)


# ---- no place of this machine ----


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # peft, offline
def test_an_adapter_of_a_packages_model_names_the_hub_id(project, tmp_path, monkeypatch):
    """And our own tools find the package again, whose weights it was trained on."""
    from peft import get_peft_model

    from eaftdrope.checkpoints.adapters import adapter_settings
    from eaftdrope.models import loading
    from eaftdrope.recipe import dump_recipe, load_recipe
    from eaftdrope.run.build import build_model
    from eaftdrope.run.lora import lora_config

    package = "package:smollm2-135m-instruct"
    recipe = load_recipe(project / "recipe.yaml", [])
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"reference": package})})
    place = loading.ModelSource(package, str(project / "model"), "package")
    monkeypatch.setattr(loading, "resolve_model", lambda reference, revision=None: place)
    model = get_peft_model(build_model(recipe.model), lora_config(recipe.lora, build_model(recipe.model)))
    model.save_pretrained(tmp_path / "run")
    text = (tmp_path / "run" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert str(project) not in text
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(recipe, folder=tmp_path / "run"))
    assert adapter_settings(tmp_path / "run")["base_model_name_or_path"] == package


def test_a_generation_config_that_can_not_be_saved_is_told_at_once():
    from transformers import GenerationConfig

    from eaftdrope.run.build import make_generation_config_saveable

    class Model:
        generation_config = GenerationConfig()

    make_generation_config_saveable(Model)
    assert not Model.generation_config.do_sample
    Model.generation_config.num_return_sequences = 3
    Model.generation_config.num_beams = 2
    with pytest.raises(UserError, match=r"^the model's generation_config\.json could not be saved with the result: "):
        make_generation_config_saveable(Model)


# ---- what takes long is announced ----


def test_dequantising_is_announced_once(project, tmp_path, monkeypatch, capsys):
    from rich.console import Console

    from eaftdrope.models.gguf import copy
    from eaftdrope.recipe import load_recipe
    from eaftdrope.run.train import show_plan

    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setenv("EAFTDROPE_CACHE", str(tmp_path / "cache"))

    def dequantise(gguf, folder):
        save_model(folder)

    monkeypatch.setattr(copy, "_dequantise", dequantise)
    recipe = load_recipe(project / "recipe.yaml", [f"model={gguf}", f"output.dir={tmp_path / 'run'}"])
    text = "dequantising the model once, about half a minute ..."
    show_plan(recipe, Console(width=120))
    assert capsys.readouterr().out.splitlines()[0] == text
    show_plan(recipe, Console(width=120))
    assert text not in capsys.readouterr().out


# ---- uploading ----


@pytest.fixture
def pushing(project, tmp_path, monkeypatch):
    """pushing(): runs a recipe with push_to_hub in this process, without a network."""
    from rich.console import Console

    from eaftdrope.recipe import load_recipe
    from eaftdrope.report import page
    from eaftdrope.run.train import run_recipe

    monkeypatch.setattr(page, "_write", no_report)
    short = ["train.steps=2", "probes.target=[]", "probes.general=[]", "output.push_to_hub=me/tuned"]
    recipe = load_recipe(project / "recipe.yaml", [f"output.dir={tmp_path / 'run'}", "output.merge=true", *short])
    return lambda: run_recipe(recipe, Console(quiet=True), command="test")


@pytest.fixture
def hub(monkeypatch):
    """Names what is uploaded, in the order of the calls."""
    from types import SimpleNamespace

    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    calls = []

    def create_repo(self, name, *, private, exist_ok):
        calls.append((name, private, exist_ok))
        return SimpleNamespace(repo_id="me/tuned")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns):
        names = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        names = set(filter_repo_objects(names, ignore_patterns=ignore_patterns))
        calls.append((repo_id, {name for name in names if not name.startswith("figures/")}))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
UPLOADED = TOKENIZER | ADAPTER | {"README.md", "recipe.yaml", "metrics.jsonl", "landscape.jsonl", "report.html"}


def test_what_is_uploaded(pushing, hub, tmp_path):
    """The result, without checkpoints and without what names this machine."""
    pushing()
    assert hub == [("me/tuned", True, True), ("me/tuned", UPLOADED)]
    assert (tmp_path / "run" / "merged" / "model.safetensors").exists()
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (state["status"], state["uploaded"]) == ("finished", "me/tuned")
    with pytest.raises(UserError, match="holds a finished run"):
        pushing()


def test_an_upload_that_fails_is_made_by_the_same_command(pushing, request, tmp_path, monkeypatch):
    """Offline (the tests' setting): the text says how to upload it later. Nothing is trained or merged twice."""
    from eaftdrope.run.stages import training

    folder = tmp_path / "run"
    with pytest.raises(UserError) as error:
        pushing()
    assert str(error.value).startswith(
        f"the run is complete in {folder}, but uploading it to 'me/tuned' failed: Cannot reach "
    )
    assert str(error.value).endswith(
        f" run the same command again, which only uploads, or: hf upload me/tuned {folder} --exclude 'checkpoints/*' "
        "--exclude 'merged/*' --exclude 'run.json' --exclude 'ask/*'"
    )
    assert json.loads((folder / "run.json").read_text())["status"] == "trained"
    weights = (folder / "merged" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(training, "build_trainer", None)
    hub = request.getfixturevalue("hub")
    pushing()
    assert hub == [("me/tuned", True, True), ("me/tuned", UPLOADED)]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert (folder / "merged" / "model.safetensors").stat().st_mtime_ns == weights

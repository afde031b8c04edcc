"""The converter's files: what is linked, edited, kept and restored, and what is refused with nothing left behind."""

import json
import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eaftdrope.drope import complete, convert, undo
from eaftdrope.drope import conversion as conversion_module
from eaftdrope.drope import conversion_plan as plan_module
from eaftdrope.errors import UserError
from tests import forked
from tests.drope.architectures import LENGTH, save
from tests.drope.big_folder import make as make_big
from tests.tiny_models import byte_tokenizer
from tests.tiny_run import hashes


@pytest.fixture
def source(tmp_path):
    """A Llama with tokenizer, card and generation limits, in two shards."""
    folder = save("Llama", tmp_path / "source", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.generation_config.max_length = LENGTH
    model.save_pretrained(folder, max_shard_size="80KB")
    byte_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- tiny\n---\n\n# Tiny\n\nA model.\n")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def test_what_a_conversion_writes(source, tmp_path):
    before = hashes(source)
    result = convert(source, tmp_path / "new", max_length=8 * LENGTH)
    config = read(tmp_path / "new")
    for key in ("rope_parameters", "rope_scaling"):
        assert config[key]["rope_type"] == "llama3" and config[key]["factor"] == 1e30
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["max_position_embeddings"] == 8 * LENGTH
    assert config["drope"]["trained_length"] == LENGTH and config["drope"]["layers"] == "all"
    assert config["drope"]["original"]["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert read(tmp_path / "new", "tokenizer_config.json")["model_max_length"] == 8 * LENGTH
    assert read(tmp_path / "new", "generation_config.json")["max_length"] == 8 * LENGTH
    card = (tmp_path / "new" / "README.md").read_text()
    assert "license: mit" in card and "- drope" in card and "A model." in card and "| vLLM |" in card
    for file in source.glob("*.safetensors"):
        assert os.stat(file).st_ino == os.stat(tmp_path / "new" / file.name).st_ino
    assert result.linked and hashes(source) == before


def test_copied_weights_are_their_own_files(source, tmp_path):
    result = convert(source, tmp_path / "new", copy=True)
    for file in source.glob("*.safetensors"):
        assert os.stat(file).st_ino != os.stat(tmp_path / "new" / file.name).st_ino
    assert not result.linked


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.1},
        {"qk_norm": True},
        {"qk_norm": True, "temperature": 0.9},
        {"engine": "gguf"},
        {"copy": True},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
@pytest.mark.parametrize("shards", [1, 2])
def test_undo_restores_every_hash(source, shards, options, tmp_path):
    if shards == 1:
        source = save("Llama", tmp_path / "one file")
    before = hashes(source)
    convert(source, tmp_path / "new", max_length=100, **options)
    assert hashes(source) == before, "the source was written to"
    undo(tmp_path / "new", tmp_path / "back")
    assert hashes(tmp_path / "back") == before


def test_a_second_conversion_builds_on_the_first_and_is_undone_to_it(source, tmp_path):
    convert(source, tmp_path / "one", temperature=1.2)
    result = convert(tmp_path / "one", tmp_path / "two", temperature=1.5, max_length=999)
    assert result.temperature == pytest.approx(1.8) and result.trained_length == LENGTH
    record = read(tmp_path / "two")["drope"]
    assert record["original"] == read(tmp_path / "one")["drope"]["original"]
    undo(tmp_path / "two", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "one")
    undo(tmp_path / "back", tmp_path / "first")
    assert hashes(tmp_path / "first") == hashes(source)


def test_after_a_training_the_keys_of_transformers_4_are_put_back(source, tmp_path):
    convert(source, tmp_path / "new")
    AutoModelForCausalLM.from_pretrained(tmp_path / "new").save_pretrained(tmp_path / "trained")
    assert "rope_scaling" not in read(tmp_path / "trained"), "the trap is gone: complete() is no longer needed"
    assert complete(tmp_path / "trained")
    for key in ("rope_scaling", "rope_theta", "rope_parameters", "drope"):
        assert read(tmp_path / "trained")[key] == read(tmp_path / "new")[key]
    assert not complete(source)
    with pytest.raises(UserError, match=r"cannot be undone: it has no drope_original"):
        undo(tmp_path / "trained", tmp_path / "back")


def test_the_card_tells_a_recalibrated_checkpoint_from_a_raw_one(source, tmp_path):
    convert(source, tmp_path / "raw")
    assert "Dropping alone costs quality" in (tmp_path / "raw" / "README.md").read_text()
    config = read(tmp_path / "raw")
    config["drope"]["recalibrated"] = {"tokens": 1234567}
    (tmp_path / "raw" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "raw", tmp_path / "again", temperature=1.1)
    card = (tmp_path / "again" / "README.md").read_text().split("The card of the source")[0]
    assert "recalibrated on 1,234,567 tokens" in card and "Dropping alone" not in card


@pytest.mark.parametrize(
    "options", [{"copy": True}, {"qk_norm": True}, {"temperature": 1.25}], ids=lambda o: next(iter(o))
)
def test_whoever_may_read_a_new_file_may_read_a_converted_one(source, tmp_path, options):
    """Links are the source's own, and stay as they are."""
    before = {file.name: file.stat().st_mode for file in source.iterdir()}
    assert {oct(before[file.name] & 0o777) for file in source.glob("*.safetensors")} == {"0o600"}
    convert(source, tmp_path / "new", **options)
    (tmp_path / "file").touch()
    expected = (tmp_path / "file").stat().st_mode
    files = [file for file in (tmp_path / "new").iterdir() if file.stat().st_nlink == 1]
    assert any(file.suffix == ".safetensors" for file in files)
    assert {file.name: file.stat().st_mode for file in files} == {file.name: expected for file in files}
    assert {file.name: file.stat().st_mode for file in source.iterdir()} == before


def test_qk_norm_is_a_stock_qwen3_that_differs_by_its_norms_alone(source, tmp_path):
    convert(source, tmp_path / "new", qk_norm=True, temperature=1.25)
    config = AutoConfig.from_pretrained(tmp_path / "new")
    assert config.model_type == "qwen3" and config.head_dim == 16
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    old = AutoModelForCausalLM.from_pretrained(source).state_dict()
    new = model.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert {name.split(".")[-2] for name in new.keys() - old.keys()} == {"q_norm", "k_norm"}
    assert torch.equal(new["model.layers.1.self_attn.q_norm.weight"], torch.full((16,), 1.25).bfloat16().float())
    assert torch.equal(new["model.layers.1.self_attn.k_norm.weight"], torch.ones(16))


def test_layers_where_the_architecture_can_say_them(tmp_path):
    save("SmolLM3", tmp_path / "source", no_rope_layers=[1, 1, 1, 0])
    result = convert(tmp_path / "source", tmp_path / "new", layers="0,2")
    config = AutoConfig.from_pretrained(tmp_path / "new")
    assert config.no_rope_layers == [0, 1, 0, 0] and result.layers == "0,2"
    assert all(check.passed for check in result.checks) and len(result.checks) == 3
    convert(tmp_path / "source", tmp_path / "half", layers=0.5)
    assert AutoConfig.from_pretrained(tmp_path / "half").no_rope_layers == [1, 0, 1, 0]
    save("Gemma3Text", tmp_path / "gemma")
    convert(tmp_path / "gemma", tmp_path / "global", layers="full_attention")
    ropes = AutoConfig.from_pretrained(tmp_path / "global").rope_parameters
    assert ropes["full_attention"]["factor"] == 1e30 and ropes["sliding_attention"]["rope_type"] == "default"


def test_a_multimodal_checkpoint_is_edited_inside(tmp_path):
    save("Gemma3Text", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    text = json.loads(path.read_text())
    path.write_text(
        json.dumps({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text})
    )
    result = convert(tmp_path / "source", tmp_path / "new")
    config = read(tmp_path / "new")
    assert config["text_config"]["rope_parameters"]["sliding_attention"]["factor"] == 1e30
    assert "rope_parameters" not in config and config["drope"]["layers"] == "all"
    assert all(check.passed for check in result.checks)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def only_bin(folder):
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def cut(folder):
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    os.truncate(file, file.stat().st_size - 5)


def missing_shard(folder):
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()


def quantised(folder):
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (only_bin, {}, r"no safetensors weights \(only .*\.bin.*save_pretrained"),
        (cut, {"temperature": 1.1}, r"is cut off: .* bytes of .*Download it again"),
        (missing_shard, {}, r"lists files that do not exist"),
        (quantised, {"temperature": 1.1}, r"stored as I8: a temperature cannot be folded into quantised weights"),
        (lambda folder: edit_config(folder, auto_map={"AutoConfig": "x.y"}), {}, r"runs code of its own \(auto_map\)"),
        (
            lambda folder: edit_config(folder, model_type="gpt2", rope_parameters=None),
            {},
            r"gpt2 models have no `rope_parameters`",
        ),
        (lambda folder: edit_config(folder, model_type="llamma"), {}, r"transformers cannot read .*llamma"),
        (
            lambda folder: edit_config(folder, rope_scaling={"type": "default", "mrope_section": [2, 3, 3]}),
            {},
            r"mrope.*scramble images",
        ),
        (lambda folder: (folder / "config.json").unlink(), {}, r"has no config\.json"),
        (None, {"layers": "0,1"}, r"configuration of llama cannot express which layers.*Use layers all"),
        (None, {"layers": "first"}, r"layers 'first' cannot be read"),
        (None, {"engine": "onnx"}, r"engine 'onnx' is not one of any, gguf"),
        (None, {"max_length": 1}, r"max_length must be at least 2 tokens, got 1"),
        (None, {"temperature": -1.0}, r"temperature must be between 0 and 100 .* got -1"),
        (lambda folder: edit_config(folder, attention_bias=True), {"qk_norm": True}, r"Qwen 3.*has biases"),
    ],
)
def test_refused_with_the_reason_and_nothing_written(source, damage, options, message, tmp_path):
    if damage:
        damage(source)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "new", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_phi3_and_ministral3_have_no_form_for_gguf(tmp_path):
    save("Phi3", tmp_path / "source")
    with pytest.raises(UserError, match=r"cannot express NoPE for phi3.*--rope-freq-scale 1e-30"):
        convert(tmp_path / "source", tmp_path / "new", engine="gguf")


def test_qk_norm_is_for_llama_shaped_models(tmp_path):
    save("Qwen2", tmp_path / "source")
    with pytest.raises(UserError, match=r"qwen2 is not Llama-shaped"):
        convert(tmp_path / "source", tmp_path / "new", qk_norm=True)


def test_a_class_that_does_not_do_what_the_configuration_says_is_refused(source, tmp_path, monkeypatch):
    """The self-check decides: here the configuration keeps one wavelength."""
    original = plan_module.converted_config

    def leaky(*args, **kwargs):
        raw = original(*args, **kwargs)
        raw["rope_scaling"]["low_freq_factor"] = 1.0
        raw["rope_scaling"]["high_freq_factor"] = 4.0
        return raw

    monkeypatch.setattr(plan_module, "converted_config", leaky)
    # some checkpoints do not name their class
    edit_config(source, architectures=None)
    with pytest.raises(UserError, match=r"does not do what the configuration says(.|\n)*FAILED equal to the identity"):
        convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_existing_folder_is_not_touched(source, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists already"):
        convert(source, tmp_path / "new")
    assert hashes(tmp_path / "new").keys() == {"mine.txt"}


@pytest.mark.parametrize("where", ["_carry_files", "_edit_files", "check_folder"])
def test_an_interrupted_conversion_leaves_nothing_and_can_be_repeated(source, where, tmp_path, monkeypatch):
    original = getattr(conversion_module, where)

    def interrupted(*args, **kwargs):
        original(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion_module, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    # what a killed process leaves
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "config.json").write_text("{")
    convert(source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "source"]


def test_undo_refuses_weights_that_are_not_those_of_the_conversion(source, tmp_path):
    convert(source, tmp_path / "new", copy=True)
    file = next((tmp_path / "new").glob("*.safetensors"))
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(3)}, file)
    with pytest.raises(UserError, match=r"is not the file that the conversion wrote"):
        undo(tmp_path / "new", tmp_path / "back")
    assert not (tmp_path / "back").exists()


_CONVERT = """
import resource, sys, time
import torch
from transformers import LlamaForCausalLM
from eaftdrope.drope import convert, conversion
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
convert(sys.argv[1], sys.argv[2], max_length=32768)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.process_time() - started)
"""


def test_seven_billion_parameters_take_seconds_and_no_memory(tmp_path):
    assert make_big(tmp_path / "big") > 13e9
    done = forked.run_source(_CONVERT, tmp_path / "big", tmp_path / "new")
    assert done.code == 0, done.err
    kilobytes, seconds = map(float, done.out.split())
    # beyond torch and transformers themselves
    assert kilobytes < 300 * 1024
    assert seconds < 15

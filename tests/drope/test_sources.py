"""What a source may bring along: published code, YaRN's factor, quantisation, defaults, other towers, damaged files."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from eaftdrope.drope import check_folder, convert, undo
from eaftdrope.drope.temperature import scaled_queries
from eaftdrope.errors import UserError
from tests.drope.architectures import save
from tests.drope.others import save_other
from tests.tiny_run import hashes

IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(3))


def logits(folder, scale=1.0):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad(), scaled_queries(model, scale):
        return model(IDS).logits


def edit(folder, **changes):
    """config.json with these keys; `...` takes one out."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


@pytest.fixture
def llama(tmp_path):
    return save("Llama", tmp_path / "source", num_hidden_layers=2)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6}


@pytest.mark.parametrize("version", [5, 4], ids=["keys of transformers 5", "keys of transformers 4"])
def test_the_attention_factor_of_yarn_is_kept_as_a_temperature(version, tmp_path):
    source = save("Qwen2", tmp_path / "source", num_hidden_layers=2, rope_parameters=YARN)
    if version == 4:
        theta = YARN["rope_theta"]
        scaling = {key: value for key, value in YARN.items() if key != "rope_theta"}
        edit(source, rope_parameters=..., rope_scaling=scaling, rope_theta=theta)
    result = convert(source, tmp_path / "new")
    factor = 0.1 * torch.tensor(4.0).log().item() + 1
    assert result.temperature == pytest.approx(factor**2) and result.trained_length == 16
    assert len(result.notes) == 1 and "--temperature 1 leaves it out" in result.notes[0]
    plain = convert(source, tmp_path / "plain", temperature=1.0)
    assert plain.temperature == 1.0 and "1.296" in plain.notes[0]
    wanted = logits(tmp_path / "plain", factor**2)
    assert (logits(tmp_path / "new") - wanted).abs().max() < 1e-4 < (logits(tmp_path / "plain") - wanted).abs().max()
    undo(tmp_path / "new", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


def test_a_factor_on_part_of_the_dimensions_is_reported_and_not_folded(tmp_path):
    save("GPTNeoX", tmp_path / "source", num_hidden_layers=2, rope_parameters=YARN | {"partial_rotary_factor": 0.25})
    result = convert(tmp_path / "source", tmp_path / "new")
    assert result.temperature == 1.0
    assert result.notes == [
        "the source's rotary embedding came with a temperature of up to 1.296 on the scores, on some of a head's dimensions "
        "only."
    ]


def quantise(folder):
    """As GPTQ stores it: packed weights of the projections, their biases as they are."""
    file, stored = folder / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        rows, columns = tensor.shape
        stem = name.removesuffix("weight")
        stored[f"{stem}qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        stored[f"{stem}scales"] = torch.ones(1, rows).half()
    save_file(stored, file, metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_no_temperature_into_a_quantised_source(method, tmp_path):
    source = save("Qwen2", tmp_path / "source", num_hidden_layers=2)
    quantise(source)
    edit(source, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UserError, match=rf"quantised \({method}\), and a temperature cannot be folded"):
        convert(source, tmp_path / "new", temperature=1.5)
    assert convert(source, tmp_path / "new").temperature == 1.0


def test_no_temperature_where_a_layer_lacks_its_query_projection(tmp_path):
    source = save("Qwen2", tmp_path / "source", num_hidden_layers=2)
    quantise(source)
    with pytest.raises(
        UserError, match=r"does not have self_attn\.q_proj\.weight in each layer, as its class saves it"
    ):
        convert(source, tmp_path / "new", temperature=1.5)
    assert not (tmp_path / "new").exists()


PHI3 = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}


def test_published_code_that_transformers_has_by_now_is_passed_over(tmp_path):
    source = save("Phi3", tmp_path / "source", num_hidden_layers=2)
    edit(source, auto_map={**PHI3, "AutoTokenizer": ["tokenization_x.XTokenizer", None]})
    result = convert(source, tmp_path / "new")
    assert "auto_map" not in json.loads((tmp_path / "new" / "config.json").read_text())
    assert "(auto_map: Phi3Config) is not used" in result.notes[0]
    undo(tmp_path / "new", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoModelForCausalLM": "org/name--modeling_own.OwnForCausalLM"},
        {"AutoTokenizer": ["t.OwnTokenizer", None]},
        "x",
    ],
    ids=["a class of its own", "nothing of the model", "not a mapping"],
)
def test_published_code_that_only_the_source_has_is_refused(auto_map, llama, tmp_path):
    edit(llama, auto_map=auto_map)
    with pytest.raises(UserError, match=r"runs code of its own \(auto_map\).*transformers 5\.\S+ has no class"):
        convert(llama, tmp_path / "new")


def test_a_multimodal_checkpoint_is_checked_on_its_text_part_with_its_weights(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    save("Gemma3Text", tmp_path / "text", num_hidden_layers=2)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    text = AutoConfig.from_pretrained(tmp_path / "text").to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=95)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    result = convert(tmp_path / "source", tmp_path / "new", check_weights=True)
    assert len(result.checks) == 6 and all(check.passed for check in result.checks)
    assert len(check_folder(tmp_path / "new")) == 6
    # the text part's own queries, and none of the vision tower's
    before = load_file(tmp_path / "source" / "model.safetensors")
    convert(tmp_path / "source", tmp_path / "warm", temperature=1.5)
    after = load_file(tmp_path / "warm" / "model.safetensors")
    changed = {name.rsplit("layers.", 1)[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"0.self_attn.q_norm.weight", "1.self_attn.q_norm.weight"}


@pytest.mark.parametrize(
    "options", [{"qk_norm": True}, {"slope_by_position": 1e-4}], ids=["qk_norm", "slope_by_position"]
)
def test_defaults_of_the_source_are_written_out_before_the_class_changes(options, llama, tmp_path):
    edit(llama, max_position_embeddings=..., rms_norm_eps=..., rope_parameters=..., tie_word_embeddings=...)
    own = AutoConfig.from_pretrained(llama)
    result = convert(llama, tmp_path / "new", **options)
    new = AutoConfig.from_pretrained(tmp_path / "new")
    assert result.trained_length == own.max_position_embeddings == 2048
    for key in ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act", "pad_token_id"):
        assert getattr(new, key) == getattr(own, key), key
    assert new.rope_parameters["rope_theta"] == own.rope_parameters["rope_theta"]


def test_the_window_of_a_class_default_is_seen(tmp_path):
    source = save("Mistral", tmp_path / "source", num_hidden_layers=2, sliding_window=4096)
    edit(source, sliding_window=...)
    with pytest.raises(UserError, match=r"its attention has a sliding window"):
        convert(source, tmp_path / "new", qk_norm=True)


NUMBERS = [
    ({"num_key_value_heads": "2"}, r"cannot read .*config\.json.*num_key_value_heads"),
    ({"max_position_embeddings": 64.0}, r"cannot read .*config\.json.*max_position_embeddings"),
    ({"max_position_embeddings": None}, r"max_position_embeddings"),
    ({"rope_scaling": {"type": "my_rope", "factor": 2.0}}, r"no rotary embedding of type 'my_rope'"),
    ({"rope_parameters": {"rope_type": "my_rope", "rope_theta": 1e4}}, r"no rotary embedding of type 'my_rope'"),
    ({"rope_scaling": "linear", "rope_parameters": ...}, r"config\.json"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "two", "rope_theta": 1e4}}, r"llama"),
    ({"model_type": ["llama"]}, r"has no class for model_type \['llama'\]"),
    ({"model_type": ...}, r"has no class for model_type None"),
    ({"text_config": 3}, r"config\.json"),
    ({"text_config": {"model_type": "llama"}}, r"config\.json: llama has no `text_config`"),
    ({"max_position_embeddings": 0}, r"announces a length of 0"),
    ({"num_hidden_layers": 0}, r"has 0 layers"),
    ({"rope_theta": "x", "rope_parameters": ...}, r"no base \(rope_theta\)"),
    ({"drope": 3}, r"`drope` record is not that of a conversion"),
    ({"drope": {"layers": "all"}}, r"`drope` record is not that of a conversion"),
]


@pytest.mark.parametrize(
    ("changes", "message"), NUMBERS, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_a_configuration_that_cannot_be_used_is_one_sentence(changes, message, llama, tmp_path):
    edit(llama, **changes)
    with pytest.raises(UserError, match=message) as caught:
        convert(llama, tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    "content", [b"# Caf\xe9\n", b"---\nlicense: [mit\n---\n\n# Tiny\n", b"---\n- a list\n---\n\n# Tiny\n"]
)
def test_a_card_that_cannot_be_read_does_not_stand_in_the_way(content, llama, tmp_path):
    (llama / "README.md").write_bytes(content)
    result = convert(llama, tmp_path / "new")
    assert len(result.notes) == 1 and "README.md is kept in drope_original only" in result.notes[0]
    assert "DroPE" in (tmp_path / "new" / "README.md").read_text()
    undo(tmp_path / "new", tmp_path / "back")
    assert (tmp_path / "back" / "README.md").read_bytes() == content


def test_targets_that_cannot_be_made(llama, tmp_path, monkeypatch):
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    places = {
        ".": r"is the current folder",
        "..": r"exists already",
        str(tmp_path / "file.txt" / "new"): r"file\.txt/new cannot be written: Not a directory",
        str(tmp_path / "file.txt"): r"exists already",
        str(tmp_path / "link"): r"exists already",
        str(llama): r"exists already|is inside",
        str(llama / "new"): r"is inside",
        "/proc/new": r"/proc/new cannot be written",
    }
    for place, message in places.items():
        with pytest.raises(UserError, match=message):
            convert(llama, place)
    assert os.listdir(tmp_path / "empty") == [] and (tmp_path / "link").is_symlink()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(llama, tmp_path, monkeypatch):
    from eaftdrope.drope import checkpoint

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(checkpoint.shutil, "copy2", full)
    with pytest.raises(UserError, match=r"new cannot be written: No space left on device \(model\.safetensors\)"):
        convert(llama, tmp_path / "new", copy=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_damaged_files_of_the_source(llama, tmp_path):
    weights = (llama / "model.safetensors").read_bytes()

    def refused(message):
        with pytest.raises(UserError, match=message):
            convert(llama, tmp_path / "new")

    (llama / "tokenizer.json").symlink_to(llama / "gone")
    refused(r"is a link to .*gone, which does not exist")
    (llama / "tokenizer.json").unlink()
    for header in (b"[]", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [1]}}', b"\xff"):
        (llama / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        refused(r"is not a safetensors file, or is cut off")
    (llama / "model.safetensors").rename(llama / "model-00001-of-00001.safetensors")
    (llama / "model-00001-of-00001.safetensors").write_bytes(weights)
    for index in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (llama / "model.safetensors.index.json").write_text(index)
        refused(r"has no `weight_map`")
    for config in ("[]", "\ufeff{}", '{"a": ' + "[" * 100_000):
        (llama / "config.json").write_text(config)
        refused(r"config\.json (is not a JSON object|cannot be read)")


def test_a_multimodal_model_whose_positions_are_of_images_by_default(tmp_path):
    from transformers import Qwen3VLConfig

    Qwen3VLConfig().save_pretrained(tmp_path / "source")
    save_file({"weight": torch.zeros(2)}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(UserError, match=r"qwen3_vl_text: .*\(mrope\).*Not converted"):
        convert(tmp_path / "source", tmp_path / "new")


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text", "laguna", "lfm3"])
def test_one_attention_type_keeps_its_rotation(name, tmp_path):
    source = save_other(name, tmp_path / "source")
    result = convert(source, tmp_path / "new", layers="full_attention")
    ropes = AutoConfig.from_pretrained(tmp_path / "new").rope_parameters
    assert ropes["sliding_attention"] == AutoConfig.from_pretrained(source).rope_parameters["sliding_attention"]
    assert ropes["full_attention"]["factor"] == 1e30 and all(check.passed for check in result.checks)
    if name == "lfm3":
        with pytest.raises(UserError, match=r"has no layer of type sliding_attention"):
            convert(source, tmp_path / "other", layers="sliding_attention")

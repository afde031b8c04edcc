"""Merging: the saved folder is the same model as base + adapter, whatever the adapter does to tied embeddings."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaftdrope.checkpoints import merge, output
from eaftdrope.checkpoints.merge import merge_adapter
from eaftdrope.checkpoints.repair_options import Repair
from eaftdrope.cli import main
from eaftdrope.errors import UserError
from tests.tiny_models import SMALLEST, character_tokenizer, tiny_llama

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def _tokenizer(template=TEMPLATE):
    letters = "abcdefghijklmnopqrstuvwxyzTQ0123456789.,:;()'=+?"
    return character_tokenizer(["<s>", "</s>", "<unk>"], letters, template, unk_token="<unk>")


@pytest.fixture
def base(tmp_path):
    """A tied model whose weights are large enough that a wrong head shows."""
    model = tiny_llama(num_key_value_heads=4, vocab_size=64, tie_word_embeddings=True, initializer_range=0.2)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "base")
    _tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _adapter(base, *, train=("lora_", "modules_to_save", "trainable_tokens"), reference=None, **lora):
    """Save an adapter with random weights in the parameters whose names contain one of `train`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "r": 4, **lora}
    adapted = get_peft_model(model, LoraConfig(**lora))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and any(part in name for part in train):
                parameter += 0.1 * torch.randn_like(parameter)
    folder = base.parent / "adapter"
    adapted.save_pretrained(folder)
    if reference:
        _edit(folder, base_model_name_or_path=reference)
    return folder


def _edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


def _live(base, adapter):
    """Base + adapter, with a head of its own so that nothing an adapter does to the embeddings leaks into it."""
    return _logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter))


def _tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_merged_folder_is_an_ordinary_checkpoint(base, tmp_path):
    adapter = _adapter(base)
    output = tmp_path / "deep" / "merged"
    report = merge_adapter(adapter, output)
    model, loaded = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(loaded[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (_logits(model) - _live(base, adapter)).abs().max() <= 1e-5
    # The adapter does change the model: the comparison above could fail.
    assert (_logits(AutoModelForCausalLM.from_pretrained(base)) - _live(base, adapter)).abs().max() > 0.1
    assert model.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(output).chat_template == TEMPLATE
    assert (report.output_dir, report.base_model, report.dtype) == (str(output), str(base), "float32")
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.max_abs_difference <= 1e-5 and abs(report.kl) <= 1e-9
    assert not report.untied
    assert [path.name for path in output.parent.iterdir()] == ["merged"]


def test_the_adapters_own_tokenizer_and_generation_config_win(base, tmp_path):
    adapter = _adapter(base)
    _tokenizer("{{ messages[0]['content'] }}").save_pretrained(adapter)
    (adapter / "generation_config.json").write_text('{"max_new_tokens": 9}')
    merge_adapter(adapter, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages[0]['content'] }}"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.max_new_tokens == 9


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft warns of every one of these
@pytest.mark.parametrize(
    ("options", "untied"),
    [
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, False),
        ({"trainable_token_indices": [3, 4]}, False),
        # An untouched copy of the head is the embeddings still: it must not be stored twice.
        ({"modules_to_save": ["lm_head"], "train": ("lora_",)}, False),
    ],
    ids=lambda value: str(value).translate({ord(c): None for c in "{}[]'"}) if isinstance(value, dict) else "",
)
def test_tied_embeddings(base, tmp_path, options, untied):
    adapter = _adapter(base, **options)
    live = _live(base, adapter)
    report = merge_adapter(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (_logits(merged) - live).abs().max() <= 1e-5
    assert report.untied == untied
    # What other loaders go by: the configuration and the tensors in the file.
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] == (not untied)
    tensors = _tensors(tmp_path / "merged")
    assert ("lm_head.weight" in tensors) == untied
    if untied:
        assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_without_the_separation_the_check_refuses_and_leaves_nothing(base, tmp_path, monkeypatch):
    adapter = _adapter(base, target_modules=["q_proj", "embed_tokens"])
    monkeypatch.setattr(merge, "_separate_tied_head", lambda model: False)
    with pytest.raises(UserError, match=r"changes the model: its logits differ by [\d.]+ from base \+ adapter"):
        merge_adapter(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_lost_in_saving_is_noticed_and_leaves_nothing(base, tmp_path, monkeypatch):
    adapter = _adapter(base, modules_to_save=["lm_head"])

    def tie(model):  # what a loader does that believes the base's configuration
        model.config.tie_word_embeddings = True
        return False

    save = merge._save

    def save_tied(model, *arguments):
        head = model.lm_head.weight
        model.lm_head.weight = model.model.embed_tokens.weight
        save(model, *arguments)
        model.lm_head.weight = head

    monkeypatch.setattr(merge, "_tie_head_if_equal", tie)
    monkeypatch.setattr(merge, "_save", save_tied)
    with pytest.raises(UserError, match=r"changes on saving: reloaded from disk its logits differ by [\d.]+ "):
        merge_adapter(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_half_precision_reports_the_rounding(base, tmp_path):
    adapter = _adapter(base)
    report = merge_adapter(adapter, tmp_path / "merged", dtype="bfloat16")
    assert report.dtype == "bfloat16"
    assert {tensor.dtype for tensor in _tensors(tmp_path / "merged").values()} == {torch.bfloat16}
    assert 1e-4 < report.max_abs_difference < 0.5
    assert 0 < report.kl < 0.01


def test_the_base_models_own_dtype_is_the_default(base, tmp_path):
    adapter = _adapter(base)
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    assert merge_adapter(adapter, tmp_path / "merged").dtype == "bfloat16"


def test_an_empty_output_folder_is_fine_and_a_killed_merge_is_cleared_away(base, tmp_path):
    adapter = _adapter(base)
    (tmp_path / "merged").mkdir()
    (tmp_path / ".merged.partial").mkdir()
    (tmp_path / ".merged.partial" / "stale.safetensors").write_text("")
    merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / ".merged.partial").exists()
    assert not (tmp_path / "merged" / "stale.safetensors").exists()


def test_not_an_adapter(base, tmp_path):
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-5" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()

    def refused(folder):
        with pytest.raises(UserError) as error:
            merge_adapter(folder, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return str(error.value)

    missing, run, empty = tmp_path / "missing", tmp_path / "run", tmp_path / "empty"
    assert (
        refused(missing) == f"the folder {missing} does not exist. Pass the folder that contains adapter_config.json."
    )
    assert refused(base).startswith(f"{base} is a full model, not an adapter: it needs no merging.")
    assert refused(run) == (
        f"{run} is not an adapter: it has no adapter_config.json. Did you mean {run / 'checkpoint-5'}?"
    )
    assert (
        refused(empty) == f"{empty} is not an adapter: it has no adapter_config.json. Pass the folder that contains it."
    )
    assert refused(run / "checkpoint-5") == (
        f"{run / 'checkpoint-5'} has an adapter_config.json but no adapter_model.safetensors. "
        "Was its saving interrupted? Use an earlier checkpoint."
    )


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_occupied_output_is_refused(base, tmp_path, kind):
    adapter = _adapter(base)
    output = tmp_path / "merged"
    if kind == "folder":
        output.mkdir()
        (output / "mine.txt").write_text("keep")
    else:
        output.write_text("keep")
    with pytest.raises(UserError) as error:
        merge_adapter(adapter, output)
    assert str(error.value) == (
        f"the output {output} already exists and is not empty. Choose a new folder, or remove it."
    )
    assert (output / "mine.txt" if kind == "folder" else output).read_text() == "keep"


def test_a_quantised_base_is_refused(base, tmp_path):
    adapter = _adapter(base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        merge_adapter(adapter, tmp_path / "merged")
    assert str(error.value) == (
        f"the base model {str(base)!r} is quantised (bitsandbytes): merged into rounded weights, the adapter would be "
        f"rounded away. Set `base_model_name_or_path` of {adapter / 'adapter_config.json'} to the unquantised model, "
        "or use the adapter with peft."
    )


def test_other_refusals(base, tmp_path):
    adapter = _adapter(base)

    def refused(**options):
        with pytest.raises(UserError) as error:
            merge_adapter(adapter, tmp_path / "merged", **options)
        return str(error.value)

    assert refused(dtype="int8") == "dtype 'int8' is not one of float32, bfloat16, float16."
    _edit(adapter, base_model_name_or_path=None)
    assert refused() == (f"{adapter / 'adapter_config.json'} has no base model. Set `base_model_name_or_path` in it.")
    tiny_llama(**SMALLEST, vocab_size=64).save_pretrained(tmp_path / "other")
    _tokenizer().save_pretrained(tmp_path / "other")
    _edit(adapter, base_model_name_or_path=str(tmp_path / "other"))
    assert refused().startswith(f"{adapter} does not fit its base model: size mismatch for ")
    (adapter / "adapter_config.json").write_text("{")
    assert refused().startswith(f"the adapter cannot be loaded: {adapter / 'adapter_config.json'} is not valid JSON (")


def test_prompt_tuning_is_refused(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "p"
    )
    with pytest.raises(
        UserError, match="is a PROMPT_TUNING adapter: it adds tokens or a path of its own, and has no weights"
    ):
        merge_adapter(tmp_path / "p", tmp_path / "merged")


def test_a_broken_adapter_is_refused(base, tmp_path):
    adapter = _adapter(base)
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"cannot be merged: NaNs detected .* Use an earlier checkpoint\."):
        merge_adapter(adapter, tmp_path / "merged")


def test_a_full_disk_is_noticed_before_writing(base, tmp_path, monkeypatch):
    adapter = _adapter(base)
    usage = output.shutil.disk_usage(tmp_path)._replace(free=5_000_000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError) as error:
        merge_adapter(adapter, tmp_path / "merged")
    assert str(error.value) == (
        f"the merged model needs 68 MB in {tmp_path}, which has 5 MB free. Free some space, or choose a folder on another "
        "disk."
    )


# ---- a share of the way ----


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_of_an_adapter(base, tmp_path, share):
    adapter = _adapter(base)
    merge_adapter(adapter, tmp_path / "whole")
    merge_adapter(adapter, tmp_path / "part", repair=Repair(share))
    start, end, found = _tensors(base), _tensors(tmp_path / "whole"), _tensors(tmp_path / "part")
    for name, weight in found.items():
        torch.testing.assert_close(weight, start[name] + share * (end[name] - start[name]), rtol=0, atol=1e-6)
    assert any((end[name] - start[name]).abs().max() > 0.01 for name in end)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_without_a_line_to_its_base_is_refused(base, tmp_path, options, why):
    with pytest.raises(UserError, match=f"an adapter with {why} cannot be scaled towards its base model"):
        merge_adapter(_adapter(base, **options), tmp_path / "merged", repair=Repair(0.5))
    assert not (tmp_path / "merged").exists()


def _command(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["merge", *map(str, arguments)])
    return ended.value.code


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_verb_reports_what_was_written_and_checked(base, tmp_path, capsys):
    adapter = _adapter(base, modules_to_save=["lm_head"])
    output = tmp_path / "merged"
    assert _command(adapter, output, "--dtype", "bfloat16") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"merged     {adapter} into {base}"
    assert lines[1] == f"written    {output}: 0.0 M parameters in bfloat16"
    assert lines[2].startswith("checked    reloaded logits differ from the live model's by at most ")
    assert lines[2].endswith(" nats (rounding of the weights included)")
    assert lines[3].startswith("untied     ")
    assert _command(adapter, output) == 2
    assert capsys.readouterr().err == (
        f"the output {output} already exists and is not empty. Choose a new folder, or remove it.\n"
    )

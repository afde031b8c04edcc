"""Models repaired file by file: the same as in memory, and bit by bit where nothing is removed."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaftdrope.checkpoints import spectrum, tensor_files
from eaftdrope.checkpoints.repair_options import Repair
from eaftdrope.checkpoints.streamed import repair_files
from eaftdrope.errors import UserError
from tests.checkpoints.test_merge import TEMPLATE, _adapter, _command, _tensors, _tokenizer, base  # noqa: F401
from tests.checkpoints.test_spectrum import plain
from tests.tiny_models import tiny_llama


@pytest.fixture
def trained(base, tmp_path):  # noqa: F811
    """A model whose weights were all moved, saved with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
            if parameter.ndim == 2:
                parameter += torch.randn(len(parameter), 1) @ torch.randn(1, parameter.shape[1])
    model.save_pretrained(tmp_path / "trained")
    _tokenizer().save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "run.json").write_text("{}")
    return tmp_path / "trained"


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_model_is_drawn_back_on_the_line_to_its_base(base, trained, tmp_path, share):  # noqa: F811
    report = repair_files(trained, str(base), tmp_path / "drawn", Repair(share))
    start, end, found = _tensors(base), _tensors(trained), _tensors(tmp_path / "drawn")
    assert found.keys() == end.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, start[name] + share * (end[name] - start[name]), rtol=0, atol=1e-6)
        if share in (0.0, 1.0):
            assert torch.equal(weight, (end if share else start)[name])
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "drawn", output_loading_info=True)
    assert not any(loaded[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "drawn").chat_template == TEMPLATE
    assert (report.base_model, report.dtype, report.tensors) == (str(base), "float32", len(end))
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not (tmp_path / "drawn" / "run.json").exists()


def test_denoise_and_restore_in_several_files_and_blocks(base, trained, tmp_path, monkeypatch):  # noqa: F811
    """Against a plain decomposition and a plain copy, with files and blocks that are far smaller than a tensor."""
    AutoModelForCausalLM.from_pretrained(trained).save_pretrained(trained, max_shard_size="20KB")
    (trained / "model.safetensors").unlink()
    for module in (tensor_files, spectrum):
        monkeypatch.setattr(module, "_BLOCK_BYTES", 1500)
    progress = []
    report = repair_files(
        trained,
        str(base),
        tmp_path / "repaired",
        Repair(denoise=True, restore=("k_proj", "norm")),
        progress=lambda done, total: progress.append((done, total)),
    )
    index = json.loads((tmp_path / "repaired" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((trained / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    start, end, found = _tensors(base), {}, {}
    for name in files:
        end |= load_file(trained / name)
        found |= load_file(tmp_path / "repaired" / name)
    kept = {one.tensor: one for one in report.kept}
    for name, weight in found.items():
        if "k_proj" in name or name == "model.norm.weight":
            assert torch.equal(weight, start[name]) and kept[name].norm == 0
        elif weight.ndim == 1:
            assert torch.equal(weight, end[name]) and kept[name].norm == 1
        else:
            change, count = plain(end[name] - start[name])
            torch.testing.assert_close(weight.double(), start[name] + change, rtol=0, atol=1e-5)
            assert kept[name].spectrum.kept == count and 0 < kept[name].norm < 1
    assert progress[-1] == (report.parameters, report.parameters)
    AutoModelForCausalLM.from_pretrained(tmp_path / "repaired")


def test_types_are_kept_unless_one_is_set(base, trained, tmp_path):  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(trained)
    before = _tensors(trained)
    report = repair_files(trained, str(base), tmp_path / "own", Repair(0.5))
    found, start = _tensors(tmp_path / "own"), _tensors(base)
    assert report.dtype == "bfloat16, float32"
    for name, weight in found.items():
        assert weight.dtype == before[name].dtype
        middle = start[name] + 0.5 * (before[name].float() - start[name])
        torch.testing.assert_close(weight, middle.to(weight.dtype), rtol=1e-2, atol=1e-4)
    repair_files(trained, str(base), tmp_path / "half", Repair(0.5), dtype="float16")
    assert {weight.dtype for weight in _tensors(tmp_path / "half").values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_a_head_that_only_one_of_the_files_has(base, trained, tmp_path):  # noqa: F811
    """Tied models from elsewhere store the head as well; a model that was untied by its training has no counterpart."""
    model = AutoModelForCausalLM.from_pretrained(trained)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1.0)
    model.save_pretrained(trained)
    repair_files(trained, str(base), tmp_path / "drawn", Repair(0.5))
    found, end, start = _tensors(tmp_path / "drawn"), _tensors(trained), _tensors(base)
    middle = 0.5 * (end["lm_head.weight"] + start["model.embed_tokens.weight"])
    torch.testing.assert_close(found["lm_head.weight"], middle, rtol=0, atol=1e-6)
    # and the other way round
    report = repair_files(base, str(trained), tmp_path / "back", Repair(1.0))
    assert report.tensors == len(start)


def test_what_cannot_be_repaired_is_refused(base, trained, tmp_path):  # noqa: F811
    def refused(match, model=trained, start=base, **options):
        with pytest.raises(UserError, match=match):
            repair_files(model, str(start), tmp_path / "new", Repair(**options))
        assert not (tmp_path / "new").exists()

    for share in (-0.1, 1.01, float("nan")):
        refused("is not between 0", share=share)
    for name, changes in {"other": {"intermediate_size": 48}, "deeper": {"num_hidden_layers": 3}}.items():
        sizes = {"num_key_value_heads": 4, "vocab_size": 64, "tie_word_embeddings": True, **changes}
        tiny_llama(**sizes).save_pretrained(tmp_path / name)
        refused(
            rf"was not trained from '.*{name}': \d+ of their tensors differ in name, shape or type",
            start=tmp_path / name,
            share=0.5,
        )
    refused(r"restore q_porj: .*trained has no such module. Did you mean `q_proj`", restore=("q_porj",))
    with safe_open(trained / "model.safetensors", "pt") as file:
        names = list(file.keys())
    tensors = _tensors(trained)
    tensors[names[0]][0] = float("nan")
    model = AutoModelForCausalLM.from_pretrained(trained)
    model.load_state_dict(tensors, strict=False)
    model.save_pretrained(tmp_path / "diverged")
    _tokenizer().save_pretrained(tmp_path / "diverged")
    refused("has values that are not numbers", model=tmp_path / "diverged", denoise=True)
    (trained / "model.safetensors").rename(trained / "pytorch_model.bin")
    refused("only weights in safetensors are read tensor by tensor", share=0.5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_verb_repairs_models_and_adapters(base, trained, tmp_path, capsys):  # noqa: F811
    options = ("--share", "0.25", "--denoise", "--restore", "q_proj,k_proj")
    assert _command(trained, tmp_path / "drawn", *options, "--base", base) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"read       {trained} and {base}"
    assert lines[2:5] == [
        "share      0.25 of the way from the base model",
        "denoised   singular values of each change below the Donoho-Gavish threshold were removed",
        "restored   q_proj, k_proj of the base model",
    ]
    assert any("q_proj.weight" in line and "0.0%" in line for line in lines)
    assert any("up_proj.weight" in line and "1 of 32" in line for line in lines)
    kept = json.loads((tmp_path / "drawn" / "repair.json").read_text())
    assert {one["tensor"] for one in kept} == _tensors(trained).keys()
    adapter = _adapter(base)
    assert _command(adapter, tmp_path / "merged", *options[:3]) == 0
    assert "| of 4" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "merged" / "repair.json").read_text())) == 4
    for arguments, message in (
        ((adapter, "--base", base), "is an adapter, and its configuration has the base model: remove --base."),
        ((adapter, "--share", "0.25", "--revision", "main"), "--revision belongs to --base"),
        ((trained, "--denoise"), "move it towards the model it was trained from: --share 0.5 --base MODEL."),
        ((trained, "--restore", " , ", "--base", base), "--restore: pass at least one module"),
    ):
        assert _command(arguments[0], tmp_path / "refused", *arguments[1:]) == 2
        assert message in capsys.readouterr().err

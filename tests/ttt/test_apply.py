"""What TTT adds to a stock model, and that it leaves it again; the folder that it is saved in."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eaftdrope import UserError, apply_ttt, remove_ttt
from eaftdrope.ttt import TTTConfig, TTTState, is_ttt, load_ttt, save_ttt
from tests.ttt.tiny import (
    CLASSES,
    WINDOWS,
    add_ttt,
    assert_same_gradients,
    gradients,
    nll_of,
    random_ids,
    read,
    stock_model,
    tiny,
    tiny_sliding,
)


def attributes(model):
    """Everything that a module and its parts hold: attributes, parameters, buffers, hooks."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[name, key] = dict(value) if isinstance(value, dict) else value
    return found


@pytest.mark.parametrize("layout", ["prime", "in_place"])
@pytest.mark.parametrize("kind", CLASSES)
def test_removed_it_leaves_the_model_bit_for_bit(kind, layout):
    ids = random_ids()
    model = stock_model(kind)
    with torch.no_grad():
        expected = model(ids).logits
    before, weights = attributes(model), {name: value.clone() for name, value in model.state_dict().items()}
    add_ttt(model, layout=layout)
    assert is_ttt(model)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, expected)
    read(model, ids, 4)
    assert remove_ttt(model) is model and not is_ttt(model)
    after = attributes(model)
    assert after.keys() == before.keys()
    changed = [key for key, value in before.items() if not (after[key] is value or after[key] == value)]
    assert changed == []
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
        generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, stock_model(kind).generate(ids, max_new_tokens=3, do_sample=False))


def test_applied_again_after_it_was_removed():
    ids = random_ids()
    model = remove_ttt(tiny())
    with torch.no_grad():
        assert torch.equal(add_ttt(model)(ids).logits, tiny()(ids).logits)


def test_twice_and_never():
    model = tiny()
    with pytest.raises(UserError, match="already"):
        apply_ttt(model, TTTConfig(window=6, chunk=5))
    with pytest.raises(UserError, match="not applied"):
        remove_ttt(stock_model())


@pytest.mark.parametrize("layout", ["prime", "in_place"])
def test_the_fast_weights_are_those_of_the_last_blocks(layout):
    model = tiny(layout=layout, zero=True, fast_blocks=None)
    # a quarter of four blocks
    assert model.ttt.fast_blocks == 1
    mlp = model.model.layers[3].mlp
    gate, up, down = model.ttt.w0()
    assert torch.equal(gate, mlp.gate_proj.weight) and torch.equal(up, mlp.up_proj.weight)
    if layout == "in_place":
        assert down is mlp.down_proj.weight and len(model.ttt.primes) == 0
    else:
        assert down.shape == mlp.down_proj.weight.shape and not down.any()
        assert torch.equal(model.ttt.primes[0].norm.weight, model.model.layers[3].post_attention_layernorm.weight)
        # copies: training one leaves the other
        assert gate.data_ptr() != mlp.gate_proj.weight.data_ptr()
    assert all(weight.requires_grad for weight in model.ttt.w0())


def test_keys_of_the_checkpoint_stay_as_they_are():
    stock, model = stock_model(), tiny()
    added = set(model.state_dict()) - set(stock.state_dict())
    assert set(stock.state_dict()) < set(model.state_dict())
    assert added and all(name.startswith("ttt.") for name in added)


# The saved folder


@pytest.mark.parametrize("layout", ["prime", "in_place"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_saved_folder_loads_bit_for_bit(tmp_path, kind, layout):
    model, ids = tiny(kind, dtype=torch.float32, layout=layout), random_ids()
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = load_ttt(str(tmp_path), dtype=torch.float32).eval()
    assert type(loaded) is type(model) and loaded.ttt.config == model.ttt.config
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    ours = dict(model.state_dict())
    assert loaded.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in loaded.state_dict().items())


def test_stock_transformers_in_this_process_loads_the_model_without_ttt(tmp_path):
    stock, ids = stock_model(dtype=torch.float32), random_ids()
    tiny(dtype=torch.float32).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(loaded) is type(stock) and not is_ttt(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, stock(ids).logits)


STOCK = """
import importlib.abc, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "eaftdrope":
            raise ImportError("eaftdrope is not installed here")
sys.meta_path.insert(0, Refuse())
import torch, transformers
result = {}
for folder in sys.argv[2:]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    with torch.no_grad():
        logits = model.eval()(torch.load(sys.argv[1])).logits
    torch.save(logits, folder + "/found.pt")
    result[folder] = [type(model).__name__, wrong]
print(json.dumps({"folders": result, "eaftdrope": [name for name in sys.modules if name.startswith("eaftdrope")]}))
"""


def test_stock_transformers_without_eaftdrope_loads_the_model_without_ttt(tmp_path):
    """A fresh process in which eaftdrope cannot be imported; every form of a folder at once."""
    ids = random_ids()
    torch.save(ids, tmp_path / "ids.pt")
    options = dict(dtype=torch.float32)
    models = {
        "prime": (tiny(**options), stock_model(**options)),
        "in_place": (tiny("llama", layout="in_place", **options), stock_model("llama", **options)),
        "sliding": (tiny_sliding("llama", **options), remove_ttt(tiny_sliding("llama", **options))),
    }
    for name, (model, _) in models.items():
        model.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in models]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "ids.pt"), *folders], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["eaftdrope"] == []
    for name, (_, stock) in models.items():
        assert result["folders"][str(tmp_path / name)] == [type(stock).__name__, {}], name
        with torch.no_grad():
            # another process may have another number of threads
            assert (torch.load(tmp_path / name / "found.pt") - stock(ids).logits).abs().max() < 1e-6, name


def test_what_ttt_adds_is_two_files_of_its_own(tmp_path):
    model = tiny(dtype=torch.float32)
    model.save_pretrained(tmp_path / "whole")
    save_ttt(model, tmp_path / "added")
    assert sorted(path.name for path in (tmp_path / "added").iterdir()) == ["ttt.safetensors", "ttt_config.json"]
    for name in ("ttt.safetensors", "ttt_config.json"):
        assert (tmp_path / "added" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    main = load_file(tmp_path / "whole" / "model.safetensors")
    assert not [name for name in main if "ttt" in name or "prime" in name]
    settings = json.loads((tmp_path / "added" / "ttt_config.json").read_text())
    assert (settings["window"], settings["sink"], settings["chunk"]) == (6, 2, 5)


def test_a_folder_in_bfloat16(tmp_path):
    model, ids = tiny(dtype=torch.bfloat16), random_ids()
    model.save_pretrained(tmp_path)
    # from_pretrained keeps the tables of rotations in float32, which `to` does not
    one, two = (load_ttt(str(tmp_path), dtype=torch.bfloat16).eval() for _ in range(2))
    assert {parameter.dtype for parameter in one.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)
        assert torch.equal(read(one, ids, 5), read(two, ids, 5))
        assert (one(ids).logits - model(ids).logits).abs().max() < 0.1


# PEFT


@pytest.mark.parametrize("horizon", [1, None])
def test_lora_on_top_leaves_every_bit_and_trains(horizon):
    ids = random_ids()
    model = tiny(horizon=horizon)
    with torch.no_grad():
        expected = model(ids).logits
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        assert torch.equal(peft(ids).logits, expected)
        assert torch.equal(peft(ids, past_key_values=TTTState(peft)).logits, read(model, ids, 23))
    assert is_ttt(peft)
    model.ttt.requires_grad_(True)
    found = gradients(peft, nll_of(peft(ids).logits, ids).mean())
    trained = [name for name in found if found[name].any()]
    assert any("lora_B" in name for name in trained) and any("primes" in name for name in trained)
    assert not any("base_layer" in name or "embed" in name for name in trained)


def test_lora_below():
    """Applied to a PeftModel whose adapter is not zero: equal to the merged model."""
    ids = random_ids()

    def adapted():
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(stock_model(), config)

    peft = add_ttt(adapted())
    merged = add_ttt(adapted().merge_and_unload())
    with torch.no_grad():
        assert (peft(ids).logits - merged(ids).logits).abs().max() < 1e-12
        assert (read(peft, ids, 3) - merged(ids).logits).abs().max() < 1e-12
    remove_ttt(peft)
    assert not is_ttt(peft)


# Gradient checkpointing of transformers


@pytest.mark.parametrize("horizon", [1, None])
@pytest.mark.parametrize("window", WINDOWS)
def test_gradient_checkpointing_of_the_model_changes_no_bit(window, horizon):
    """Blocks that learn keep their cache, which transformers' wrapper would drop without a word."""
    ids = random_ids()
    found = []
    for enabled in (False, True):
        model = WINDOWS[window](horizon=horizon).train()
        if enabled:
            model.gradient_checkpointing_enable()
        found.append(gradients(model, nll_of(model(ids).logits, ids).mean()))
        assert model.is_gradient_checkpointing is enabled
    assert_same_gradients(found[1], found[0], 0)

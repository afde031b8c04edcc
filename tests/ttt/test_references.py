"""A model with TTT by its reference: saved with TTT, an adapter, or any other; and the verbs that would leave TTT out."""

import pytest
import torch

from eaftdrope import apply_ttt
from eaftdrope.cli import main
from eaftdrope.errors import UserError
from eaftdrope.models import load_model
from eaftdrope.ttt import TTTConfig, TTTState, is_ttt, save_ttt, sequence_nll
from eaftdrope.ttt.loading import find_ttt
from tests.tiny_models import byte_tokenizer, save_model

CONFIG = TTTConfig(window=16, sink=2, chunk=8, fast_blocks=1, lr=0.5)
IDS = torch.randint(4, 260, (1, 50), generator=torch.Generator().manual_seed(1))


def trained(model):
    """TTT applied, and prime MLPs that are not as they begin."""
    apply_ttt(model, CONFIG)
    torch.manual_seed(5)
    with torch.no_grad():
        for prime in model.ttt.primes:
            prime.down.normal_(0, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain model, one saved with TTT, and an adapter with TTT on the plain one; the losses of the last two."""
    from peft import LoraConfig, get_peft_model

    home = tmp_path_factory.mktemp("models")
    save_model(home / "plain")
    model = trained(load_model(str(home / "plain")))
    model.save_pretrained(home / "with_ttt")
    byte_tokenizer().save_pretrained(home / "with_ttt")
    torch.manual_seed(6)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(home / "plain")
    adapted.save_pretrained(home / "adapter")
    save_ttt(adapted, home / "adapter")
    losses = {"adapter": sequence_nll(adapted, IDS)}
    with adapted.disable_adapter():
        losses["with_ttt"] = sequence_nll(adapted, IDS)
    return home, losses


@pytest.mark.parametrize("name", ["with_ttt", "adapter"])
def test_what_was_saved_with_ttt_is_used_as_it_was(folders, name):
    home, losses = folders
    source = find_ttt(str(home / name), {})
    assert (source.config, source.naive) == (CONFIG, False)
    model = source.load("float32", "cpu")
    assert torch.equal(sequence_nll(model, IDS), losses[name])
    assert not torch.equal(losses["with_ttt"], losses["adapter"])
    assert source.tokenizer()("a").input_ids == byte_tokenizer()("a").input_ids


def test_any_other_model_is_used_with_naive_ttt(folders):
    home, _ = folders
    source = find_ttt(str(home / "plain"), {"window": 16, "chunk": 8, "lr": 0.1})
    assert (source.config, source.naive) == (TTTConfig(window=16, chunk=8, lr=0.1), True)
    model = source.load("float32", "cpu")
    assert is_ttt(model) and not model.training
    # prime MLPs begin at zero: until the first update it is the plain model
    plain = load_model(str(home / "plain")).eval()
    with torch.no_grad():
        expected = plain(IDS).logits[0, :8].log_softmax(-1).gather(1, IDS[0, 1:9, None])[:, 0]
    found = sequence_nll(model, IDS)[0]
    assert (found[:8] + expected).abs().max() < 1e-5


def test_only_some_settings_may_differ_from_those_that_were_saved(folders):
    home, _ = folders
    source = find_ttt(str(home / "with_ttt"), {"lr": 0.25, "window": 16})
    assert source.config.lr == 0.25
    assert source.load("float32", "cpu").ttt.config.lr == 0.25
    with pytest.raises(UserError, match=r"was saved with window=16, chunk=8 in its ttt_config\.json"):
        find_ttt(str(home / "with_ttt"), {"window": 32, "chunk": 4})
    with pytest.raises(UserError, match="chunk=99 with window=16"):
        find_ttt(str(home / "plain"), {"window": 16, "chunk": 99})


def test_a_state_brings_the_settings_of_naive_ttt(folders, tmp_path):
    home, _ = folders
    source = find_ttt(str(home / "plain"), {"window": 16, "chunk": 8, "lr": 0.1})
    model = source.load("float32", "cpu")
    state = TTTState(model)
    with torch.no_grad():
        model(IDS, past_key_values=state, use_cache=True)
    file = tmp_path / "state.safetensors"
    state.save(file)
    again = find_ttt(str(home / "plain"), {}, file)
    assert again.config == source.config
    assert again.state(model, file).position == 50
    assert find_ttt(str(home / "plain"), {"lr": 0.2}, file).config.lr == 0.2
    with pytest.raises(UserError, match="is a state of another model: the settings"):
        find_ttt(str(home / "plain"), {"window": 32}, file).state(
            find_ttt(str(home / "plain"), {"window": 32}, file).load("float32", "cpu"), file
        )
    (tmp_path / "other").write_text("text")
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        find_ttt(str(home / "plain"), {}, tmp_path / "other")
    with pytest.raises(UserError, match="is not a state of test-time training"):
        find_ttt(str(home / "plain"), {}, home / "with_ttt" / "ttt.safetensors")


@pytest.mark.parametrize("name", ["with_ttt", "adapter"])
@pytest.mark.parametrize("verb", [["eval"], ["context", "--probes", "perplexity"], ["drope", "temperature"]])
def test_verbs_refuse_a_model_that_they_would_measure_without_its_ttt(folders, name, verb, tmp_path, capsys):
    if name == "adapter" and verb != ["eval"]:
        pytest.skip("refuses every adapter")
    home, _ = folders
    with pytest.raises(SystemExit) as stop:
        main([*verb, str(home / name), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert f"model '{home / name}' has a ttt_config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

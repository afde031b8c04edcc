"""For every architecture named: a converted checkpoint is the same weights with the rotation replaced by the identity.

The reference patches each model file's own `apply_rotary_pos_emb`, a path that the converter's self-check does not take.
"""

import contextlib
import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from eaftdrope.drope import check_folder, convert
from eaftdrope.drope.temperature import scaled_queries
from eaftdrope.errors import UserError
from eaftdrope.versions import TRANSFORMERS
from tests.drope.architectures import ARCHITECTURES, LENGTH, save
from tests.drope.others import save_other


@contextlib.contextmanager
def identity_functions(model):
    """`apply_rotary_pos_emb` of the model's own file gives queries and keys back."""
    module = sys.modules[type(model).__module__]
    original = module.apply_rotary_pos_emb
    module.apply_rotary_pos_emb = lambda q, k, *args, **kwargs: (q, k)
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = original


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folders(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder / "source")
    result = convert(folder / "source", folder / "converted", max_length=4 * LENGTH)
    return folder / "source", folder / "converted", result


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_are_those_of_the_identity_rotation(folders, dtype, tmp_path):
    source, converted, _ = folders
    ids = torch.randint(3, 96, (2, 3 * LENGTH), generator=torch.Generator().manual_seed(1))
    original, new = load(source, dtype), load(converted, dtype)
    # Ministral-3's own temperature stays, by position in units of the original length: the same in both
    with torch.no_grad(), identity_functions(original):
        wanted = original(ids).logits
    with torch.no_grad():
        assert torch.equal(new(ids).logits, wanted)
        assert not torch.equal(original(ids).logits, wanted), "the rotation did nothing before"
        new.save_pretrained(tmp_path)
        assert torch.equal(load(tmp_path, dtype)(ids).logits, wanted), "after saving and loading again"


def test_generation_with_cache_goes_past_the_trained_length(folders):
    source, converted, _ = folders
    prompt = torch.randint(3, 96, (1, LENGTH - 8), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    original, new = load(source), load(converted)
    with identity_functions(original):
        wanted = original.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(new.generate(prompt, attention_mask=torch.ones_like(prompt), **options), wanted)
    assert wanted.shape[1] > LENGTH


def test_the_self_check_passed_and_says_so(folders):
    result = folders[2]
    assert [check.passed for check in result.checks] == [True] * 6
    assert {check.name.split(",")[0] for check in result.checks} == {
        "equal to the identity rotation",
        "control: differs from the rotation as it was",
        "unchanged by a shift of positions",
        "one layer does not see the order of tokens",
    }
    # Ministral-3's rotary embedding is a stretched one of 16 tokens
    assert result.max_length == 4 * LENGTH and result.trained_length in (LENGTH, 16)


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "GPTNeoX"])
def test_the_self_check_on_the_weights_themselves(name, tmp_path):
    save(name, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "converted")
    checks = check_folder(tmp_path / "converted", weights=True)
    assert all(check.passed for check in checks) and len(checks) == 6


# hybrids, MLA, complex rotations, values layer by layer, norms behind the rotation; and whether a temperature can be folded
AWKWARD = {
    "llama4_text": False,
    "deepseek_v2": True,
    "deepseek_v3": True,
    "minimax": True,
    "diffllama": True,
    "bamba": True,
    "falcon_h1": True,
    "olmo_hybrid": True,
    "gemma3n_text": True,
    "gemma4_text": True,
    "qwen3_next": True,
    "laguna": True,
    "mimo_v2_flash": True,
    "hunyuan_v1_dense": True,
    "lfm3": True,
    "phimoe": True,
    "granite_swa": True,
    "nanochat": False,
    "jetmoe": False,
}


@contextlib.contextmanager
def identity_outputs(model):
    """What the rotary modules return, without its rotation."""

    def straight(module, args, output):
        if isinstance(output, torch.Tensor):
            return torch.ones_like(output)
        return torch.ones_like(output[0]), torch.zeros_like(output[1])

    modules = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    handles = [module.register_forward_hook(straight) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_classes_convert_to_the_last_bit(name, tmp_path):
    # the pinned release has all of them
    if TRANSFORMERS < (5, 23) and name not in CONFIG_MAPPING:
        pytest.skip("the installed transformers is older than this architecture")
    source = save_other(name, tmp_path / "source")
    if name == "gemma4_text" and not hasattr(PretrainedConfig, "is_heterogeneous"):
        # its class then reads the size of global heads from one type of rope only
        with pytest.raises(UserError, match="gemma4_text cannot be checked, its class fails"):
            convert(source, tmp_path / "converted", max_length=4 * LENGTH)
        return
    result = convert(source, tmp_path / "converted", max_length=4 * LENGTH)
    assert all(check.passed for check in result.checks) and len(result.checks) >= 4
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    original, new = load(source), load(tmp_path / "converted")
    with torch.no_grad():
        with identity_outputs(original):
            wanted = original(ids).logits
        got = new(ids).logits
        assert torch.equal(got, wanted)
        assert not torch.equal(original(ids).logits, wanted), "the rotation did nothing before"
        if AWKWARD[name]:
            convert(source, tmp_path / "warm", temperature=1.5)
            with scaled_queries(new, 1.5):
                scaled = new(ids).logits
            difference = (load(tmp_path / "warm")(ids).logits - scaled).abs().max()
            assert difference < 1e-3 < (scaled - got).abs().max()
            return
    with pytest.raises(UserError, match=rf"temperature cannot be folded into .*({name}|its weights)") as caught:
        convert(source, tmp_path / "warm", temperature=1.5)
    assert "Leave the temperature out" in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "codegen", "mpt", "jamba", "bloom", "opt", "mamba"])
def test_classes_without_rope_parameters_are_refused_in_a_sentence(name, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": name}))
    save_file({"weight": torch.zeros(2)}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(UserError, match=rf"^{name} models have no `rope_parameters`") as caught:
        convert(tmp_path / "source", tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_order_that_cannot_be_checked_is_reported(tmp_path, monkeypatch):
    """With its reason, and without hiding the exact checks."""
    save("Llama", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "new")

    def no_single_layer(config, layer):
        raise ValueError("at least two layers")

    monkeypatch.setattr("eaftdrope.drope.check.one_layer", no_single_layer)
    checks = check_folder(tmp_path / "new")
    assert len(checks) == 6 and all(check.passed for check in checks)
    assert str(checks[-1]) == (
        "not checked: one layer does not see the order of tokens (a model of one layer cannot be built: at least two layers)"
    )

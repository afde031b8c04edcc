"""For every architecture named: a converted checkpoint is the same weights with the rotation replaced by the identity.

The reference patches each model file's own `apply_rotary_pos_emb`, a path that the converter's self-check does not take.
"""

import contextlib
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from eaftdrope.drope import check_folder, convert
from tests.drope.architectures import ARCHITECTURES, LENGTH, save


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

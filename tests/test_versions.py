"""eaftdrope/versions.py: what a call is made of on each side of a version at which transformers changed."""

import ast
import importlib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eaftdrope import versions

PACKAGE = Path(versions.__file__).parent


@pytest.fixture
def at(monkeypatch):
    """The module as it is with another release of transformers installed."""

    def reload(release: str):
        monkeypatch.setattr("importlib.metadata.version", lambda name: release)
        return importlib.reload(versions)

    yield reload
    monkeypatch.undo()
    importlib.reload(versions)


def test_release_is_a_pair_of_numbers_that_compares_as_versions_do(at):
    assert at("5.6.0").TRANSFORMERS == (5, 6) < at("5.18.2").TRANSFORMERS == (5, 18)
    assert at("6.0.0.dev0").TRANSFORMERS == (6, 0)


@pytest.mark.parametrize("release, name", [("5.23.1", "past_key_values"), ("5.24.0", "cache"), ("6.0.0", "cache")])
def test_the_cache_goes_in_and_comes_out_under_its_name(release, name, at):
    module, cache = at(release), object()
    assert module.cache_argument(cache) == {name: cache}
    assert module.cache_of(SimpleNamespace(**{name: cache})) is cache


def test_the_installed_models_read_the_cache_that_is_passed():
    """A cache under a name that forward ignores would leave the second half without the first."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, 6:]
        cache = versions.cache_of(model(input_ids=ids[:, :6], use_cache=True))
        halves = model(input_ids=ids[:, 6:], **versions.cache_argument(cache)).logits
        alone = model(input_ids=ids[:, 6:]).logits
    torch.testing.assert_close(halves, whole)
    assert not torch.allclose(alone, whole, atol=1e-3)


NESTED = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
FLAT = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize("parameters, keys", [(NESTED, list(NESTED)), (FLAT, [])], ids=["nested", "flat"])
def test_nested_rope_keys_before_the_method_of_transformers(parameters, keys, at):
    module = at("5.17.1")
    layers = SimpleNamespace(layer_types=["sliding_attention", "full_attention", "full_attention"])
    assert module.nested_rope_keys(layers, parameters) == keys
    # DeepSeek-V4's labels are not its layer types
    labels = SimpleNamespace(layer_types=["other"], _rope_type_labels=("full_attention", "sliding_attention"))
    assert module.nested_rope_keys(labels, parameters) == keys
    assert module.nested_rope_keys(SimpleNamespace(), parameters) == []


@pytest.mark.parametrize("parameters", [NESTED, FLAT], ids=["nested", "flat"])
def test_nested_rope_keys_are_those_of_the_method_of_transformers(parameters, at):
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(num_hidden_layers=6)
    if not hasattr(config, "nested_rope_parameter_keys"):
        pytest.skip("the installed transformers is older than 5.18")
    assert at("5.17.1").nested_rope_keys(config, parameters) == list(config.nested_rope_parameter_keys(parameters))


def test_versions_are_compared_in_this_file_only():
    """Elsewhere `version` is printed or recorded, never compared."""
    found = [
        path.relative_to(PACKAGE).as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and ("__version__" in (text := ast.unparse(node)) or "version(" in text)
    ]
    assert found == []
    assert tuple(int(part) for part in version("transformers").split(".")[:2]) == versions.TRANSFORMERS

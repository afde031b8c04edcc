"""The usual stretches of a rotary embedding, as the families apply them: only where attention has no window."""

import pytest
import transformers

from eaftdrope.drope.rope import with_rope
from eaftdrope.errors import UserError

KINDS = ["sliding_attention", "full_attention"] * 2
NESTED = {
    "Gemma3Text": {},
    "Gemma3nText": {"activation_sparsity_pattern": [0.0] * 4},
    "Olmo3": {},
    "Laguna": {},
    "Mellum": {},
    "MiMoV2Flash": {},
    "ModernBertDecoder": {},
}


def config(name, **changes):
    return getattr(transformers, f"{name}Config")(num_hidden_layers=4, **changes)


@pytest.mark.parametrize("method", ["pi", "ntk", "yarn"])
@pytest.mark.parametrize("name", NESTED)
def test_layers_with_a_window_keep_their_rotary_embedding(name, method):
    plain = config(name, layer_types=KINDS, **NESTED[name])
    stretched = with_rope(plain, method, 4.0).rope_parameters
    assert stretched["sliding_attention"] == plain.rope_parameters["sliding_attention"]
    full, before = stretched["full_attention"], plain.rope_parameters["full_attention"]
    if method == "ntk":
        assert full["rope_theta"] > before["rope_theta"] and full["rope_type"] == "default"
    else:
        assert (full["rope_type"], full["factor"]) == ({"pi": "linear", "yarn": "yarn"}[method], 4.0)
        assert full["rope_theta"] == before["rope_theta"]


def test_what_is_stretched_already_counts_only_where_it_would_be_stretched():
    long = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    ropes = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": long}
    with pytest.raises(UserError, match=r"already of type 'linear'"):
        with_rope(config("Gemma3Text", layer_types=KINDS, rope_parameters=ropes), "yarn", 4.0)
    ropes = {"sliding_attention": long, "full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    got = with_rope(config("Gemma3Text", layer_types=KINDS, rope_parameters=ropes), "yarn", 4.0).rope_parameters
    assert got["sliding_attention"] == long and got["full_attention"]["rope_type"] == "yarn"


def test_gemma4s_own_type_is_interpolated_in_its_own_terms():
    plain = transformers.Gemma4TextConfig(num_hidden_layers=4, layer_types=KINDS)
    got = with_rope(plain, "pi", 4.0).rope_parameters
    assert got["full_attention"] == plain.rope_parameters["full_attention"] | {"factor": 4.0}
    assert got["sliding_attention"] == plain.rope_parameters["sliding_attention"]
    with pytest.raises(UserError, match=r"yarn stretches a plain .*'proportional'"):
        with_rope(plain, "yarn", 4.0)


@pytest.mark.parametrize("method", ["pi", "ntk", "yarn"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Cohere2", {"layer_types": KINDS}),
        ("Exaone4", {"layer_types": KINDS, "sliding_window": 512}),
        ("Afmoe", {"layer_types": KINDS}),
        ("Beam", {}),
        ("Llama4Text", {"no_rope_layers": [1, 1, 1, 0]}),
    ],
)
def test_nothing_to_stretch_where_only_windows_rotate(name, changes, method):
    with pytest.raises(UserError, match=rf"{method} has nothing to stretch.*Compare with the model as it is \(rope\)"):
        with_rope(config(name, **changes), method, 4.0)


def test_one_rotary_embedding_for_all_layers_is_stretched_for_all():
    for name in ("Gemma2", "Qwen2", "SmolLM3", "GptOss"):
        plain = config(name, **({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}))
        assert with_rope(plain, "pi", 4.0).rope_parameters["factor"] == 4.0
    everywhere = config("Exaone4", sliding_window=None, layer_types=["full_attention"] * 4)
    assert with_rope(everywhere, "pi", 4.0).rope_parameters["factor"] == 4.0


def test_ntk_is_refused_where_each_layer_has_its_own_base():
    plain = transformers.GraniteSWAConfig(num_hidden_layers=4)
    with pytest.raises(UserError, match=r"ntk enlarges one base.*layer_rope_theta"):
        with_rope(plain, "ntk", 4.0)

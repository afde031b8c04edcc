"""Properties: any typo is caught, any valid recipe survives the way to YAML and back, no text crashes the reader."""

import copy
import string

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from eaftdrope.errors import RecipeError
from eaftdrope.loss.gates import GATE_OPTIONS
from eaftdrope.recipe import Recipe, dump_recipe, load_recipe, make_recipe
from eaftdrope.recipe.load import section_at
from eaftdrope.recipe.suggest import FOREIGN_KEYS, did_you_mean, distance, nearest
from eaftdrope.recipe.yaml_lines import read_value, read_yaml, write_yaml

BASE = {"model": "org/model", "data": {"train": "org/rows"}, "output": {"dir": "runs/x"}}
MINIMAL = "model: org/model\ndata: {train: org/rows}\noutput: {dir: runs/x}\n"


def recipe_with(**sections):
    data = copy.deepcopy(BASE)
    for name, section in sections.items():
        data[name] = {**data[name], **section} if isinstance(data.get(name), dict) else section
    return data


# Text


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_read_or_refused_but_never_crashes(text):
    document = read_yaml(text)
    assert document.problems or document.root is not None
    assert all(problem.line is None or problem.line >= 1 for problem in document.problems)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=string.ascii_letters + ":{}[]-*&#'\"\n\t ,0.", max_size=60))
def test_any_file_gives_a_recipe_or_a_recipe_error(tmp_path, text):
    path = tmp_path / "any.yaml"
    path.write_text(MINIMAL + text, encoding="utf-8")
    try:
        assert isinstance(load_recipe(path), Recipe)
    except RecipeError as error:
        assert str(error).startswith(f"{path} has ")


scalars = st.one_of(
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.text(alphabet="abeinoxyz0159+:~#&*!-_./ ", min_size=1, max_size=12),
)


@settings(max_examples=200, deadline=None)
@given(value=st.one_of(scalars, st.lists(scalars, max_size=3)))
def test_values_are_written_so_that_they_are_read_back(value):
    """Text that looks like a number, a date or a truth value is quoted."""
    written = write_yaml({"key": value})
    assert read_yaml(written).data == {"key": value}
    if not isinstance(value, list):
        assert read_value(written.removeprefix("key: ")) == value


# Typos


def all_keys():
    """(path of the section, key) of every key of the schema."""
    found = []

    def walk(section, path):
        for name in section.model_fields:
            found.append((path, name))
            inner = section_at((*path, name))
            if inner is not None:
                walk(inner, (*path, name))

    walk(Recipe, ())
    return found


KEYS = all_keys()


@st.composite
def typos(draw):
    """A key of the schema with one letter deleted, two neighbours swapped, or one letter inserted."""
    path, key = draw(st.sampled_from(KEYS))
    kind = draw(st.sampled_from(("delete", "swap", "insert")))
    at = draw(st.integers(0, len(key) - 1))
    if kind == "delete":
        wrong = key[:at] + key[at + 1 :]
    elif kind == "swap":
        wrong = key[:at] + key[at : at + 2][::-1] + key[at + 2 :]
    else:
        wrong = key[:at] + draw(st.sampled_from(string.ascii_lowercase)) + key[at:]
    # a typo that is another tool's name for some key (`lr`) is answered with that key
    assume(wrong and wrong not in section_at(path).model_fields and wrong not in FOREIGN_KEYS)
    return path, key, wrong


def nested(path, key):
    """A recipe with `key` under `path`, lists and probes as the schema wants them."""
    data = recipe_with(data={"held_out": 0.1})
    inner = {key: 1}
    for above, part in reversed([*zip((None, *path), path)]):
        in_a_list = above in ("data", "probes") and part != "replay"
        inner = {part: [inner] if in_a_list else inner}
    for name, section in inner.items():
        if isinstance(section, dict) and isinstance(data.get(name), dict):
            data[name].update(section)
        elif name == "model" and isinstance(section, dict):
            data[name] = {"reference": "org/model", **section}
        else:
            data[name] = section
    return data


@settings(max_examples=400, deadline=None)
@given(typos())
def test_any_typo_of_any_key_is_rejected_with_the_key_suggested(typo):
    path, key, wrong = typo
    with pytest.raises(RecipeError) as caught:
        make_recipe(nested(path, wrong))
    problem = [line for line in str(caught.value).splitlines() if f"{wrong}: unknown key." in line]
    assert len(problem) == 1, caught.value
    suggestions = problem[0].split("   (keys here")[0]
    assert f"`{key}`" in suggestions or f".{key}`" in suggestions or "It belongs elsewhere" in suggestions
    if "It belongs elsewhere" in suggestions:
        # the typo happens to be another section's key
        assert any(wrong in section_at((name,)).model_fields for name in Recipe.model_fields if section_at((name,)))


def test_distance_and_nearest():
    assert distance("", "abc") == 3
    assert distance("gate", "gate") == 0
    assert distance("gaet", "gate") == 1
    assert distance("kitten", "sitting") == 3
    assert nearest("steps", ["epochs", "steps", "save_every"])[0] == "steps"
    assert nearest("Learning-Rate", ["learning_rate", "log_every"]) == ["learning_rate"]
    assert nearest("zzz", ["gate", "alpha"]) == []
    assert did_you_mean("zzz", ["gate"]) == ""
    assert did_you_mean("warmup_", ["warmup_ratio", "warmup_steps", "r"]) == (
        " Did you mean `warmup_ratio` or `warmup_steps`?"
    )


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_distance_is_symmetric_and_bounded(a, b):
    assert distance(a, b) == distance(b, a)
    assert abs(len(a) - len(b)) <= distance(a, b) <= max(len(a), len(b))
    assert (distance(a, b) == 0) == (a == b)


# There and back


@st.composite
def valid_recipes(draw):
    gate = draw(st.sampled_from(sorted(GATE_OPTIONS)))
    values = {
        "alpha": st.floats(0, 5),
        "k": st.integers(2, 100),
        "divisor": st.floats(0.1, 5),
        "slope": st.floats(-50, 50),
        "threshold": st.floats(0, 1),
        "quantile": st.floats(0, 1),
        "gamma": st.floats(0, 5),
        "floor": st.floats(0, 1),
        "keep": st.sampled_from(["higher", "lower"]),
        "weight": st.floats(0, 2),
    }
    loss = {"gate": gate} | {o: draw(values[o]) for o in GATE_OPTIONS[gate] if draw(st.booleans())}
    text = st.text(
        st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=["C", "Z"], exclude_characters="/~."),
        min_size=1,
        max_size=9,
    )
    held_out = draw(st.sampled_from([None, 0.05, "org/held", [{"path": "org/rows", "split": "test"}]]))
    length = draw(st.sampled_from([{}, {"epochs": 3}, {"epochs": 0.5}, {"steps": 12}]))
    lora = draw(
        st.one_of(
            st.none(),
            st.fixed_dictionaries(
                {},
                optional={
                    "r": st.integers(1, 256),
                    "alpha": st.floats(0.5, 512),
                    "dropout": st.floats(0, 0.9),
                    "target_modules": st.one_of(st.just("all-linear"), st.lists(text, min_size=1, max_size=3)),
                    "modules_to_save": st.lists(text, max_size=2),
                },
            ),
        )
    )
    return recipe_with(
        model=draw(st.one_of(st.just("org/model"), st.just({"reference": "org/model", "dtype": "bfloat16"}))),
        data={
            "train": draw(st.sampled_from(["org/rows", ["org/a", {"path": "org/b", "limit": 3}]])),
            "held_out": held_out,
            "train_on": draw(st.sampled_from(["assistant", "all"])),
        },
        loss=loss,
        lora=lora,
        train={
            **length,
            "learning_rate": draw(st.floats(1e-12, 1)),
            "seed": draw(st.integers(0, 2**32 - 1)),
        },
        probes={
            "general": draw(st.sampled_from([[], ["perplexity"], [{"multiple_choice": {"limit": 3}}, "perplexity"]]))
        },
        output={"dir": draw(text), "push_to_hub": draw(st.sampled_from([None, "me/mine"]))},
    )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=valid_recipes())
def test_a_valid_recipe_survives_dump_and_load(tmp_path, data):
    recipe = make_recipe(data)
    path = tmp_path / "there.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert make_recipe(recipe.model_dump(mode="json", exclude_none=True)) == recipe

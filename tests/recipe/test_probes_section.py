"""The probes of a recipe: which list each may stand in, what it needs, and the way to YAML and to the run's probes."""

import json
import os

import pytest

from eaftdrope.errors import RecipeError
from eaftdrope.recipe import dump_recipe, load_recipe, make_recipe
from eaftdrope.recipe.probe_sections import GENERAL_PROBES, GENERATED, TARGET_PROBES

BASE = {"model": "org/model", "data": {"train": "org/rows", "held_out": 0.1}, "output": {"dir": "runs/x"}}


def made(folder=".", **probes):
    return make_recipe({**BASE, "probes": probes}, folder=folder).probes


def refused(folder=".", **probes):
    with pytest.raises(RecipeError) as caught:
        made(folder, **probes)
    return str(caught.value)


def test_names_are_those_that_can_be_built(tmp_path):
    from eaftdrope.evaluate import build_probes
    from eaftdrope.evaluate.probes.answers import READINGS

    assert tuple(READINGS) == GENERATED
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "A?", "answer": "yes 1"}\n')
    offers = tmp_path / "offers.jsonl"
    offers.write_text('{"messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "add"}]}\n')
    options = {name: {"file": str(file)} for name in GENERATED}
    options |= {"long_recall": {"length": 512}, "long_loss": {"length": 64}, "call_refusal": {"file": str(offers)}}
    general = made(general=[{name: options.get(name, {})} for name in GENERAL_PROBES]).general
    built = build_probes([(probe.name, "general", probe.options.model_dump()) for probe in general])
    assert [probe.name for probe in built] == list(GENERAL_PROBES)
    assert set(TARGET_PROBES) & set(GENERAL_PROBES) == set(GENERATED)
    agreement = built[GENERAL_PROBES.index("agreement")]
    assert (len(agreement.prompts), agreement.max_tokens, agreement.max_new_tokens) == (48, 1024, 32)


def test_every_probe_has_a_section():
    from eaftdrope.evaluate.probes.build import PROBES

    assert set(PROBES) == {*TARGET_PROBES, *GENERAL_PROBES}


def test_answers_may_stand_in_both_lists(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    probes = made(tmp_path, target=["numeric_answers"], general=[{"yes_no_maybe": {"file": "rows.jsonl"}}])
    assert probes.target[0].numeric_answers.file is None
    assert (probes.target[0].options.limit, probes.target[0].options.max_new_tokens) == (64, 256)
    assert probes.general[0].yes_no_maybe.file == str(file)
    assert (probes.every, probes.during_limit) == (None, 32)


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ({"general": ["exact_answers"]}, "probes.general[0].exact_answers: under general this probe needs its own file"),
        ({"target": ["agreement"]}, "probes.target[0]: 'agreement' belongs under probes.general"),
        ({"target": ["instructions"]}, "probes.target[0]: 'instructions' belongs under probes.general"),
        ({"general": ["agreemnt"]}, "probes.general[0]: unknown probe 'agreemnt'. Did you mean `agreement`?"),
        ({"target": ["numeric_answer"]}, "unknown probe 'numeric_answer'. Did you mean `numeric_answers`?"),
        ({"general": [{"agreement": {"file": "promts.jsonl"}}]}, "no such file: 'promts.jsonl'"),
        ({"target": [{"yes_no_maybe": {"file": "x.jsonl"}}]}, "no such file: 'x.jsonl'"),
        ({"general": [{"instructions": {"file": "x.jsonl"}}]}, "unknown key.   (keys here: limit, max_new_tokens)"),
        ({"every": 0}, "probes.every: must be at least 1"),
    ],
)  # fmt: skip
def test_what_is_refused(probes, message):
    assert message in refused(**probes)


def test_answers_of_the_target_need_held_out_rows_or_a_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    data = {**BASE, "data": {"train": "org/rows"}}
    recipe = {**data, "probes": {"target": [{"numeric_answers": {"file": "rows.jsonl"}}]}}
    assert make_recipe(recipe, folder=tmp_path).probes.target[0].name == "numeric_answers"
    for entry in ("numeric_answers", {"numeric_answers": {"limit": 3}}):
        with pytest.raises(RecipeError, match="numeric_answers is measured on held-out rows, and the recipe has none"):
            make_recipe({**data, "probes": {"target": [entry]}})


def test_a_recalibration_has_no_conversations():
    section = {
        "tokens": 1e6,
        "data": {"train": "org/text", "held_out": "org/other"},
        "probes": {"target": ["exact_answers"]},
    }
    recipe = {"model": "org/model", "stages": ["drope", "recalibrate"], "recalibrate": section, "output": {"dir": "x"}}
    with pytest.raises(RecipeError, match="exact_answers needs conversations, and a recalibration holds out text"):
        make_recipe(recipe)


def test_files_are_named_from_where_the_recipe_is_saved(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    probes = {
        "target": [{"numeric_answers": {"file": "rows.jsonl"}}],
        "general": [{"agreement": {"file": "rows.jsonl"}}, {"exact_answers": {"file": "rows.jsonl"}}],
        "every": 5,
    }
    recipe = make_recipe({**BASE, "probes": probes}, folder=tmp_path)
    there = tmp_path / "runs" / "x"
    there.mkdir(parents=True)
    text = dump_recipe(recipe, folder=there)
    assert text.count(os.path.join("..", "..", "rows.jsonl")) == 3 and str(tmp_path) not in text
    (there / "recipe.yaml").write_text(text)
    again = load_recipe(there / "recipe.yaml")
    assert json.loads(again.model_dump_json()) == json.loads(recipe.model_dump_json())

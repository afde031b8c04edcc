"""Hashes of what must not change between two starts."""

import json
from types import SimpleNamespace

import pytest

from eaftdrope.recipe import load_recipe
from eaftdrope.run.build import build_run_probes
from eaftdrope.run.data import build_data
from eaftdrope.run.fingerprint import fingerprints, rows_fingerprint
from eaftdrope.run.model_files import model_fingerprint
from eaftdrope.run.settings import eaft_settings
from tests.tiny_models import save_model
from tests.tiny_run import make_project, save_rows


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder


def prepared(project, *overrides, template=None):
    from eaftdrope.models import load_tokenizer

    recipe = load_recipe(project / "recipe.yaml", list(overrides))
    tokenizer = load_tokenizer(recipe.model.reference)
    if template:
        tokenizer.chat_template = template
    data = build_data(eaft_settings(recipe), tokenizer)
    probes = build_run_probes(recipe.probes, data)
    return SimpleNamespace(data=data, probes=probes, recovery=None, tokenizer=tokenizer, model=recipe.model)


@pytest.fixture(scope="module")
def original(project):
    return fingerprints(**vars(prepared(project)))


def changed(original, now):
    assert original.keys() == now.keys()
    return [name for name in original if original[name] != now[name]]


def test_they_are_the_same_in_every_start(project, original):
    assert changed(original, fingerprints(**vars(prepared(project)))) == []
    assert list(original) == [
        "the training rows",
        "the held-out rows",
        "the probes' questions",
        "the chat template",
        "the tokenizer",
        "the base model",
    ]


def rows_of(project, name="rows.jsonl"):
    return (project / name).read_text().splitlines(keepends=True)


def other_answers(project, folder):
    """Every answer rewritten, with as many tokens."""
    (folder / "rows.jsonl").write_text("".join(rows_of(project)).replace("It is", "No ix"))
    return [f"data.train={folder / 'rows.jsonl'}"]


def another_order(project, folder):
    (folder / "rows.jsonl").write_text("".join(reversed(rows_of(project))))
    return [f"data.train={folder / 'rows.jsonl'}"]


def other_held_out(project, folder):
    save_rows(folder / "held.jsonl", 6, start=50)
    return [f"data.held_out={folder / 'held.jsonl'}"]


def other_questions(project, folder):
    (folder / "text.txt").write_text("The sun shone on the town, and nobody minded. " * 8)
    perplexity = f"{{perplexity: {{files: [{folder / 'text.txt'}], max_tokens: 256}}}}"
    return [f"probes.general=[{perplexity}, {{multiple_choice: {{limit: 4}}}}]"]


def other_weights(project, folder):
    import torch
    from safetensors.torch import load_file, save_file

    file = save_model(folder / "model") / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 2.0)
    save_file(weights, file, metadata={"format": "pt"})
    return [f"model={folder / 'model'}"]


def other_config(project, folder):
    file = save_model(folder / "model") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 1e-3}))
    return [f"model={folder / 'model'}"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (other_answers, ["the training rows"]),
        (another_order, ["the training rows"]),
        (other_held_out, ["the held-out rows", "the probes' questions"]),
        (other_questions, ["the probes' questions"]),
        (other_weights, ["the base model"]),
        (other_config, ["the base model"]),
    ],
)
def test_what_changes_them(project, original, tmp_path, change, expected):
    now = prepared(project, *change(project, tmp_path))
    assert changed(original, fingerprints(**vars(now))) == expected


def test_a_template_of_the_same_lengths(project, original):
    tokenizer = prepared(project).tokenizer
    now = prepared(project, template=tokenizer.chat_template.replace("<|im_start|>assistant", "<|im_start|>Assistant"))
    assert changed(original, fingerprints(**vars(now))) == ["the chat template"]


def test_rows_are_told_apart_by_where_they_end():
    from datasets import Dataset

    def rows(*ids):
        return rows_fingerprint(Dataset.from_dict({"input_ids": list(ids), "labels": list(ids)}))

    assert rows([1, 2], [3]) != rows([1], [2, 3])
    assert rows([1, 2], [3]) == rows([1, 2], [3])


def test_where_the_rows_lie_does_not_matter(project, original):
    """A share of the rows is chosen by index."""
    now = prepared(project)
    shuffled = now.data.train.select(range(len(now.data.train))[::-1]).select(range(len(now.data.train))[::-1])
    assert rows_fingerprint(shuffled) == original["the training rows"]
    assert fingerprints(**{**vars(now), "probes": []}).keys() == original.keys() - {"the probes' questions"}


def test_another_kind_of_weights_that_is_not_loaded_changes_nothing(tmp_path):
    folder = save_model(tmp_path / "model")
    before = model_fingerprint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"of another program")
    assert model_fingerprint(folder) == before

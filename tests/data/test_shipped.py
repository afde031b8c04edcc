"""The data that comes with the package: its splits, its rows, its size and its licences."""

from importlib.resources import files

import pytest

from eaftdrope.data import Source, check_source, iter_examples, iter_rows
from eaftdrope.data.shipped import SPLITS

ASSETS = files("eaftdrope.data") / "assets"
ROWS = {("gsm8k", "train"): 500, ("gsm8k", "test"): 100, ("medquad", "train"): 500, ("medquad", "test"): 100}
ROWS[("novels", "train")] = 108


def read(name, split, **options):
    return list(iter_rows(Source(f"package:{name}", split=split, **options)))


def test_every_split_has_its_rows():
    assert {(name, split): len(read(name, split)) for name, splits in SPLITS.items() for split in splits} == ROWS


@pytest.mark.parametrize("name", ["gsm8k", "medquad"])
def test_no_question_is_in_both_splits(name):
    train, test = ({row.data["question"] for row in read(name, split)} for split in SPLITS[name])
    assert not train & test


def test_rows_are_what_the_recipes_train_on():
    first = next(iter_examples(Source("package:gsm8k")))
    assert first.messages[0]["content"].startswith("Natalia sold clips to 48 of her friends in April")
    assert first.answer["content"].endswith("#### 72")
    assert all("####" in row.data["answer"] for split in SPLITS["gsm8k"] for row in read("gsm8k", split))
    assert all(row.data["url"].startswith("http") for row in read("medquad", "train"))
    assert next(iter_examples(Source("package:novels"))).text.startswith("THE ADVENTURES OF SHERLOCK HOLMES")
    assert not any("Gutenberg" in row.data["text"] for row in read("novels", "train"))
    # about one pass over them is the 280,000 tokens of recipes/drope/smollm2_135m.yaml
    assert sum(len(row.data["text"]) for row in read("novels", "train")) > 1_200_000


def test_origins_and_limits():
    rows = read("gsm8k", "test", limit=2)
    assert [row.origin for row in rows] == ["package:gsm8k[test]:1", "package:gsm8k[test]:2"]


def test_a_split_that_is_not_there():
    problem = check_source(Source("package:novels", split="test"))
    assert problem == "package:novels: no split 'test'; it has 'train'."


def test_every_file_is_listed_with_its_licence_and_small():
    listed = (ASSETS / "README.md").read_text(encoding="utf-8")
    names = [file.name for file in ASSETS.iterdir() if file.name.endswith(".jsonl")]
    assert len(names) == len(ROWS) and all(f"`{name}`" in listed for name in names)
    assert sum(len((ASSETS / name).read_bytes()) for name in names) < 2.1e6
    for words in ("public domain", "Copyright (c) 2021 OpenAI", "Permission is hereby granted", "CC BY 4.0"):
        assert words in listed

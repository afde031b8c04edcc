"""The scripted expert: it writes only what it has seen, its mistakes are context, and its rows are a source of a recipe."""

import json
import re

import pytest

from eaftdrope.data import Source, check_source, iter_rows
from eaftdrope.errors import DataError
from eaftdrope.rlm.experts import expert_rows
from eaftdrope.rlm.journal import read_journal
from eaftdrope.rlm.protocol import NOTHING_RUN, parse
from eaftdrope.rlm.rows import RowFilters, training_rows
from eaftdrope.rlm.tasks import make_task
from eaftdrope.rlm.tasks.task import NAMES

CHARS = 1_500


@pytest.fixture(scope="module")
def rows():
    return list(expert_rows(60, chars=CHARS))


def replies(row):
    return [message for message in row["messages"] if message["role"] == "assistant"]


def test_a_row_depends_on_its_number_only(rows):
    assert list(expert_rows(3, first=20, chars=CHARS)) == rows[20:23]
    assert len({json.dumps(row["messages"]) for row in rows}) == 60
    assert [row["id"] for row in rows[:2]] == ["needle-train-0", "count-train-1"]


def test_it_answers_from_what_it_was_shown(rows):
    for row in rows:
        search, shown, last = row["messages"][-3:]
        assert "print(len(lines), lines[:3])" in search["content"] and not search.get("weight") and "weight" not in last
        value = re.search(r'answer\["content"\] = (.*)', last["content"])[1]
        # the number, or the label in the form of the document
        assert re.search(r'"(.*?)"', value)[1] in shown["content"]


def test_a_mistake_is_context_and_is_followed_by_the_search(rows):
    outputs = []
    for row in rows:
        untrained = [reply for reply in replies(row) if reply.get("weight") == 0]
        assert untrained == replies(row)[: len(untrained)] and len(replies(row)) == len(untrained) + 2
        outputs += [row["messages"][3]["content"]] * len(untrained)
    misses = [text for text in outputs if text.strip() in ("[]", "0", "0 []") or text.split(" ", 1)[0].isdigit()]
    errors = [text for text in outputs if "Error" in text]
    silent = [text for text in outputs if text == NOTHING_RUN]
    assert len(misses) + len(errors) + len(silent) == len(outputs)
    assert min(len(misses), len(errors), len(silent)) >= 2 and 0.2 < len(outputs) / 60 < 0.5


def test_wording_and_document_vary_independently(rows):
    """Queries for the magic number over documents that say it in another way, and the reverse."""
    kinds = set()
    for row in rows[::2]:
        shown, query = row["messages"][-2]["content"], row["messages"][1]["content"].split("\n")[0]
        kinds.add(("magic number for" in query, "magic number for" in shown))
    assert kinds == {(a, b) for a in (True, False) for b in (True, False)}


def test_the_names_of_the_test_set_are_not_in_the_rows(rows):
    words = set(re.findall(r"[a-z]+", json.dumps([row["messages"] for row in rows])))
    assert not words & set(NAMES["test"])
    held_out = json.dumps(list(expert_rows(10, names="test", chars=CHARS)))
    assert set(re.findall(r"[a-z]+", held_out)) & set(NAMES["test"])


def test_names_are_many(rows):
    """No name is in many rows: a root that has seen sixteen names searches for one of them."""
    searched = [re.search(r'if "(\w+)" in line', row["messages"][-3]["content"])[1] for row in rows]
    assert len(set(searched)) > 45


def test_no_query_has_a_phrasing_of_the_test_set(rows):
    def form(query, name):
        return re.sub(name, "X", query)

    asked = [make_task(kind, seed, 500, phrasings="test").query for kind in ("needle", "count") for seed in range(20)]
    unseen = {form(query, "|".join(NAMES["test"])) for query in asked}
    seen = set()
    for row in rows:
        name = re.search(r'if "(\w+)" in line', row["messages"][-3]["content"])[1]
        seen.add(form(row["messages"][1]["content"].split("\n")[0].removeprefix("Query: "), name))
    assert len(unseen) == 4 and len(seen) >= 12 and not unseen & seen


def test_its_journals_are_those_of_runs(tmp_path):
    made = list(expert_rows(8, chars=CHARS, journals=tmp_path))
    files = [tmp_path / f"{row['id']}.jsonl" for row in made]
    assert all(read_journal(file)[-1]["finished"] for file in files)
    exported, _ = training_rows(files, RowFilters(min_turns=1))
    for row, other in zip(made, exported, strict=True):
        texts = [[(m["role"], m["content"]) for m in found["messages"]] for found in (row, other)]
        assert texts[0] == texts[1] and parse(texts[0][-1][1]).blocks


def test_the_source_of_a_recipe():
    rows = list(iter_rows(Source("package:rlm_expert", split="test", limit=3)))
    assert [row.data for row in rows] == list(expert_rows(3, names="test"))
    assert [row.origin for row in rows][2] == "package:rlm_expert[test]:needle-test-2"
    assert check_source(Source("package:rlm_expert")) is None
    assert "it has 'train' and 'test'" in check_source(Source("package:rlm_expert", split="validation"))


def test_the_source_without_a_sandbox(monkeypatch):
    monkeypatch.setattr("eaftdrope.data.sources.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'eaftdrope\[rlm\]'"):
        next(iter_rows(Source("package:rlm_expert")))

"""Files of every kind, their bad rows with file and line, and what is said about sources that are not there."""

import csv
import json
import subprocess
import sys

import pytest

from eaftdrope.data import Source, check_source, iter_rows
from eaftdrope.errors import DataError


def read(path, **options):
    return [(row.data, row.origin, row.error) for row in iter_rows(Source(str(path), **options))]


def test_json_lines_with_bad_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "a"}',
        b"",
        b'{"text": ',
        b"[1]",
        b'{"text": "\xff"}',
        b"[" * 100_000,
        b'{"text": "b"}',
    ]
    path.write_bytes(b"\r\n".join(lines))
    assert read(path) == [
        ({"text": "a"}, f"{path}:1", None),
        ({}, f"{path}:3", "not valid JSON: Expecting value at column 10"),
        ({}, f"{path}:4", "a row must be a JSON object with named fields, this is a list"),
        ({}, f"{path}:5", "not valid UTF-8 at byte 10 of the line; save the file as UTF-8"),
        ({}, f"{path}:6", "JSON nested too deeply"),
        ({"text": "b"}, f"{path}:7", None),
    ]
    assert len(read(path, limit=2)) == 2


def test_mixed_types_stay_what_they_are(write_jsonl):
    """What breaks or null-fills in an Arrow schema: an argument that is now a number, now a list, now absent."""
    rows = [{"tools": [{"a": 1}]}, {"tools": [{"a": [1]}, {"b": None}]}, {"tools": "[]"}]
    assert [data for data, _, _ in read(write_jsonl(rows))] == rows


def test_json_array_and_json_lines_in_a_json_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n  {"text": "a"},\n  {"text":\n "b"}\n, 3]\n')
    assert read(path) == [
        ({"text": "a"}, f"{path}:2", None),
        ({"text": "b"}, f"{path}:3", None),
        ({}, f"{path}:5", "a row must be a JSON object with named fields, this is a int"),
    ]
    path.write_text('[{"text": "a"},\n {"text": }, {"text": "c"}]')
    assert read(path)[1][1:] == (
        f"{path}:2",
        "not valid JSON: Expecting value at line 2; the rest of the file is not read",
    )
    path.write_text('[{"text": "a"}')
    assert read(path)[1][2] == "not valid JSON: Expecting value at line 1; the rest of the file is not read"
    path.write_text('{\n  "version": 1,\n  "data": [{"text": "a"}]\n}\n')
    with pytest.raises(DataError, match=r"holds one dict, not rows.*what stands under 'version', 'data'"):
        read(path)
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [data["text"] for data, _, _ in read(path)] == ["a", "b"]


def test_csv(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion", "note"])
        writer.writerow(["two\nlines", "é, comma", ""])
        writer.writerow(["p", "c", "n"])
        file.write("too,few\n1,2,3,4\n")
    assert read(path) == [
        ({"prompt": "two\nlines", "completion": "é, comma"}, f"{path}:2", None),
        ({"prompt": "p", "completion": "c", "note": "n"}, f"{path}:4", None),
        ({}, f"{path}:5", "2 fields, but the header names 3"),
        ({}, f"{path}:6", "4 fields, but the header names 3; quote fields with commas"),
    ]


def test_parquet_without_the_nulls_that_arrow_filled_in(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    rows = [{"messages": [{"role": "user", "x": {"a": 1}}]}, {"messages": [{"role": "user", "x": {"b": 2}}]}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert read(path) == [(rows[0], f"{path}:1", None), (rows[1], f"{path}:2", None)]
    path.write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"rows.parquet: cannot be read as Parquet"):
        read(path)


def test_folders(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "readme.md").write_text("x")
    assert [data["text"] for data, _, _ in read(tmp_path)] == ["a.jsonl", "b.jsonl"]
    assert "no file of the folder is named after the split 'test' (files: a.jsonl, b.jsonl)" in check_source(
        Source(str(tmp_path), split="test")
    )
    # Once a file is named after a split, the others are no longer swept into the training rows.
    for name in ("train-00.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert [data["text"] for data, _, _ in read(tmp_path)] == ["train-00.jsonl"]
    assert [data["text"] for data, _, _ in read(tmp_path, split="test")] == ["test.jsonl"]


def test_hub_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        if path == "org/none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist on the Hub")
        return datasets.Dataset.from_list([{"x": {"a": 1}}, {"x": {"b": 2}}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert check_source(Source("org/name")) is None
    assert read("org/name", name="en", split="test", limit=5) == [
        ({"x": {"a": 1}}, "org/name[en:test]:0", None),
        ({"x": {"b": 2}}, "org/name[en:test]:1", None),
    ]
    assert asked == [("org/name", {"name": "en", "split": "test"})]
    with pytest.raises(
        DataError, match=r"org/none: the dataset cannot be loaded from the hub: .*doesn't exist on the Hub"
    ):
        read("org/none")


def test_what_is_said_about_sources_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "tool_calls.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path)
    for source, said in [
        (Source("tool_calls.jsonl"), None),
        (Source("./tool_calls.jsonl"), None),
        (Source("tool_cals.jsonl"), "tool_cals.jsonl: no such file. Did you mean 'tool_calls.jsonl'?"),
        (Source("tool_calls"), "tool_calls: no such file. Did you mean 'tool_calls.jsonl'?"),
        (Source("Tool_Calls.json"), "Tool_Calls.json: no such file. Did you mean 'tool_calls.jsonl'?"),
        (
            Source("xyz.parquet"),
            "xyz.parquet: no such file. Data files there: empty.jsonl, tool_calls.jsonl. A dataset on",
        ),
        (Source("no/folder/x.jsonl"), "no such file; the folder 'no/folder' does not exist either."),
        (Source("notes.txt"), "notes.txt: files of type '.txt' are not read. Convert it to one of .jsonl, .json,"),
        (Source("empty.jsonl"), "empty.jsonl: the file is empty."),
        (Source("bare"), "bare: the folder holds no .jsonl, .json, .parquet, .csv file."),
        (Source("tool_calls.jsonl", split="test"), "tool_calls.jsonl: a file has no splits or configurations."),
        (Source("tool_calls.jsonl", weight=0), "tool_calls.jsonl: the weight is 0; it must be a number above 0"),
        (Source("tool_calls.jsonl", weight=float("nan")), "tool_calls.jsonl: the weight is nan; it must be a number"),
        (Source("tool_calls.jsonl", limit=0), "tool_calls.jsonl: the limit is 0; it must be at least 1"),
        (Source("package:bfc"), "package:bfc: no such data package. The one known is 'package:bfcl'."),
        (Source("squad"), None),
        (Source("org/name"), None),
    ]:
        problem = check_source(source)
        if said is None:
            assert problem is None
        else:
            assert said in problem
            with pytest.raises(DataError):
                next(iter_rows(source))


def test_checking_a_source_imports_nothing_heavy(tmp_path):
    """`validate` and `--help` answer at once: the package and the check load no torch, transformers, datasets, pyarrow."""
    code = (
        "import sys, eaftdrope.data as d; d.check_source(d.Source('nowhere.jsonl'));"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'jinja2', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

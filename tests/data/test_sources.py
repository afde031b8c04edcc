"""Files of every kind, their bad rows with file and line, and what is said about sources that are not there."""

import csv
import json
import subprocess
import sys

import pytest

from eaftdrope.data import Source, check_source, iter_rows
from eaftdrope.data.sources import left_out
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
        file.write('too,few\n1,2,3,4\n\n"x"y,1,2\nq,c,n\n')
    assert read(path) == [
        ({"prompt": "two\nlines", "completion": "é, comma"}, f"{path}:2", None),
        ({"prompt": "p", "completion": "c", "note": "n"}, f"{path}:4", None),
        ({}, f"{path}:5", "2 fields, but the header names 3"),
        ({}, f"{path}:6", "4 fields, but the header names 3; quote fields with commas"),
        ({}, f"{path}:8", "not valid CSV: ',' expected after '\"'"),
        ({"prompt": "q", "completion": "c", "note": "n"}, f"{path}:9", None),
    ]
    for text, said in [
        ("\na,b\n1,2\n", "the first line is empty; it must have the names of the columns"),
        ('"a\n1,2\n', "the header is not valid CSV: unexpected end of data"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=f"^{path}: {said}"):
            read(path)
    path.write_bytes(b"a,b\n1,2\n3,\xff\n")
    with pytest.raises(DataError, match=r"not valid UTF-8 from line \d on\. Save the file as UTF-8"):
        read(path)


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


def test_folders_are_read_with_their_subfolders(tmp_path):
    def write(name, text=None):
        path = tmp_path / "nest" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n" if text is None else text)

    for name in ("b.jsonl", "shard1/deep/A.JSONL", "shard1/c.json", "shard2/_d.jsonl"):
        write(name)
    # about the data, hidden, or what another program is still writing
    for name in ("README.md", "LICENSE", "_SUCCESS", ".hidden.jsonl", ".cache/x.jsonl", "__pycache__/x.jsonl"):
        write(name)
    source = Source(str(tmp_path / "nest"))
    assert [row.data["text"] for row in iter_rows(source)] == [
        "b.jsonl",
        "shard1/c.json",
        "shard1/deep/A.JSONL",
        "shard2/_d.jsonl",
    ]
    assert left_out(source) is None
    # round in circles, and to a file that is read already
    (tmp_path / "nest" / "shard1" / "loop").symlink_to(tmp_path / "nest")
    (tmp_path / "nest" / "shard3.jsonl").symlink_to(tmp_path / "nest" / "b.jsonl")
    for name in ("rows.tsv", "shard1/rows.jsonl.gz"):
        write(name)
    write("empty.csv", "")
    assert len(list(iter_rows(source))) == 4
    assert left_out(source) == (
        f"{tmp_path}/nest: files that are not read: rows.tsv, shard1/rows.jsonl.gz: not of a type that is read (.jsonl, "
        ".json, .parquet, .csv); empty.csv: empty; shard3.jsonl: links to a file that is read already."
    )
    (tmp_path / "nest" / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"gone.jsonl: a broken link, or not a file\. Remove it"):
        list(iter_rows(source))


def test_subfolders_named_after_splits(tmp_path):
    for name in ("train/1.jsonl", "Test/a.jsonl", "train/more/2.jsonl", "other.jsonl", "train/dev.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    for split, names in {
        "train": ["train/1.jsonl", "train/more/2.jsonl"],
        "test": ["Test/a.jsonl"],
        "dev": ["train/dev.jsonl"],
    }.items():
        source = Source(str(tmp_path), split=split)
        assert [row.data["text"] for row in iter_rows(source)] == names
        assert left_out(source) == (
            f"{tmp_path}: files that are not read: other.jsonl: not named after a split, as others are ({split!r} is read)."
        )


def test_rows_that_share_a_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(
        '\n [{"text": "a"}, {"text": "b"}, 3,\n{"text": "c"}, {"text": "d", "text": "e"}, {"text": "f"}\n,\n]\n'
    )
    assert read(path) == [
        ({"text": "a"}, f"{path}:2", None),
        ({"text": "b"}, f"{path}:2 (row 2)", None),
        ({}, f"{path}:2 (row 3)", "a row must be a JSON object with named fields, this is a int"),
        ({"text": "c"}, f"{path}:3", None),
        ({}, f"{path}:3 (row 5)", "the key 'text' occurs more than once in an object; leave one of them"),
        ({"text": "f"}, f"{path}:3 (row 6)", None),
    ]


@pytest.mark.parametrize("rest", ['[{"text": "b"}]', '{"text": "b"}\n{"text": "c"}', "oops", "]", ","])
def test_what_follows_an_array_is_not_passed_over(tmp_path, rest):
    path = tmp_path / "rows.json"
    path.write_text(f'[{{"text": "a"}}]\n \n{rest}\n')
    assert read(path) == [
        ({"text": "a"}, f"{path}:1", None),
        ({}, f"{path}:3", "more follows the array; write one array, or one row per line (.jsonl)"),
    ]


def test_several_objects_on_a_line_and_other_broken_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        '{"text": "a"}{"text": "b"}',
        '{"text": "a"}, {"text": "b"}',
        '{"x": {"y": 1, "y": 2}, "z": [{"w": 1, "w": 1}]}',
        f'{{"n": {"9" * 4301}}}',
        f'{{"n": {"[" * 3000}{"]" * 3000}}}',
        '{"text": "\\ud83d"}',
        '{"text": "\\ud83d\\ude00 \\u00e9"}',
        "\0",
    ]
    path.write_text("\n\n".join(lines))  # no line break at the end
    assert [(row.data, row.origin.rpartition(":")[2], row.error) for row in iter_rows(Source(str(path)))] == [
        ({}, "1", "not one JSON object: more follows at column 14; write one row per line"),
        ({}, "3", "not one JSON object: more follows at column 14; write one row per line"),
        ({}, "5", "the key 'y' occurs more than once in an object; leave one of them"),
        ({}, "7", "not valid JSON: a number has too many digits; write it as a string"),
        ({}, "9", "JSON nested too deeply"),
        ({}, "11", "half of a surrogate pair (\\ud800 to \\udfff) is not a character; write both halves, or neither"),
        ({"text": "😀 é"}, "13", None),
        ({}, "15", "not valid JSON: Expecting value at column 1"),
    ]
    path = tmp_path / "rows.json"
    for line, reason in [(lines[3], "a number has too many digits"), (lines[4], "nested too deeply")]:
        path.write_text(f'[{{"text": "a"}},\n{line}, {{"text": "b"}}]')
        (_, origin, error) = read(path)[-1]
        assert origin == f"{path}:2" and reason in error and error.endswith("; the rest of the file is not read")


def test_a_repeated_column_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,completion\np,FIRST,SECOND\n")
    said = "the header names 'completion' more than once, so which value counts would be a guess. Rename one, or remove it."
    with pytest.raises(DataError, match=f"^{path}: {said}$"):
        read(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    inner = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["x", "x"])
    pq.write_table(pa.Table.from_arrays([inner], names=["m"]), path)
    with pytest.raises(DataError, match=r"rows.parquet: the column 'm' names 'x' more than once"):
        read(path)
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["t", "t"]), path)
    with pytest.raises(DataError, match=r"rows.parquet: the file names 't' more than once"):
        read(path)


def test_every_row_group_of_a_parquet_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    rows = [{"text": str(number)} for number in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=300)
    assert [(data, origin) for data, origin, _ in read(path)] == [
        (row, f"{path}:{number + 1}") for number, row in enumerate(rows)
    ]


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
        (
            Source("package:bfc"),
            "package:bfc: no such data package. Did you mean package:bfcl? There are package:bfcl, package:rlm_expert, "
            "package:gsm8k, package:medquad, package:novels.",
        ),
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

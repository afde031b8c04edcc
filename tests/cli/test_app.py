"""What the command line makes of errors: one sentence where the user can do something, a traceback where it is our fault."""

import errno

import pytest

from eaftdrope.cli import main
from eaftdrope.cli import validate as verb_module
from eaftdrope.cli.app import SINGLE_PROCESS
from eaftdrope.errors import UserError, printable


@pytest.fixture
def raising(monkeypatch, tmp_path, capsys):
    """raising(error): exit code and stderr of a verb that raises it."""
    (tmp_path / "mine.yaml").write_text("model: org/model\ndata: {train: org/rows}\noutput: {dir: runs/x}\n")

    def start(error):
        def fail(*arguments):
            raise error

        monkeypatch.setattr(verb_module, "load_recipe", fail)
        with pytest.raises(SystemExit) as stop:
            main(["validate", str(tmp_path / "mine.yaml")])
        return stop.value.code, capsys.readouterr().err

    return start


def test_an_end_of_file_is_not_told_as_aborted(raising, capsys):
    with pytest.raises(RuntimeError, match="a file ended before it should") as caught:
        raising(EOFError())
    assert isinstance(caught.value.__cause__, EOFError) and "Aborted" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR])
def test_what_the_disk_refuses_is_one_sentence(number, raising):
    error = OSError(number, "what the system says", "runs/\x1b[x")
    assert raising(error) == (
        2,
        "runs/\\x1b[x: what the system says. Choose another place, or change this one.\n",
    )


def test_a_fault_of_ours_is_a_traceback(raising):
    with pytest.raises(FileNotFoundError):
        raising(FileNotFoundError(errno.ENOENT, "gone", "x"))
    with pytest.raises(KeyError):
        raising(KeyError("x"))


def test_an_error_steers_no_terminal(raising):
    assert raising(UserError("a\x1b[2J\nb\u202e é \U0001f600")) == (2, "a\\x1b[2J\nb\\u202e é \U0001f600\n")
    assert printable("a\tb\n\udcff", lines=True) == "a\tb\n\\udcff" and printable("a\nb") == "a\\nb"


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "3", "LOCAL_RANK": "3"}, False),
        # the first of another machine, whose disk may be another
        ({"RANK": "8", "LOCAL_RANK": "0"}, True),
        ({"RANK": "3"}, False),
        ({}, True),
    ],
)
def test_an_error_is_told_once_a_machine(environment, told, raising, monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert raising(UserError("wrong")) == (2, "wrong\n" if told else "")


def test_one_process_that_fails_by_itself_is_told_with_its_rank(raising, monkeypatch):
    import torch.distributed

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert raising(UserError("wrong")) == (2, "rank 3: wrong\n")


@pytest.mark.parametrize("verb", SINGLE_PROCESS)
def test_verbs_that_run_alone_refuse_several_processes(verb, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = {
        "merge": ["a", "b"],
        "convert": ["a", "b"],
        "drope": ["temperature", "a"],
        "ttt": ["ask", "a", "b"],
        "ask": ["a", "b", "c"],
    }
    arguments = {**arguments, "rlm": ["replay", "a"]}.get(verb, ["a"])
    with pytest.raises(SystemExit) as stop:
        main([verb, *arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"{verb} runs in one process, and this is one of 2 (WORLD_SIZE): each would do and write the same. "
        f"Run `eaftdrope {verb}` without accelerate launch or torchrun; only train uses several processes.\n"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "[]"),
        ("run.json", "{}"),
        ("run.json", '{"status": "finished", "recipe": []}'),
        ("eval.json", '{"schema": 1}'),
        ("probe.json", "3"),
        ("inspect.json", '{"rows": 1'),
        ("compare.json", '{"arms": null}'),
    ],
)
def test_a_damaged_result_is_named(name, content, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith(str(tmp_path / name)), err
    assert "so no report can be built." in err and "Traceback" not in err


def test_an_earlier_name_of_a_verb_works_and_prints_the_new_one(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--help"])
    shown = capsys.readouterr()
    assert not stop.value.code
    assert shown.err == "`eaftdrope probe` is now `eaftdrope context`.\n"
    assert shown.out.startswith("Usage: eaftdrope context ")

"""`eaftdrope convert` and `eaftdrope drope check` as they are typed."""

import json
import os
import re

import pytest
from transformers import AutoModelForCausalLM

from eaftdrope.cli import main
from tests.drope.architectures import LENGTH, save
from tests.tiny_run import hashes


@pytest.fixture
def source(tmp_path):
    return save("Llama", tmp_path / "source")


def run(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_convert_reports_checks_and_engines_and_undo_restores(source, tmp_path, capsys):
    code, out, _ = run(capsys, "convert", source, tmp_path / "new", "--max-length", 256)
    assert code == 0
    assert re.search(r"converted +.*\(LlamaForCausalLM\) into .*new in \d", out)
    assert "trained on 64 tokens, announces 256" in out and out.count("ok    ") == 6
    for engine in ("transformers 5", "transformers 4", "llama.cpp"):
        assert re.search(rf"^{re.escape(engine)} .*\(run\) +correct", out, re.MULTILINE)
    for engine in ("vLLM", "SGLang"):
        assert re.search(rf"^{engine} .*\(not run\) +not known +not run", out, re.MULTILINE)
    code, out, _ = run(capsys, "convert", "--undo", tmp_path / "new", tmp_path / "back")
    assert code == 0 and hashes(tmp_path / "back") == hashes(source)


def test_a_target_length_sets_the_temperature_once(source, tmp_path, capsys):
    options = ("--target-length", 4 * LENGTH, "--slope", 0.1)
    code, out, _ = run(capsys, "convert", source, tmp_path / "new", *options)
    assert code == 0 and re.search(r"scores +times 1\.13863", out)
    code, out, _ = run(capsys, "convert", tmp_path / "new", tmp_path / "again", *options)
    assert code == 0 and re.search(r"scores +times 1\.13863", out), "folded in twice"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-length", "256"), r"--slope goes with --target-length or --by-position.*0\.103"),
        (("--slope", "0.1"), r"--slope goes with --target-length or --by-position"),
        (("--by-position", "--slope", "0.1", "--temperature", "1.1"), r"each set the temperature"),
        (("--target-length", "256", "--slope", "0.1", "--temperature", "1.1"), r"each set the temperature"),
        (("--target-length", "32", "--slope", "0.1"), r"within the trained length of 64 tokens"),
        (
            ("--undo", "--temperature", "1.1"),
            r"--undo restores the source as it was and has no other option than --copy",
        ),
        (("--undo",), r"cannot be undone: it has no drope_original/manifest\.json"),
        (("--layers", "0-1"), r"cannot express which layers"),
    ],
)
def test_what_cannot_be_honoured_is_refused(source, options, message, tmp_path, capsys):
    code, _, err = run(capsys, "convert", source, tmp_path / "new", *options)
    assert code == 2 and re.search(message, err) and "Traceback" not in err
    assert not (tmp_path / "new").exists()


def test_check_finds_and_repairs_the_keys_that_a_training_lost(source, tmp_path, capsys):
    run(capsys, "convert", source, tmp_path / "new")
    AutoModelForCausalLM.from_pretrained(tmp_path / "new").save_pretrained(tmp_path / "trained")
    code, out, _ = run(capsys, "drope", "check", tmp_path / "trained")
    assert code == 1 and "no longer has the rope keys of transformers 4" in out
    code, out, _ = run(capsys, "drope", "check", tmp_path / "trained", "--repair", "--weights")
    assert code == 0 and "repaired" in out and out.count("ok    ") == 6
    code, out, _ = run(capsys, "drope", "check", tmp_path / "trained")
    assert code == 0 and "repaired" not in out
    code, _, err = run(capsys, "drope", "check", source)
    assert code == 2 and "is not a converted checkpoint" in err


def test_check_fails_on_a_checkpoint_that_rotates(source, tmp_path, capsys):
    run(capsys, "convert", source, tmp_path / "new")
    path = tmp_path / "new" / "config.json"
    config = json.loads(path.read_text())
    config["rope_scaling"] = config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    os.unlink(path)
    path.write_text(json.dumps(config))
    code, out, _ = run(capsys, "drope", "check", tmp_path / "new")
    assert code == 1 and "FAILED equal to the identity rotation" in out


def test_into_the_current_folder_and_below_a_file(source, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    monkeypatch.chdir(tmp_path / "empty")
    for target, message in ((".", "is the current folder"), ("../file.txt/dst", "cannot be written: Not a directory")):
        code, _, err = run(capsys, "convert", source, target)
        assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_group_drope_converts_and_undoes(source, tmp_path, capsys):
    assert run(capsys, "drope", "convert", source, tmp_path / "new")[0] == 0
    code, out, _ = run(capsys, "drope", "undo", tmp_path / "new", tmp_path / "again")
    assert code == 0 and out.startswith("restored   ")
    assert (tmp_path / "again" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    code, _, err = run(capsys, "drope", "undo", source, tmp_path / "third")
    assert code == 2 and "drope_original/manifest.json" in err

"""`eaftdrope train`: what it refuses, what it tells, and that no accident costs more than the steps since a checkpoint."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from tests.tiny_run import hashes, make_project, metrics, save_rows, train, train_in_a_shell, train_in_ranks


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder


@pytest.fixture
def recipe(project):
    return project / "recipe.yaml"


@pytest.fixture
def start(recipe, tmp_path):
    """start(*overrides): the recipe's run in tmp_path/run, without probes."""
    short = ("probes.target=[]", "probes.general=[]")
    return lambda *overrides, **how: train(recipe, f"output.dir={tmp_path / 'run'}", *short, *overrides, **how)


@pytest.fixture(scope="module")
def finished(project):
    """A finished run; no test may change it."""
    run = project / "finished"
    ended = train(project / "recipe.yaml", f"output.dir={run}", "probes.general=[]", report=True)
    assert ended.code == 0, ended.out
    return run


def last_line(ended):
    return ended.out.splitlines()[-1]


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- the command ----


def test_the_command_as_people_start_it(recipe, tmp_path):
    """In a process of its own, its output piped: the plan, one line a step, the table; nothing on stderr."""
    # a name that rich would read as markup
    run = tmp_path / "[bold]run[/red]"
    code, out, err = train_in_a_shell(recipe, f"output.dir={run}", "train.gradient_checkpointing=true")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step ")] == [f"step {n}/6" for n in range(1, 7)]
    headings = [line for line in lines if line.startswith(("model ", "probing after", "Before and after", "done in "))]
    assert [line.split()[0] for line in headings] == ["model", *["probing"] * 4, "Before", "done"]
    assert "\x1b" not in out and f"the result is in {run}" in out.replace("\n", "")


def test_dry_run_writes_nothing(recipe, project, tmp_path):
    before = listing(project)
    ended = train(recipe, f"output.dir={tmp_path / 'run'}", "--dry-run")
    assert ended.code == 0
    assert listing(tmp_path) == []
    assert listing(project) == before
    plan = {line[:14].strip(): line[14:] for line in ended.out.splitlines() if line[:14].strip()}
    assert plan["model"] == f"{project / 'model'} (LlamaForCausalLM, 26,912 parameters)"
    assert plan["trained"] == "4,096 parameters (15.22%), LoRA r 4, alpha 8"
    assert plan["steps"].startswith("6, ")
    assert {"weights", "gradients", "optimizer", "activations", "loss tile"} <= plan.keys()
    assert plan["writes"] == f"{tmp_path / 'run'}/"
    assert "checkpoints every 2 steps, 10 kept" in ended.out
    assert "step 1/6" not in ended.out


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
def test_a_finished_run_is_left_alone(recipe, finished, option):
    before = hashes(finished)
    ended = train(recipe, f"output.dir={finished}", "probes.general=[]", *option)
    assert ended == (
        2,
        f"{finished} holds a finished run. Nothing was changed: choose another folder with output.dir=..., or pass "
        "--overwrite to delete it and start over.\n",
    )
    assert hashes(finished) == before


def bad_rows(folder):
    save_rows(folder / "bad.jsonl")
    with open(folder / "bad.jsonl", "a") as file:
        file.write('{"messages": "hello"}\n')
    return f"data.train={folder / 'bad.jsonl'}"


def no_weights(folder):
    from tests.tiny_models import save_model

    (save_model(folder / "broken") / "model.safetensors").unlink()
    return f"model={folder / 'broken'}"


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (bad_rows, "bad.jsonl:25"),
        (no_weights, "the model of "),
        (lambda folder: "lora.target_modules=[no_such_module]", "no_such_module"),
        (lambda folder: "train.lerning_rate=1", "learning_rate"),
    ],
    ids=["data", "weights", "adapter", "recipe"],
)
def test_overwrite_deletes_nothing_for_a_run_that_can_not_begin(recipe, finished, tmp_path, fault, text):
    before = hashes(finished)
    ended = train(recipe, f"output.dir={finished}", fault(tmp_path), "--overwrite")
    assert ended.code == 2, ended.out
    assert text in ended.out
    assert "Traceback" not in ended.out
    assert hashes(finished) == before


def test_overwrite_starts_anew(start, tmp_path):
    assert start("train.steps=4").code == 0
    old = metrics(tmp_path / "run")
    ended = start("train.steps=2", "train.save_every=1", "--overwrite")
    assert ended.code == 0, ended.out
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["README.md", "checkpoint-1", "checkpoint-2"]
    assert [row["step"] for row in old] == [1, 2, 3, 4]
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_other_data_under_the_same_name_are_refused(start, tmp_path):
    """The recipe is the same, its file is not: other rows, and as many of the same lengths. How often is saved may change."""
    rows = save_rows(tmp_path / "rows.jsonl")
    override = f"data.train={rows}"
    assert start(override, moment="in step 4, after a checkpoint").code == -signal.SIGKILL
    text = rows.read_text()
    save_rows(rows, 20)
    ended = start(override)
    assert ended.code == 2
    assert re.search(
        r"holds an unfinished run on other data: 24 rows .* then, 20 rows .* now\. Nothing", last_line(ended)
    )
    rows.write_text(text.replace("It is", "No ix"))
    ended = start(override)
    assert ended.code == 2
    assert "holds an unfinished run, and the training rows changed since its start. Restore the" in last_line(ended)
    rows.write_text(text)
    ended = start(override, "train.save_every=1", "train.keep_checkpoints=3", "train.log_every=2")
    assert ended.code == 0, ended.out
    run = tmp_path / "run"
    assert sorted(os.listdir(run / "checkpoints")) == ["README.md", "checkpoint-4", "checkpoint-5", "checkpoint-6"]
    assert [row["step"] for row in metrics(run)] == [1, 2, 4, 6]


def test_what_a_finished_run_lacks_is_completed_without_training(recipe, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    card = (run / "README.md").read_text()
    model = finished.parent / "model"
    for name in ("README.md", "report.html"):
        (run / name).unlink()
    before = hashes(run)
    ended = train(recipe, f"output.dir={run}", "probes.general=[]", report=True)
    assert ended.code == 0, ended.out
    assert f"trained in {run}; missing: README.md, report.html" in ended.out.replace("\n", " ")
    assert "step " not in ended.out and "probing" not in ended.out and "Before and after" in ended.out
    # the heading is the folder's name, and the base model is named as it is seen from the folder
    card = card.replace("# finished\n", "# run\n").replace('"../model"', f'"{os.path.relpath(model, run)}"')
    assert (run / "README.md").read_text() == card
    after = hashes(run)
    assert {name for name in after if after[name] != before.get(name)} == {"README.md", "report.html"}


# ---- Ctrl-C ----


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        ("while loading", "Interrupted while loading, before anything was changed. Start the same command again."),
        (
            "in step 2, before a checkpoint",
            "Interrupted at step 2 of 6. The same command resumes from checkpoint-2.",
        ),
        ("in step 3, after a checkpoint", "Interrupted at step 3 of 6. The same command resumes from checkpoint-3."),
        (
            "in a checkpoint, before its optimizer",
            "Interrupted at step 5 of 6. The same command resumes from checkpoint-5.",
        ),
        ("after training", "Interrupted after training. The same command resumes from checkpoint-6."),
    ],
)
def test_interrupted(start, moment, text):
    """The step is finished and saved; one line, the shell's exit code, and the same command resumes."""
    ended = start(moment=moment, signal_number=signal.SIGINT)
    assert (ended.code, last_line(ended)) == (130, text)
    assert "Traceback" not in ended.out
    if checkpoint := re.search(r"checkpoint-\d", text):
        assert f"resuming from {checkpoint[0]} of 6" in start().out


def test_interrupted_with_overwrite(start):
    """The same command would delete what there is to go on from."""
    assert start().code == 0
    ended = start("--overwrite", moment="in step 4, after a checkpoint", signal_number=signal.SIGINT)
    assert last_line(ended) == (
        "Interrupted at step 4 of 6. The same command without --overwrite resumes from checkpoint-4."
    )


def test_interrupted_while_probing(recipe, tmp_path):
    ended = train(recipe, f"output.dir={tmp_path / 'run'}", moment="while probing before", signal_number=signal.SIGINT)
    assert (ended.code, last_line(ended)) == (
        130,
        "Interrupted while probing before training. The same command trains from the beginning.",
    )


@pytest.mark.parametrize("moment", ["in step 4, after a checkpoint", "while probing before"])
def test_the_terminal_is_itself_again(recipe, tmp_path, moment, monkeypatch):
    """The cursor is shown, and the last words stand below the display."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    master, terminal = pty.openpty()
    read = []

    def listen():
        while True:
            try:
                data = os.read(master, 4096)
            except OSError:
                return
            read.append(data)

    listener = threading.Thread(target=listen)
    listener.start()
    ended = train(
        recipe,
        f"output.dir={tmp_path / 'run'}",
        moment=moment,
        signal_number=signal.SIGINT,
        tty=os.ttyname(terminal),
    )
    os.close(terminal)
    listener.join(10)
    os.close(master)
    screen = b"".join(read).decode()
    assert ended.code == 130
    hidden, shown = screen.rfind("\x1b[?25l"), screen.rfind("\x1b[?25h")
    assert 0 < hidden < shown
    last = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", screen).rstrip().splitlines()[-1]
    assert last.startswith("Interrupted ")
    assert shown < screen.rfind("Interrupted ")
    assert "Traceback" not in screen


# ---- disks ----


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kilobytes): tmp_path/run on a disk of that size; a second call gives it another."""
    run = tmp_path / "run"

    def mount(kilobytes):
        again = run.is_mount()
        run.mkdir(exist_ok=True)
        options = f"{'remount,' if again else ''}size={kilobytes}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", run], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here, so none can be full: {done.stderr.strip()}")

    yield mount
    if run.is_mount():
        subprocess.run(["umount", run], check=True)


@pytest.mark.parametrize("kilobytes", [4, 8, 100, 240, 400])
def test_a_full_disk(start, small_disk, tmp_path, kilobytes):
    """Whatever was being written (run.json, weights, tokenizer, optimizer, random state), the run goes on later."""
    small_disk(kilobytes)
    ended = start()
    assert ended.code == 2, ended.out
    run = tmp_path / "run"
    assert re.fullmatch(
        rf"the disk of {run} is full \(.+\)\. Complete files are kept: free some space and run the same command again "
        rf"\(without --overwrite\) to resume\.|cannot write {run}/(metrics|landscape)\.jsonl: the disk is full\. .+",
        last_line(ended),
    )
    assert "Traceback" not in ended.out
    whole = re.findall(r"^saved .*(checkpoint-\d)$", ended.out, re.MULTILINE)
    small_disk(10_000)
    ended = start()
    assert ended.code == 0, ended.out
    assert re.findall(r"^resuming from (\S+) of 6", ended.out, re.MULTILINE) == whole[-1:]
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_an_unwritable_folder_is_told_before_anything_is_loaded(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    ended = train(recipe, f"output.dir={tmp_path / 'file' / 'run'}", moment=None)
    assert ended == (
        2,
        f"{tmp_path / 'file' / 'run'} cannot be created: {tmp_path / 'file'} is a file. Choose another folder with "
        "output.dir=...\n",
    )


# ---- a loss that is no number ----


def test_a_diverged_training_stops(start, tmp_path):
    ended = start("train.learning_rate=1e30", "lora=null")
    assert ended.code == 2
    assert re.fullmatch(
        r"training diverged: the gradient norm became NaN or infinite in step 2 \(rows (\S+rows\.jsonl:\d+(, )?){4}\)\. The "
        r"first suspect is the learning rate \(1e\+30\): lower it, or warm it up over more steps\. The second is that step's "
        r"rows\. No checkpoint was written before it: start over \(a recipe with --overwrite\)\.",
        last_line(ended),
    )
    assert "Traceback" not in ended.out
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint-2").exists()


# ---- several processes ----

_LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.engines
def test_two_processes(recipe, tmp_path):
    """One table, one file of metrics, the other process silent; half the batch on each is the same training."""
    launch = (*_LAUNCH, "-m", "eaftdrope", "train")
    run, alone = tmp_path / "run", tmp_path / "alone"
    common = ("lora.dropout=0", "probes.general=[]")
    arguments = (recipe, f"output.dir={run}", *common, "train.batch_size=2")
    code, out, err = train_in_a_shell(*arguments, command=launch, ACCELERATE_USE_CPU="true")
    assert code == 0, err
    assert out.count("Before and after") == 1
    assert [line.split()[1] for line in out.splitlines() if line.startswith("step ")] == [f"{n}/6" for n in range(1, 7)]
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert train(recipe, f"output.dir={alone}", *common).code == 0
    for row, other in zip(rows, metrics(alone), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
    # again: both see the finished run, and both stop
    ranks = train_in_ranks(*arguments)
    assert [rank.code for rank in ranks] == [2, 2]
    assert "holds a finished run" in ranks[0].err
    # and an unfinished one goes on
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**state, "status": "running"}))
    (run / "checkpoints" / "checkpoint-6" / "rng_state_1.pth").unlink()
    weights = hashes(run)["adapter_model.safetensors"]
    ranks = train_in_ranks(*arguments)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    assert "resuming from checkpoint-4 of 6" in ranks[0].out
    assert metrics(run) == rows
    assert hashes(run)["adapter_model.safetensors"] == weights

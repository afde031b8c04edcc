"""recipes/distributed: what the recipe's header states, and the files that start it on several machines."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eaftdrope.recipe import load_recipe
from eaftdrope.run.degrees import parallel_environment
from eaftdrope.run.machine import Device
from eaftdrope.run.plan import make_plan
from eaftdrope.run.settings import eaft_settings
from tests.run.full_size import MODELS
from tests.tiny_run import make_project

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "distributed"
SCRIPTS = ("torchrun.sh", "accelerate.sh", "slurm.sh")


@pytest.mark.parametrize(
    ("processes", "changes", "needed"),
    [(8, [], 105), (16, ["data.max_length=8192", "train.accumulation=4"], 58)],
)
def test_the_header_has_the_estimate_and_the_rows(processes, changes, needed):
    recipe = load_recipe(FOLDER / "math_32b.yaml", changes)
    device = Device("cuda", "a GPU", 80 * 10**9)
    with parallel_environment(recipe.parallel, planned=processes):
        plan = make_plan(eaft_settings(recipe), MODELS[recipe.model.reference][0](), autocast=True, device=device)
    assert plan.rows_per_step == 64
    assert round(plan.memory.total / 1e9) == needed
    assert f"({needed} GB" in (FOLDER / "math_32b.yaml").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_and_bash_can_read_them(name):
    assert os.access(FOLDER / name, os.X_OK)
    check = [shutil.which("shellcheck")] if shutil.which("shellcheck") else ["bash", "-n"]
    read = subprocess.run([*check, str(FOLDER / name)], capture_output=True, text=True)
    assert read.returncode == 0, read.stdout + read.stderr


@pytest.mark.parametrize(
    ("name", "environment", "expected"),
    [
        (
            "torchrun.sh",
            {"NODES": "2", "HEAD": "10.0.0.1", "GPUS": "4"},
            "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500 --rdzv-id mine "
            "--max-restarts 3 --shutdown-timeout 600 -m eaftdrope train mine.yaml train.steps=2",
        ),
        (
            "accelerate.sh",
            {"NODES": "2", "HEAD": "10.0.0.1", "NODE_RANK": "1"},
            "accelerate launch --multi_gpu --num_machines 2 --machine_rank 1 --num_processes 16 --main_process_ip 10.0.0.1 "
            "--main_process_port 29500 -m eaftdrope train mine.yaml train.steps=2",
        ),
        (
            "slurm.sh",
            {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"},
            "srun torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint n1:29500 --rdzv-id 7-0 "
            "--max-restarts 3 --shutdown-timeout 240 -m eaftdrope train mine.yaml train.steps=2",
        ),
    ],
)
def test_the_command_of_a_script(tmp_path, name, environment, expected):
    """Programs that print their arguments stand for the launchers."""
    for program in ("torchrun", "accelerate", "srun"):
        (tmp_path / program).write_text(f'#!/bin/sh\necho {program} "$@"\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho n1\necho n2\n")
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    script = [str(FOLDER / name), "mine.yaml", "train.steps=2"]
    ended = subprocess.run(script, capture_output=True, text=True, env={"PATH": path, **environment})
    assert ended.stdout == expected + "\n", ended.stderr


@pytest.mark.engines
def test_two_processes_by_torchrun(tmp_path):
    recipe, run = make_project(tmp_path), tmp_path / "run"
    arguments = ("lora=null", "train.steps=2", "train.batch_size=2", "probes.target=[]", "probes.general=[]")
    environment = {"GPUS": "2", "PORT": "29653", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        [str(FOLDER / "torchrun.sh"), str(recipe), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, **environment, "PATH": path},
    )
    assert ended.returncode == 0, ended.stderr
    assert "parallel      2 processes: replicas 2, 2 data-parallel ranks\n" in ended.stdout
    assert json.loads((run / "run.json").read_text())["status"] == "finished"

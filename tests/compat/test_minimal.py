"""eaftdrope installed with `--no-deps` beside few packages (`make test-minimal`): the loss, apply_eaft, convert and eval."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

PYTHON = os.environ.get("EAFTDROPE_MINIMAL")


@pytest.mark.skipif(PYTHON is None, reason="EAFTDROPE_MINIMAL is not set: run `make test-minimal`")
def test_the_loss_convert_and_eval_work_without_trl_and_peft(tmp_path):
    script = Path(__file__).with_name("minimal.py")
    environment = {**os.environ, "EAFTDROPE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([PYTHON, script, tmp_path], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["here"] == []
    assert result["difference"] < 1e-5
    assert result["losses"][-1] < 0.6 * result["losses"][0]
    # the first of the trainer's packages that is missing
    assert re.fullmatch(r"(\w+) is needed here and is not installed: pip install \1", result["trainer"])
    assert result["help"]["code"] == result["convert"]["code"] == result["eval"]["code"] == 0, result
    scores = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert len(scores["models"]) == 2
    assert "no report: matplotlib is needed here" in " ".join(result["eval"]["out"].split())

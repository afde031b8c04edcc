"""Every example runs, as its reader would run it, and prints what it promises."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest

from eaftdrope.recipe import load_recipe
from eaftdrope.report.page import write_report
from tests import forked

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMISED = {
    "one_line_trl.py": r"step 4: loss \d+\.\d+  gate 0\.\d+",
    "plain_trainer.py": r"eaft/gate_mean",
    "own_loop.py": r"step 2: ce \d+\.\d+  gate 0\.\d+",
    "drope_convert.py": r"perplexity \d+\.\d with rotary embedding, \d+\.\d without(.|\n)*configuration restored: True",
    "custom_gate.py": r"mean gate 0\.\d+ over 384 trained tokens",
    "rlm_ask.py": r"Bergen after 2 turns and 2,000 sub-calls\nreplayed without a model: Bergen",
    "ttt_read.py": r"from  512: \d\.\d+ nats without, \d\.\d+ with learning\nthe state: 768 tokens read, 5 chunks learned",
}
# a real model, several steps: own_loop.py trains it too, in fewer
TRAINERS = ("one_line_trl.py", "plain_trainer.py")


RUN = """
import resource, runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
used = resource.getrusage(resource.RUSAGE_SELF)
print("CPU seconds:", used.ru_utime + used.ru_stime)
"""


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PROMISED)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.end_to_end if name in TRAINERS else pytest.mark.slow) for name in PROMISED],
)
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = forked.run_source(RUN, EXAMPLES / name)
    assert run.code == 0, run.err[-3000:]
    assert re.search(PROMISED[name], run.out), run.out[-2000:]
    # processor time, which does not depend on what else the machine does: two minutes of two cores
    assert float(run.out.rpartition("CPU seconds:")[2]) < 240


@pytest.mark.parametrize("recipe", ["medical.yaml", "math.yaml", "tool_use.yaml"])
def test_the_study_s_recipes_are_valid_beside_their_data(recipe, tmp_path, monkeypatch):
    text = (EXAMPLES / "study" / recipe).read_text()
    (tmp_path / "data").mkdir()
    for name in re.findall(r"data/[a-z0-9_]+\.jsonl", text):
        (tmp_path / name).write_text(json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(EXAMPLES / "study" / recipe).train.learning_rate == 5e-4


@pytest.mark.parametrize(
    "result",
    ["medical", "medical_constant", "medical_conflict_mask", "medical_gates", "math", "tool_use", "tool_use_dft"],
)
def test_the_study_s_results_can_be_drawn_again(result, tmp_path):
    folder = shutil.copytree(EXAMPLES / "study/results" / result, tmp_path / result)
    page = write_report(folder).read_text()
    verdict = json.loads((folder / "compare.json").read_text())["verdict"]
    assert html.escape(verdict) in page

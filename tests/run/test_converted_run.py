"""A run's folder as the source of a conversion: the model is carried over, the run's records are not."""

import pytest

from eaftdrope.drope.checkpoint import _RUN_RECORDS, carried_files
from eaftdrope.report import page, system
from eaftdrope.run import folder, record, recovery, samples

MODEL = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "modeling_mine.py")


@pytest.fixture
def run(tmp_path):
    for name in (*MODEL, *_RUN_RECORDS):
        file = tmp_path / name if "." in name else tmp_path / name / "inside.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    return tmp_path


def test_records_stay_behind(run):
    assert carried_files(run) == (sorted(MODEL), [])


def test_files_of_these_names_belong_to_a_checkpoint_that_is_no_run(run):
    (run / record.NAME).unlink()
    assert {"report.html", "ask/inside.json"} <= set(carried_files(run)[0])


def test_the_records_are_those_that_a_run_writes():
    written = {record.NAME, record.RECIPE_NAME, record.SERVE_FILE, folder.CAPTURE_FILE, folder.MERGED}
    written |= {recovery.RECOVERY_FILE, samples.SAMPLES_FILE, page.NAME, system.SYSTEM_NAME, system.ABLATIONS}
    assert written | {system.ANSWERS.parts[0]} <= _RUN_RECORDS

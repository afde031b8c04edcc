"""The processes of a run, from the environment of a launcher."""

import pytest

from eaftdrope.processes import is_local_main_process, is_main_process, process_count


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (1, True, True)),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}, (4, True, True)),
        ({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"}, (4, False, True)),
        ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}, (4, False, False)),
        ({"WORLD_SIZE": "2", "RANK": "1"}, (2, False, False)),
    ],
)
def test_from_the_environment(environment, expected, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (process_count(), is_main_process(), is_local_main_process()) == expected

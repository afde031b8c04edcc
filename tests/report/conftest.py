import pytest

from eaftdrope.report.page import write_report, write_side_by_side
from tests.report.planted import FOLDERS, run_folder
from tests.report.planted_rlm import RLM_FOLDERS


@pytest.fixture(scope="session")
def reports(tmp_path_factory):
    """Name -> page for every kind of folder, and for two runs side by side; tests must not change them."""
    base = tmp_path_factory.mktemp("reports")
    pages = {name: write_report(make(base / name)) for name, make in {**FOLDERS, **RLM_FOLDERS}.items()}
    worse = run_folder(base / "worse", shift=0.1)
    pages["side by side"] = write_side_by_side([base / "run", worse])
    return pages

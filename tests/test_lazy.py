"""Names of a package are imported on first use, and an unknown one is reported as Python does."""

import subprocess
import sys

import pytest

import eaftdrope
from eaftdrope import loss


@pytest.mark.parametrize("package", ["eaftdrope", "eaftdrope.loss", "eaftdrope.trainer"])
def test_every_public_name_is_there(package):
    module = sys.modules.get(package) or __import__(package, fromlist=["*"])
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)


def test_a_submodule_under_its_own_name():
    assert loss.gates.__name__ == "eaftdrope.loss.gates" and eaftdrope.gates is loss.gates


def test_an_unknown_name():
    with pytest.raises(AttributeError, match=r"^module 'eaftdrope.loss' has no attribute 'nothing'$"):
        loss.nothing  # noqa: B018


def test_gates_and_settings_load_without_torch():
    program = (
        "import sys; from eaftdrope.loss.gates import GATE_OPTIONS; from eaftdrope.loss.settings import LossSettings; "
        "LossSettings(); print(len(GATE_OPTIONS), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["13", "False"]

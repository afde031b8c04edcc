"""Converted checkpoints in environments that have stock transformers and no eaftdrope: `make test-compat` makes them."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from eaftdrope.drope import convert
from eaftdrope.drope.checkpoint import read_json
from eaftdrope.drope.engines import serving
from tests.drope.architectures import ARCHITECTURES, LENGTH, save
from tests.drope.others import OTHERS, save_other

# Something else than the rotation depends on positions, or positions have a table that ends.
POSITIONS = ("Ministral3", "llama4_text", "beam")
VERSIONS = {"4": "EAFTDROPE_COMPAT_4", "5": "EAFTDROPE_COMPAT_5"}


NO_LINEAR_FORM = ("Ministral3", "Phi3", "phimoe")
# name -> (architecture, options of convert): every architecture in every form, and what the table of engines advises
CASES = {
    **{name: (name, {}) for name in (*ARCHITECTURES, *OTHERS)},
    **{
        f"{name}, linear form": (name, {"engine": "gguf"})
        for name in (*ARCHITECTURES, *OTHERS)
        if name not in NO_LINEAR_FORM
    },
    "SmolLM3, two layers": ("SmolLM3", {"layers": "0,2"}),
    "Gemma3Text, full attention": ("Gemma3Text", {"layers": "full_attention"}),
    "Olmo3, full attention": ("Olmo3", {"layers": "full_attention"}),
    "Llama as Qwen 3, with a temperature": ("Llama", {"qk_norm": True, "temperature": 1.2}),
    "Phi3 with a temperature": ("Phi3", {"temperature": 1.2}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One converted checkpoint a case, with the logits that it must give: those of this environment's transformers, which
    test_identity.py holds to the identity rotation."""
    root = tmp_path_factory.mktemp("compat")
    for name, (architecture, options) in CASES.items():
        source = root / "sources" / architecture
        if not source.is_dir():
            (save if architecture in ARCHITECTURES else save_other)(architecture, source)
        convert(source, root / name, max_length=4 * LENGTH, **options)
        model = AutoModelForCausalLM.from_pretrained(root / name, attn_implementation="eager").eval()
        ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            torch.save(model(ids).logits, root / name / "logits.pt")
        torch.save(ids, root / name / "ids.pt")
    return root


@pytest.fixture(scope="module", params=VERSIONS)
def results(request):
    """(major version, architecture -> what stock transformers of that version made of it)."""
    python = os.environ.get(VERSIONS[request.param])
    if not python:
        pytest.skip(f"no environment with transformers {request.param}: run `make test-compat`")
    # not an argument: without an environment nothing is converted
    checkpoints = request.getfixturevalue("checkpoints")
    script = Path(__file__).with_name("stock.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(script), *(str(checkpoints / name) for name in CASES)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=checkpoints,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert all(row["transformers"].startswith(request.param + ".") and not row["eaftdrope"] for row in rows)
    return request.param, {row["folder"]: row for row in rows}


@pytest.mark.parametrize("name", CASES)
def test_is_nope_or_as_the_table_of_engines_says(name, results, request):
    version, rows = results
    checkpoints = request.getfixturevalue("checkpoints")
    verdict = {row.engine: row for row in serving(read_json(checkpoints / name / "config.json"))}[
        f"transformers {version}"
    ]
    row = rows[name]
    if verdict.verdict == "right":
        # version 4 computes Apertus' activation in another way
        assert row["difference"] < (2e-2 if name.startswith("apertus") else 2e-4), row
        if not ("full attention" in name or "two layers" in name or name.startswith(POSITIONS)) and "shift" in row:
            assert row["shift"] == 0.0
    elif verdict.verdict == "wrong":
        assert row["difference"] > 1e-2, "the table calls it silently wrong, and it is right"
    else:
        assert "error" in row

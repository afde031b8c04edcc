"""Scores that are kept: found again by content, not found when anything that could change them has changed."""

import functools
import json
import os
import shutil

import pytest
import torch

from eaftdrope.errors import UserError
from eaftdrope.evaluate import build_probes, run_probes
from eaftdrope.evaluate import score_cache as cache
from eaftdrope.evaluate.probes.multiple_choice import MultipleChoiceProbe, Question
from eaftdrope.evaluate.probes.perplexity import PerplexityProbe
from eaftdrope.evaluate.score_cache import cached_scores, plain, score_key, tokenizer_fingerprint
from eaftdrope.evaluate.suites.subject import find_subject
from tests.tiny_models import byte_tokenizer, save_model

TEXT = PerplexityProbe(["The rain fell on the town, and nobody minded. " * 4], 4096, window=64)
CHOICE = MultipleChoiceProbe([Question("Which is wet?", ("rain", "sand"), 0), Question("Two?", ("2", "three"), 0)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def measure(saved, tmp_path, monkeypatch):
    """`measure(folder, probes, ...)` -> (scores, names of the probes that were measured)."""
    monkeypatch.setenv("EAFTDROPE_CACHE", str(tmp_path / "cache"))

    def run(folder=saved, probes=(TEXT, CHOICE), setting="cpu float32", **options):
        subject, ran, scores = find_subject(str(folder)), [], []
        tokenizer = options.pop("tokenizer", None) or subject.tokenizer()

        def measured(probe):
            found = run_probes(subject.load("float32", "cpu"), tokenizer, [probe])
            ran.append(probe.name)
            return found

        for probe in probes:
            key = score_key(subject.identity(tokenizer), probe, setting)
            scores += cached_scores(key, functools.partial(measured, probe), **options)
        return scores, ran

    return run


def test_what_was_measured_is_found_again(measure, saved, tmp_path):
    first, ran = measure()
    assert ran == ["perplexity", "multiple_choice"] and len(first) == 3
    again, ran = measure()
    assert (again, ran) == (first, [])
    # by content: a copy under another name is the same model, the order of the probes is theirs
    copy = shutil.copytree(saved, tmp_path / "copy")
    turned, ran = measure(copy, (CHOICE, TEXT))
    assert (turned, ran) == ([*first[1:], first[0]], [])
    again, ran = measure(fresh=True)
    assert (again, ran) == (first, ["perplexity", "multiple_choice"])


def test_a_killed_measurement_keeps_what_it_has(measure, monkeypatch):
    def dying(*arguments, **options):
        raise KeyboardInterrupt

    whole = MultipleChoiceProbe.run
    monkeypatch.setattr(MultipleChoiceProbe, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        measure()
    monkeypatch.setattr(MultipleChoiceProbe, "run", whole)
    assert measure()[1] == ["multiple_choice"]


def test_other_weights_of_the_same_size_and_time_are_another_model(measure, saved, tmp_path):
    measure()
    other = shutil.copytree(saved, tmp_path / "other")
    file = other / "model.safetensors"
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert measure(other)[1] == ["perplexity", "multiple_choice"]


def test_configuration_and_files_beside_the_model(measure, saved, tmp_path):
    measure()
    other = shutil.copytree(saved, tmp_path / "other")
    (other / "run.json").write_text("{}")
    (other / "README.md").write_text("mine")
    assert measure(other)[1] == []
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert measure(other)[1] == ["perplexity", "multiple_choice"]
    shutil.copy(saved / "config.json", other)
    assert measure(other)[1] == []
    (other / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.3}))
    assert measure(other)[1] == ["perplexity", "multiple_choice"]


def test_weights_of_an_unknown_commit_are_never_found_again(saved, monkeypatch):
    from eaftdrope.evaluate.suites import subject
    from eaftdrope.models import ModelSource

    hub = ModelSource("org/model", "org/model", "hub")
    monkeypatch.setattr(subject, "resolve_model", lambda reference, revision=None: hub)
    one = subject.Subject("org/model", str(saved))
    assert one.fingerprint() != one.fingerprint()


def test_everything_else_that_counts(measure, monkeypatch):
    measure()
    assert measure(setting="cpu bfloat16")[1] == ["perplexity", "multiple_choice"]
    shorter = PerplexityProbe(TEXT.texts, 4096, window=32)
    assert measure(probes=[shorter, CHOICE])[1] == ["perplexity"]
    fewer = MultipleChoiceProbe(CHOICE.questions[:1])
    assert measure(probes=[TEXT, fewer])[1] == ["multiple_choice"]
    template = byte_tokenizer()
    template.chat_template = "{{ messages[0]['content'] }}"
    assert measure(tokenizer=template)[1] == ["perplexity", "multiple_choice"]
    monkeypatch.setattr(cache, "_code", lambda: ["corrected"])
    assert measure()[1] == ["perplexity", "multiple_choice"]


@pytest.fixture
def copied_code(tmp_path, monkeypatch):
    """A copy of what measures; `_code` is that of the copy and reads it each time."""
    for name in cache._CODE:
        place = cache.PACKAGE / name
        if place.is_file():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(place, tmp_path / name)
        else:
            shutil.copytree(place, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    monkeypatch.setattr(cache, "PACKAGE", tmp_path)
    monkeypatch.setattr(cache, "_code", cache._code.__wrapped__)
    return tmp_path


def test_all_code_that_reads_and_measures_is_in_the_key(copied_code):
    """Each file of evaluate/ with its folders, of data/, and what loads models: a change of any is a miss."""

    def key():
        return score_key("a model", ["probe"], "cpu float32")

    files = sorted(copied_code.rglob("*.py"))
    names = {str(file.relative_to(copied_code)) for file in files}
    assert {
        "evaluate/scores.py",
        "evaluate/long_context/needles.py",
        "data/encoding.py",
        "models/__init__.py",
        "loaded_model.py",
    } <= names
    before = key()
    for file in files:
        text = file.read_bytes()
        file.write_bytes(text + b"# corrected")
        assert key() != before, file
        file.write_bytes(text)
    assert key() == before
    (copied_code / "data" / "more.py").write_text("")
    assert key() != before


@pytest.mark.parametrize("name", ["torch", "transformers", "tokenizers", "peft", "jinja2", "flash-attn"])
def test_the_libraries_are_in_the_key(name, monkeypatch):
    monkeypatch.setattr(cache, "_code", cache._code.__wrapped__)
    before, real = score_key("a model", ["probe"], "cpu float32"), cache.version
    monkeypatch.setattr(cache, "version", lambda package: "0.0.1" if package == name else real(package))
    assert score_key("a model", ["probe"], "cpu float32") != before


def test_a_damaged_file_of_scores_is_measured_again(measure, tmp_path):
    first, _ = measure()
    files = sorted((tmp_path / "cache" / "scores").glob("*.json"))
    for file, damage in zip(files, (b"", b'[{"probe": "perplexity", "units": 3}]'), strict=True):
        file.write_bytes(damage)
    assert measure() == (first, ["perplexity", "multiple_choice"])
    files[0].write_bytes(b"\xff\xfe")
    assert len(measure()[1]) == 1 and measure() == (first, [])


def test_a_cache_that_cannot_be_written_is_known_before_measuring(measure, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EAFTDROPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=r"scores cannot be stored in .*file/scores: Not a directory\. Set EAFTDROPE_CACHE"
    ):
        measure()


def test_a_tokenizer_is_the_same_however_it_was_called():
    used, unused = byte_tokenizer(), byte_tokenizer()
    used(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert used.backend_tokenizer.to_str() != unused.backend_tokenizer.to_str()
    assert tokenizer_fingerprint(used) == tokenizer_fingerprint(unused)
    assert tokenizer_fingerprint(used) != tokenizer_fingerprint(byte_tokenizer(eos="<|end|>"))
    for setting, value in {"model_max_length": 77, "clean_up_tokenization_spaces": True}.items():
        other = byte_tokenizer()
        setattr(other, setting, value)
        assert tokenizer_fingerprint(other) != tokenizer_fingerprint(unused), setting


def test_probes_as_plain_data(tmp_path):
    wanted = [
        ("perplexity", "general", {"files": None, "max_tokens": 4096}),
        ("multiple_choice", "general", {"file": None, "limit": 2}),
    ]
    text, choice = build_probes(wanted)
    assert json.loads(json.dumps(plain(choice)))[1]["questions"][0][1]["question"].endswith("?")
    assert plain(text) != plain(choice)
    file = tmp_path / "what"
    file.write_text("a")
    before = plain(file)
    file.write_text("b")
    assert plain(file) != before
    with pytest.raises(TypeError, match="a Tensor in a probe: the cache cannot distinguish"):
        plain({"x": [torch.zeros(1)]})


def adapter_of(saved, folder, seed=0, **fields):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(saved),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **fields}))
    return folder


def test_an_adapter_is_measured_on_its_base(measure, saved, tmp_path):
    base, _ = measure()
    one, two = (adapter_of(saved, tmp_path / name, seed) for seed, name in enumerate(("one", "two")))
    adapted, ran = measure(one)
    assert ran == ["perplexity", "multiple_choice"] and adapted[0].value != base[0].value
    # as peft itself has it
    from peft import AutoPeftModelForCausalLM

    live = AutoPeftModelForCausalLM.from_pretrained(one).eval()
    assert TEXT.run(live, byte_tokenizer())[0].value == pytest.approx(adapted[0].value, rel=1e-6)
    assert measure(one)[1] == [] and measure(two)[1] == ["perplexity", "multiple_choice"]
    # another base under the same adapter
    other = shutil.copytree(saved, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    moved = adapter_of(saved, tmp_path / "moved", 0, base_model_name_or_path=str(other))
    assert measure(moved)[1] == ["perplexity", "multiple_choice"]


def test_the_adapters_own_tokens_that_end_an_answer(saved, tmp_path):
    folder = adapter_of(saved, tmp_path / "adapter")
    assert find_subject(str(folder)).load("float32", "cpu").generation_config.eos_token_id == 2
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    assert find_subject(str(folder)).load("float32", "cpu").generation_config.eos_token_id == [2, 3]


def test_wrong_adapters_are_refused(saved, tmp_path):
    folder = adapter_of(saved, tmp_path / "adapter", base_model_name_or_path="./gone")
    with pytest.raises(
        ValueError, match=r"the base model of the adapter .* cannot be used: model './gone': there is no"
    ):
        find_subject(str(folder))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json but no adapter_model\.safetensors\. Was its saving"):
        find_subject(str(folder))
    with pytest.raises(ValueError, match=r"is neither a local folder nor a hub id"):
        find_subject("gone")

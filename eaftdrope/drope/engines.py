"""Engine support: which engines serve a converted checkpoint, as run by tests, or else as read in their source.

The rules are data. "right", "wrong" and "refused" are the results of `make test-compat`, which ran the engine on a class in
that form: tests/compat holds this file to them, class by class. What was not run is "unknown", with the behaviour in the
engine's source if that was read. Silent errors matter most: an engine that still rotates gives fluent, worse text and no
error.

Sources read: vLLM model_executor/layers/rotary_embedding (Llama3RotaryEmbedding, LinearScalingRotaryEmbedding,
Phi3LongRoPE) and config/model.py; SGLang srt/layers/rotary_embedding (factory, rope_variant), models/gemma3_causal.py,
olmo2.py, ministral3.py; llama.cpp conversion base.py and llama.py (generate_extra_tensors), src/models/qwen3.cpp,
smollm3.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import read_json
from .config import RECORD, text_part

VERSIONS = {
    "transformers 5": "5.23",
    "transformers 4": "4.57",
    "vLLM": "0.33.0",
    "SGLang": "0.5.23",
    "llama.cpp": "xllamacpp 2026.10",
}
# Run in transformers 4 and 5, in the llama3 and the linear form (Phi-3 and PhiMoE in theirs), and correct in both.
_RUN_IN_BOTH = frozenset(
    [
        "apertus",
        "arcee",
        "aria_text",
        "bamba",
        "bitnet",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "diffllama",
        "doge",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "falcon",
        "falcon_h1",
        "flex_olmo",
        "gemma",
        "gemma2",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt_neox",
        "gpt_neox_japanese",
        "gpt_oss",
        "granite",
        "granitemoe",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "jetmoe",
        "lfm2",
        "llama",
        "minimax",
        "ministral",
        "mistral",
        "mixtral",
        "olmoe",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
        "vaultgemma",
    ]
)
# Run in both and correct in 5; 4 does not have these classes.
_ONLY_IN_5 = frozenset(
    [
        "afmoe",
        "axk1",
        "bailing_hybrid",
        "beam",
        "cohere2_moe",
        "cwm",
        "deepseek_v32",
        "exaone_moe",
        "flint",
        "gemma4_text",
        "glm4_moe_lite",
        "granite_swa",
        "hrm_text",
        "hy_v3",
        "hyperclovax",
        "jais2",
        "kolibri1",
        "laguna",
        "lfm2_moe",
        "lfm3",
        "mellum",
        "mimo_v2_flash",
        "minicpm3",
        "minimax_m2",
        "minimax_m3_vl_text",
        "ministral3",
        "nanochat",
        "olmo_hybrid",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "solar_open",
        "youtu",
    ]
)
# Run in both and correct in 5; for 4, see below.
_TYPES_BY_LAYER = ("gemma3_text", "gemma3n_text", "olmo3")
_NO_SCALING_IN_4 = ("modernbert-decoder", "nemotron")
_LINEAR_IN_4 = ("olmo", "olmo2")
_RUN = _RUN_IN_BOTH | _ONLY_IN_5 | {*_TYPES_BY_LAYER, *_NO_SCALING_IN_4, *_LINEAR_IN_4, "llama4_text"}
# Classes whose rotary embedding was followed through the engine's source.
_READ = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3")
# Classes for which llama.cpp's converter writes frequency factors in the llama3 form.
_LLAMA_CONVERTER = ("llama", "mistral", "granite", "smollm3")
_NO_LINEAR = "refuses to load: its linear rope builds a table of length x factor. Convert without --for gguf"
_COMPARE = "compare a few greedy answers with transformers first"
_GGUF_WAY_OUT = (
    "convert again with --for gguf before making the GGUF, or serve any GGUF with `--rope-scaling linear "
    "--rope-freq-scale 1e-30`"
)


class Serving(NamedTuple):
    """One engine's support. `verdict`: "right", "wrong" (silently rotates), "refused" (an error at loading), "unknown"."""

    engine: str
    version: str
    verdict: str
    note: str


def serving(raw: dict[str, Any]) -> list[Serving]:
    """Return a verdict per engine for the config.json content of a converted checkpoint."""
    part, record = text_part(raw), raw[RECORD]
    kind, form, layers = part["model_type"], record["form"], record["layers"]
    # a multimodal class is not that of its text part, which was run
    whole = kind if part is raw else raw["model_type"]
    rows = []
    for engine, rule in (("transformers 5", _transformers_5), ("transformers 4", _transformers_4)):
        verdict, note = rule(whole, form, layers)
        rows.append(
            Serving(engine, f"{VERSIONS[engine]} ({'not run' if verdict == 'unknown' else 'run'})", verdict, note)
        )
    for engine, rule in (("vLLM", _vllm), ("SGLang", _sglang)):
        behaviour = rule(kind, form, layers)
        note = (
            f"not run. By its source it {behaviour}" if behaviour else f"not run, and its source not read: {_COMPARE}"
        )
        rows.append(Serving(engine, f"{VERSIONS[engine]} (not run)", "unknown", note))
    return [*rows, _llama_cpp(whole, form, layers)]


def _was_run(kind: str, form: str, layers: str) -> bool:
    """Return whether `make test-compat` runs this class in this form, without rotation in these layers."""
    some = (kind in ("gemma3_text", "olmo3") and layers == "full_attention") or kind == "smollm3"
    return kind in _RUN and (layers == "all" or (some and form == "llama3"))


def _transformers_5(kind: str, form: str, layers: str) -> tuple[str, str]:
    if _was_run(kind, form, layers):
        return "right", ""
    return (
        "unknown",
        "this class was not run in stock transformers; the checks of the conversion ran on it where it was made",
    )


def _transformers_4(kind: str, form: str, layers: str) -> tuple[str, str]:
    if not _was_run(kind, form, layers):
        return "unknown", f"this class was not run in it: {_COMPARE} 5"
    if kind in _ONLY_IN_5:
        return "refused", "version 4 does not have this class"
    if kind in _TYPES_BY_LAYER and "sliding_attention" in _types(layers):
        return "wrong", (
            "sliding-window layers keep their rotation: version 4 has no key for it. Use transformers 5, or convert with "
            "--layers full_attention"
        )
    if kind in _NO_SCALING_IN_4:
        return "wrong", "version 4's class reads no rope scaling, and rotates. Use transformers 5"
    if kind in _LINEAR_IN_4 and form != "linear":
        return "refused", "version 4's class accepts only the linear form: convert with --for gguf"
    if kind == "llama4_text" and form == "linear":
        return "refused", "version 4's class accepts only the llama3 form: convert without --for gguf"
    return "right", ""


def _vllm(kind: str, form: str, layers: str) -> str:
    if form == "linear":
        return _NO_LINEAR
    if kind == "phi3":
        return "serves it: announced and original length are equal, so its own scaling of the attention is 1"
    if kind == "ministral3":
        return "serves it: the temperature by position is in `llama_4_scaling` too, which it reads"
    if kind in ("smollm3", "olmo2"):
        return "serves it, in its transformers backend"
    return "serves it" if kind in _READ else ""


def _sglang(kind: str, form: str, layers: str) -> str:
    if form == "linear":
        return _NO_LINEAR
    if kind == "gemma3_text":
        return "is silently wrong: it reads only rope_theta and rotates every layer. Use transformers"
    if kind == "olmo3":
        return "is silently wrong: sliding-window layers keep their rotation. Use transformers"
    if kind == "ministral3":
        return "is silently wrong: its own temperature counts in units of the announced length, not of the original one"
    return "serves it" if kind in (*_READ, "phi3") else ""


def _llama_cpp(kind: str, form: str, layers: str) -> Serving:
    engine = "llama.cpp"
    if kind == "llama" and layers == "all":
        ways = {"linear": "with rope.scaling linear, factor 1e30", "llama3": "with frequency factors of 1e30"}
        return Serving(engine, f"{VERSIONS[engine]} (run)", "right", f"as GGUF {ways[form]}")
    note = f"not run. By the source of its converter it {_llama_cpp_source(kind, form, layers)}"
    return Serving(engine, f"{VERSIONS[engine]} (not run)", "unknown", note)


def _llama_cpp_source(kind: str, form: str, layers: str) -> str:
    if layers != "all":
        return "is silently wrong: it has no key for single layers, and rotates by its own pattern"
    if form == "linear":
        if kind in _TYPES_BY_LAYER:
            return "is silently wrong: sliding-window layers keep a frequency scale of their own"
        return "serves it as GGUF with rope.scaling linear, factor 1e30"
    if form == "longrope":
        return f"is silently wrong: it has no such factors for this class; {_GGUF_WAY_OUT}"
    if kind == "ministral3":
        return f"refuses the model, because it asserts yarn; make the GGUF from the source model: {_GGUF_WAY_OUT}"
    if kind in _LLAMA_CONVERTER:
        return "serves it as GGUF with frequency factors of 1e30"
    return f"is silently wrong: it drops the llama3 form of this class; {_GGUF_WAY_OUT}"


def _types(layers: str) -> list[str]:
    return ["full_attention", "sliding_attention"] if layers == "all" else layers.split(",")


def engines_markdown(folder: str | Path) -> str:
    """Return the table as Markdown, for a model card; "" for a folder that is not a converted checkpoint."""
    path = Path(folder) / "config.json"
    raw = read_json(path) if path.is_file() else {}
    return serving_markdown(serving(raw)) if RECORD in raw else ""


def serving_markdown(rows: list[Serving]) -> str:
    """Return the verdicts as a Markdown table."""
    words = {"right": "right", "wrong": "**silently wrong**", "refused": "refuses to load", "unknown": "not known"}
    lines = ["| engine | version | serves it | |", "|---|---|---|---|"]
    lines += [f"| {row.engine} | {row.version} | {words[row.verdict]} | {row.note} |" for row in rows]
    return "\n".join(lines) + "\n"

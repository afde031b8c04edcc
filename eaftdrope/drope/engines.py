"""Which engines serve a converted checkpoint right, which would be silently wrong, and what to do then.

The rules are data. "run" means that this project ran the engine; "read" that its source was read at the version named
and the engine not run, or on a Llama-shaped model alone; where neither is true the verdict is "unknown". Silent
wrongness is what matters: an engine that rotates after all gives fluent, worse text and no error.

Sources read: vLLM model_executor/layers/rotary_embedding (Llama3RotaryEmbedding, LinearScalingRotaryEmbedding,
Phi3LongRoPE) and config/model.py; SGLang srt/layers/rotary_embedding (factory, rope_variant), models/gemma3_causal.py,
olmo2.py, ministral3.py; llama.cpp conversion base.py and llama.py (generate_extra_tensors), src/models/qwen3.cpp,
smollm3.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .checkpoint import read_json
from .config import RECORD
from .reading import text_part

VERSIONS = {
    "transformers 5": "5.23 (run)",
    "transformers 4": "4.57 (run)",
    "vLLM": "0.33.0 (read)",
    "SGLang": "0.5.23 (read)",
    "llama.cpp": "0274f0f (read; a Llama run in xllamacpp 2026.10)",
}
# Classes whose rotary embedding was followed through the engine's source.
_READ = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3")
# Of these llama.cpp's converter writes frequency factors for the llama3 form.
_LLAMA_CONVERTER = ("llama", "mistral", "granite", "smollm3")
_TYPES_BY_LAYER = ("gemma3_text", "olmo3")
_NO_LINEAR = "its linear rope builds a table of length x factor. Convert without --for gguf"
_GGUF_WAY_OUT = (
    "convert again with --for gguf before making the GGUF, or serve any GGUF with `--rope-scaling linear "
    "--rope-freq-scale 1e-30`"
)


class Serving(NamedTuple):
    """`verdict`: "right", "wrong" (silently rotates), "refused" (an error at loading) or "unknown"."""

    engine: str
    version: str
    verdict: str
    note: str


def serving(raw: dict) -> list[Serving]:
    """Verdicts for the config.json content of a converted checkpoint, one an engine."""
    part, record = text_part(raw), raw[RECORD]
    kind, form, layers = part["model_type"], record["form"], record["layers"]
    rules = {
        "transformers 5": _transformers_5,
        "transformers 4": _transformers_4,
        "vLLM": _vllm,
        "SGLang": _sglang,
        "llama.cpp": _llama_cpp,
    }
    return [Serving(engine, VERSIONS[engine], *rule(kind, form, layers)) for engine, rule in rules.items()]


def _transformers_5(kind: str, form: str, layers: str) -> tuple[str, str]:
    return "right", ""


def _transformers_4(kind: str, form: str, layers: str) -> tuple[str, str]:
    if kind in _TYPES_BY_LAYER and "sliding_attention" in _types(layers):
        return "wrong", (
            "sliding-window layers keep their rotation: version 4 has no key for it. Use transformers 5, or convert with "
            "--layers full_attention"
        )
    if kind == "ministral3":
        return "refused", "version 4 has no Ministral-3 class"
    if kind == "olmo2" and form != "linear":
        return "refused", "version 4's OLMo-2 class takes the linear form alone: convert with --for gguf"
    return "right", ""


def _vllm(kind: str, form: str, layers: str) -> tuple[str, str]:
    if form == "linear":
        return "refused", _NO_LINEAR
    if form == "longrope":
        return "right", "announced and original length are equal, so its own scaling of the attention is 1"
    if kind == "ministral3":
        return "right", "it reads the temperature by position from `llama_4_scaling`, which is written beside the other"
    if kind in _READ:
        return "right", "smollm3 and olmo2 run in its transformers backend" if kind in ("smollm3", "olmo2") else ""
    return "unknown", "compare a few greedy answers with transformers first, or use `--model-impl transformers`"


def _sglang(kind: str, form: str, layers: str) -> tuple[str, str]:
    if form == "linear":
        return "refused", _NO_LINEAR
    if kind == "gemma3_text":
        return "wrong", "it reads rope_theta alone and rotates every layer. Use vLLM or transformers"
    if kind == "olmo3":
        return "wrong", "sliding-window layers keep their rotation. Use vLLM or transformers"
    if kind == "ministral3":
        return "wrong", "its own temperature counts in units of the announced length, not of the original one"
    if kind in _READ or form == "longrope":
        return "right", ""
    return "unknown", "compare a few greedy answers with transformers first"


def _llama_cpp(kind: str, form: str, layers: str) -> tuple[str, str]:
    if layers != "all":
        return "wrong", "it has no key for single layers: it rotates by its own pattern"
    if form == "linear":
        if kind in _TYPES_BY_LAYER:
            return "wrong", "sliding-window layers keep a frequency scale of their own"
        return "right", "as GGUF with rope.scaling linear, factor 1e30"
    if form == "longrope":
        return "wrong", f"its converter has no such factors for this class; {_GGUF_WAY_OUT}"
    if kind == "ministral3":
        return "refused", f"its converter asserts yarn; make the GGUF from the source model: {_GGUF_WAY_OUT}"
    if kind in _LLAMA_CONVERTER:
        return "right", "as GGUF with frequency factors of 1e30"
    return "wrong", f"its converter drops the llama3 form of this class; {_GGUF_WAY_OUT}"


def _types(layers: str) -> list[str]:
    return ["full_attention", "sliding_attention"] if layers == "all" else layers.split(",")


def engines_markdown(folder: str | Path) -> str:
    """The table as Markdown, for a model card; "" for a folder that is no converted checkpoint."""
    path = Path(folder) / "config.json"
    raw = read_json(path) if path.is_file() else {}
    return serving_markdown(serving(raw)) if RECORD in raw else ""


def serving_markdown(rows: list[Serving]) -> str:
    words = {"right": "right", "wrong": "**silently wrong**", "refused": "refuses to load", "unknown": "not known"}
    lines = ["| engine | version | serves it | |", "|---|---|---|---|"]
    lines += [f"| {row.engine} | {row.version} | {words[row.verdict]} | {row.note} |" for row in rows]
    return "\n".join(lines) + "\n"

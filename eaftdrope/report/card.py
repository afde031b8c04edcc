"""The model card: README.md of a trained folder, with the table before/after and code that loads the model.

Written with huggingface_hub's card classes and without network. The loading code needs neither eaftdrope nor a hub
when the base model is local: a test runs it where importing eaftdrope is impossible.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from eaftdrope.drope.engines import engines_markdown
from eaftdrope.errors import UserError
from eaftdrope.evaluate import Score, comparison_markdown
from eaftdrope.files import replacing
from eaftdrope.models import PACKAGE_PREFIX, hub_id_of

_FILES = (".gguf", ".jsonl", ".json", ".parquet", ".csv")
_LOAD_ADAPTER = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder's path or hub id
base = {base}

tokenizer = AutoTokenizer.from_pretrained(folder)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
"""
_LOAD_FULL = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder's path or hub id

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
"""
_GENERATE_CHAT = """
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.no_grad():
    answer = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""
_GENERATE_TEXT = """
inputs = tokenizer("Once upon a time", return_tensors="pt")
with torch.no_grad():
    answer = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""
_ENGINES = """\
## Engines

This model has no rotary embedding (DroPE, [arXiv 2512.12167](https://arxiv.org/abs/2512.12167)): its configuration makes
the rotation the identity, so stock libraries load it as it is. "Silently wrong" engines would rotate after all: fluent
text, no error, and not this model.

{engines}"""


def write_model_card(
    folder: str | Path,
    *,
    recipe_yaml: str,
    base_model: str,
    method: str,
    before: Sequence[Score],
    after: Sequence[Score],
    versions: Mapping[str, str],
    hardware: str,
    command: str,
    is_adapter: bool,
    licence: str | None = None,
    datasets: Sequence[str] = (),
    title: str | None = None,
    tags: Sequence[str] = ("eaft",),
    more: Sequence[str] = (),
) -> Path:
    """Write `folder`/README.md (replacing the one that a trainer may have left) and return its path.

    Args:
        recipe_yaml: the resolved recipe.
        base_model: the recipe's model reference: a hub id, a local path, or `package:NAME`.
        method: one line, such as "LoRA (r = 16), gate `eaft`: w = (H_top20 / ln 20)^alpha, alpha = 1".
        before, after: the probes' scores; both empty if nothing was measured.
        versions: package name -> version.
        hardware, command: one line each.
        is_adapter: whether the folder holds a PEFT adapter; then its adapter_config.json says where the base model is.
        licence: the hub's name of a licence, such as "apache-2.0".
        datasets: names of the training data; the ones that can be hub ids also go into the metadata.
        title: the card's heading; the folder's name by default.
        tags: for the metadata, beside those that the folder's content asks for.
        more: sections of Markdown, put between the table and how to load it.

    Raises:
        UserError: the folder is missing, or `is_adapter` without an adapter_config.json.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no model card can be written: there is no folder {folder}. Save the model first.")
    lineage = _hub_id(base_model)
    dropped = "drope" in _json(folder / "config.json")
    data = ModelCardData(
        base_model=lineage,
        license=licence,
        datasets=[name for name in datasets if _hub_id(name)] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[
            *tags,
            "eaftdrope",
            *(["lora"] if is_adapter and "lora" in method.lower() else []),
            *(["drope", "nope", "long-context"] if dropped else []),
        ],
    )
    body = [
        f"# {_plain(title or folder.resolve().name)}",
        _summary(base_model, lineage, method, datasets),
        f"## Gained and forgotten\n\n{_table(before, after)}",
        *more,
        *([_ENGINES.format(engines=engines_markdown(folder))] if dropped else []),
        f"## How to load it\n\n{_loading(folder, base_model, is_adapter)}",
        f"## How it was trained\n\n{_training(recipe_yaml, method, command, hardware)}",
        "## Versions\n\n" + "\n".join(f"- {name} {version}" for name, version in versions.items()),
    ]
    card = ModelCard(f"---\n{data}\n---\n\n" + "\n\n".join(part.strip() for part in body) + "\n")
    path = folder / "README.md"
    with replacing(path) as partial:
        card.save(partial)
    return path


def _hub_id(reference: str) -> str | None:
    """Return the hub id that a reference names or stands for, None for something local."""
    return None if Path(reference).suffix in _FILES else hub_id_of(reference)


def _summary(base_model: str, lineage: str | None, method: str, datasets: Sequence[str]) -> str:
    model = (
        f"[{lineage}](https://huggingface.co/{lineage})"
        if lineage
        else f"{_code(Path(base_model).name)} (a local model)"
    )
    data = (
        f" on {', '.join(_code(name if _hub_id(name) else Path(name).name) for name in datasets)}" if datasets else ""
    )
    return f"Fine-tuned from {model}{data} with eaftdrope. {method}"


def _code(text: str) -> str:
    """Text as inline code, whatever is in it: a fence that is longer than its backticks, and no line break."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _plain(text: str) -> str:
    """Text as it is, in a heading: one line, without anything that Markdown or HTML would take for markup."""
    return re.sub(r"([\\`*\[\]<>&])", r"\\\1", " ".join(text.split()))


def _without_places(command: str) -> str:
    """A command without the folders of absolute paths, which nobody else's machine has."""
    return re.sub(r"(?<![\w.:/~])/(?:[^\s/'\"]+/)+(?=[^\s/'\"])", "", command)


def _table(before: Sequence[Score], after: Sequence[Score]) -> str:
    if not before and not after:
        return "Nothing was measured: the recipe has no probes."
    return comparison_markdown(list(before), list(after))


def _loading(folder: Path, base_model: str, is_adapter: bool) -> str:
    text = "With stock transformers; eaftdrope is not needed."
    code = _LOAD_FULL
    if is_adapter:
        base, where = _adapter_base(folder)
        code = _LOAD_ADAPTER.replace("{base}", json.dumps(base))
        text = "With stock transformers and peft; eaftdrope is not needed." + where
        if base_model.startswith(PACKAGE_PREFIX):
            text += f" The adapter was trained on the weights of `{base_model}`, which were made from that model's."
    return f"{text}\n\n```python\n{code}{_GENERATE_CHAT if _has_template(folder) else _GENERATE_TEXT}```"


def _adapter_base(folder: Path) -> tuple[str, str]:
    """What to load the base model from, a local one from its place relative to the card's; and what to add about it."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"no model card can be written: {folder} has no adapter_config.json. Save the adapter first.")
    base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if lineage := hub_id_of(base):
        return lineage, ""
    where = " `base` is where the base model was in training, seen from this folder; elsewhere, put its path there."
    return os.path.relpath(Path(base).expanduser(), folder), where


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    return bool(_json(folder / "tokenizer_config.json").get("chat_template"))


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _without_output_place(recipe_yaml: str) -> str:
    """The recipe with the last part of an absolute `output.dir`; its other paths are relative to its folder."""
    return re.sub(r"(?m)^(  dir: ['\"]?)/(?:[^/\n]+/)*(?=[^/\n])", r"\1", recipe_yaml)


def _training(recipe_yaml: str, method: str, command: str, hardware: str) -> str:
    return f"""\
- Method: {method}
- Hardware: {hardware}
- Command: {_code(_without_places(command))}

Each token's cross-entropy is multiplied by its gate, a weight that is computed from the model's own prediction and gets
no gradient. The figures above are plain cross-entropy, whatever the gate.

<details>
<summary>The whole recipe</summary>

```yaml
{_without_output_place(recipe_yaml).strip()}
```

</details>"""

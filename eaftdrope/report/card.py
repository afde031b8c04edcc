"""The model card: README.md of a trained folder, with the before/after table and code that loads the model.

The card is written with huggingface_hub's card classes and without network access. The loading code does not need
eaftdrope (but for a model that learns as it reads), nor the hub if the base model is local: a test runs it where importing
eaftdrope is impossible.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from eaftdrope.drope.engines import engines_markdown
from eaftdrope.errors import UserError, printable
from eaftdrope.evaluate import Score, comparison_markdown
from eaftdrope.files import write_atomically
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
_LOAD_LEARNING = """\
import torch
from transformers import AutoTokenizer
from eaftdrope.ttt import load_ttt

folder = "."  # this folder's path or hub id

tokenizer = AutoTokenizer.from_pretrained(folder)
model = load_ttt(folder).eval()  # learns as it reads, from nothing at each call
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
_LEARNING = (
    "eaftdrope loads the model as it was trained. Stock transformers loads the same folder without the fast MLPs and without "
    "the window: a model that was not measured here."
)
_ENGINES = """\
## Engines

This model has no rotary embedding (DroPE, [arXiv 2512.12167](https://arxiv.org/abs/2512.12167)): its configuration makes
the rotation the identity, so stock libraries load it unchanged. Engines marked "silently wrong" ignore that and rotate:
they produce fluent text without an error, but not the output of this model.

{engines}"""


@dataclass(frozen=True, kw_only=True)
class CardContent:
    """Content of a model card.

    Attributes:
        recipe_yaml: the resolved recipe.
        base_model: the recipe's model reference: a hub id, a local path, or `package:NAME`; None for a new model.
        method: one line, such as "LoRA (r = 16), gate `eaft`: w = (H_top20 / ln 20)^alpha, alpha = 1".
        before: the probes' scores before training; empty if nothing was measured.
        after: the probes' scores after training; empty if nothing was measured.
        versions: package name -> version.
        hardware: one line.
        command: the command line that was run.
        is_adapter: the folder contains a PEFT adapter, whose adapter_config.json has the path of the base model.
        learns: the model learns as it reads (TTT), which needs eaftdrope.
        licence: the hub's name of a licence, such as "apache-2.0".
        datasets: names of the training data; those that are hub ids are also listed in the metadata.
        title: the card's heading; the folder's name by default.
        tags: for the metadata, besides those derived from the folder's content.
        sections: Markdown, placed between the table and the loading code.
    """

    recipe_yaml: str
    base_model: str | None
    method: str
    before: Sequence[Score]
    after: Sequence[Score]
    versions: Mapping[str, str]
    hardware: str
    command: str
    is_adapter: bool
    learns: bool = False
    licence: str | None = None
    datasets: Sequence[str] = ()
    title: str | None = None
    tags: Sequence[str] = ("eaft",)
    sections: Sequence[str] = ()


def write_model_card(folder: str | Path, content: CardContent) -> Path:
    """Write `folder`/README.md, replacing the card of a trainer, and return its path.

    Raises:
        UserError: the folder is missing, or `content.is_adapter` without an adapter_config.json.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no model card can be written: there is no folder {folder}. Save the model first.")
    dropped = "drope" in _json(folder / "config.json")
    body = [
        f"# {_plain(content.title or folder.resolve().name)}",
        _summary(content),
        f"## Gained and forgotten\n\n{_table(content.before, content.after)}",
        *content.sections,
        *([_ENGINES.format(engines=engines_markdown(folder))] if dropped else []),
        f"## How to load it\n\n{_loading(folder, content)}",
        f"## How it was trained\n\n{_training(content)}",
        "## Versions\n\n" + "\n".join(f"- {name} {version}" for name, version in content.versions.items()),
    ]
    metadata = _metadata(content, dropped)
    # a name or a path in it could reverse the order of what follows it on the page
    text = printable("\n\n".join(part.strip() for part in body), lines=True)
    card = ModelCard(f"---\n{metadata}\n---\n\n{text}\n")
    return write_atomically(folder / "README.md", str(card))


def _metadata(content: CardContent, dropped: bool) -> ModelCardData:
    return ModelCardData(
        base_model=_hub_id(content.base_model) if content.base_model else None,
        license=content.licence,
        datasets=[name for name in content.datasets if _hub_id(name)] or None,
        library_name="peft" if content.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[
            *content.tags,
            "eaftdrope",
            *(["lora"] if content.is_adapter and "lora" in content.method.lower() else []),
            *(["drope", "nope", "long-context"] if dropped else []),
        ],
    )


def _hub_id(reference: str) -> str | None:
    """Return the hub id of a reference, None for something local."""
    return None if Path(reference).suffix in _FILES else hub_id_of(reference)


def _summary(content: CardContent) -> str:
    lineage, datasets = content.base_model and _hub_id(content.base_model), content.datasets
    model = (
        f"[{lineage}](https://huggingface.co/{lineage})"
        if lineage
        else f"{_code(Path(content.base_model or '').name)} (a local model)"
    )
    data = (
        f" on {', '.join(_code(name if _hub_id(name) else Path(name).name) for name in datasets)}" if datasets else ""
    )
    made = f"Fine-tuned from {model}" if content.base_model else "Trained from scratch"
    return f"{made}{data} with eaftdrope. {content.method}"


def _code(text: str) -> str:
    """Return text as inline code on one line, with a fence longer than any run of backticks in it."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _plain(text: str) -> str:
    """Return text for a heading: one line, with the characters of Markdown and HTML markup escaped."""
    return re.sub(r"([\\`*\[\]<>&])", r"\\\1", " ".join(text.split()))


def _without_folders(command: str) -> str:
    """Remove the folders of absolute paths from a command: they exist on this machine only."""
    return re.sub(r"(?<![\w.:/~])/(?:[^\s/'\"]+/)+(?=[^\s/'\"])", "", command)


def _table(before: Sequence[Score], after: Sequence[Score]) -> str:
    if not before and not after:
        return "Nothing was measured: the recipe has no probes."
    return comparison_markdown(list(before), list(after))


def _loading(folder: Path, content: CardContent) -> str:
    text = "Stock transformers is enough; eaftdrope is not needed."
    code = _LOAD_FULL
    if content.learns:
        text, code = _LEARNING, _LOAD_LEARNING
    elif content.is_adapter:
        base, where = _adapter_base(folder)
        code = _LOAD_ADAPTER.replace("{base}", json.dumps(base))
        text = "Stock transformers and peft are enough; eaftdrope is not needed." + where
        if content.base_model and content.base_model.startswith(PACKAGE_PREFIX):
            text += f" The adapter was trained on the weights of `{content.base_model}`, which were converted from it."
    return f"{text}\n\n```python\n{code}{_GENERATE_CHAT if _has_template(folder) else _GENERATE_TEXT}```"


def _adapter_base(folder: Path) -> tuple[str, str]:
    """Return the reference of an adapter's base model, relative to the card if it is local, and a note on it."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"no model card can be written: {folder} has no adapter_config.json. Save the adapter first.")
    base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if lineage := hub_id_of(base):
        return lineage, ""
    where = " `base` is the path of the base model during training, relative to this folder; adjust it if needed."
    return os.path.relpath(Path(base).expanduser(), folder), where


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    return bool(_json(folder / "tokenizer_config.json").get("chat_template"))


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _with_relative_output(recipe_yaml: str) -> str:
    """Shorten an absolute `output.dir` of the recipe to its last part; its other paths are relative already."""
    return re.sub(r"(?m)^(  dir: ['\"]?)/(?:[^/\n]+/)*(?=[^/\n])", r"\1", recipe_yaml)


def _training(content: CardContent) -> str:
    return f"""\
- Method: {content.method}
- Hardware: {content.hardware}
- Command: {_code(_without_folders(content.command))}

Each token's cross-entropy is multiplied by its gate, a weight computed from the model's own prediction and excluded
from the gradient. The losses above are plain cross-entropy for every gate.

<details>
<summary>Full recipe</summary>

```yaml
{_with_relative_output(content.recipe_yaml).strip()}
```

</details>"""

"""Axolotl's data sets: a list of mappings, each with its type."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from eaftdrope.data.messages import is_weight_of_turn

from .draft import Draft, Fate

# `type` of a data set -> why its rows are read as they are
_DETECTED = {
    "alpaca*": "detected from the columns",
    "chat_template*": "detected from the columns",
    "sharegpt*": "detected from the columns",
    "completion*": "detected from the columns",
    "pygmalion": "detected from the columns",
    "chatml*": "detected from the columns",
}
_LOADERS = ("json", "jsonl", "csv", "parquet", "arrow", "text")
_ROLES = {"role", "from", "content", "value", "tool_calls", "weight", "name", "reasoning_content", "tool_call_id"}
# option -> values that a recipe has anyway
_SAME = {
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]),
    "train_on_eos": ("turn",),
    "train_on_eot": ("turn",),
    "field_messages": ("messages", "conversations"),
    "field_tools": ("tools",),
    "field_thinking": ("reasoning_content",),
    "template_thinking_key": ("reasoning_content",),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "field": ("text",),
    "chat_template": ("tokenizer_default",),
    "conversation": ("chatml",),
}
_LOST = {
    "chat_template chat_template_jinja conversation drop_system_message": (
        "the tokenizer's own chat template is used; see `eaftdrope preview`"
    ),
    "roles roles_to_train": "the loss is on one kind of turn (data.train_on)",
    "message_field_training": "rename the field of the messages to `weight` (0: not trained), which a recipe reads",
    "message_field_training_detail": "a turn is trained as a whole, or not at all",
    "train_on_eos train_on_eot": "the stop token of every trained turn is trained",
    "field* message_field_* message_property_mappings input_format input_transform": "rename the columns of the rows",
    "shards* preprocess_shards": "a source has a limit instead (data.train, limit)",
    "revision": "the newest revision of a data set is read",
    "split_thinking": "reasoning is found by its tags",
    "logprobs_field temperature": "logits of a teacher are not trained on",
}


def write_sources(draft: Draft) -> None:
    """Write `data.train`, `data.held_out` and `data.train_on` from the lists of data sets."""
    entries = draft.get("datasets") or draft.get("pretraining_dataset") or []
    key = "datasets" if draft.get("datasets") else "pretraining_dataset"
    entries = [{"path": entries}] if isinstance(entries, str) else [entries] if isinstance(entries, dict) else entries
    sources = [_source(draft, f"{key}[{index}]", entry) for index, entry in enumerate(entries)]
    if not sources:
        draft.refuse("datasets is missing: a recipe trains on rows.")
        return
    draft.write("data.train", sources, key)
    tests = draft.get("test_datasets", [])
    if tests:
        held_out = [_source(draft, f"test_datasets[{index}]", entry, "test") for index, entry in enumerate(tests)]
        draft.write("data.held_out", held_out, "test_datasets")
    share = draft.number("val_set_size", 0)
    if tests or not share:
        draft.nothing("test_datasets goes before it" if tests else "off", "val_set_size")
    elif share < 1:
        draft.write("data.held_out", float(share), "val_set_size")
    else:
        draft.lose("a recipe holds out a share of the rows (data.held_out: 0.05), not a number", "val_set_size")
    texts = [str(entry.get("type", "completion")).startswith("completion") for entry in entries]
    if draft.get("train_on_inputs"):
        draft.write("data.train_on", "all", "train_on_inputs")
    elif key == "pretraining_dataset" or all(texts):
        draft.write("data.train_on", "all", default=True)
        draft.nothing("text is trained as a whole", "train_on_inputs")
    else:
        draft.write("data.train_on", "assistant", "train_on_inputs", default=True)


def _source(draft: Draft, label: str, entry: dict[str, Any], split: str = "train") -> dict[str, Any]:
    """Return a data set as a source of a recipe."""
    source = _place(draft, label, entry)
    if entry.get("split", split) != "train":
        source["split"] = str(entry.get("split", split))
    if entry.get("name"):
        source["name"] = entry["name"]
    if entry.get("weight") not in (None, 1):
        source["weight"] = float(entry["weight"])
    for option, value in entry.items():
        if option in ("path", "data_files", "ds_type", "split", "name", "weight") or value in (None, False, "", []):
            continue
        if option == "type":
            _type(draft, f"{label}.type", value)
        elif option == "message_field_training" and is_weight_of_turn(str(value)):
            draft.record(f"{label}.{option}", value, Fate.NOTHING, "read from the messages, as their `weight`")
        elif value in _SAME.get(option, ()) or (
            option == "message_property_mappings" and set(value.values()) <= _ROLES
        ):
            draft.record(f"{label}.{option}", value, Fate.NOTHING, "as in a recipe")
        elif option != "trust_remote_code":
            why = next((why for names, why in _LOST.items() if _matches(option, names)), "not an option of a source")
            draft.record(f"{label}.{option}", value, Fate.LOST, why)
    return source


def _place(draft: Draft, label: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the path of a data set: files, where it names a loader or files, else the path itself."""
    files, path = entry.get("data_files"), entry.get("path")
    files = [files] if isinstance(files, str) else files
    if not files:
        return {"path": str(path)}
    if path in _LOADERS or path is None:
        if len(files) > 1:
            draft.record(
                f"{label}.data_files", files, Fate.LOST, "a source is one file or folder: the recipe has the first"
            )
        return {"path": str(files[0])}
    why = "a file inside a repository of the hub cannot be chosen: download it and write its path"
    draft.record(f"{label}.data_files", files, Fate.LOST, why)
    return {"path": str(path)}


def _type(draft: Draft, label: str, value: Any) -> None:
    if isinstance(value, dict):
        draft.record(label, value, Fate.LOST, "prompts of one's own: write rows as messages")
        return
    why = next((why for pattern, why in _DETECTED.items() if fnmatchcase(str(value), pattern)), None)
    if why is not None:
        draft.record(label, value, Fate.NOTHING, why)
    else:
        draft.record(label, value, Fate.LOST, "no such format here: write the rows as messages (data.format)")


def _matches(option: str, names: str) -> bool:
    return any(fnmatchcase(option, name) for name in names.split())

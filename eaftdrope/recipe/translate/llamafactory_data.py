"""LLaMA-Factory's data: names that a dataset_info.json explains.

It is searched in `dataset_dir` from the working directory, where LLaMA-Factory looks, and then beside the configuration and
above it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .draft import Draft, Fate

INFO = "dataset_info.json"
# The columns that a recipe finds by itself; others have to be renamed.
_COLUMNS = {
    "prompt": ("instruction", "prompt", "question"),
    "query": ("input",),
    "response": ("output", "response", "completion", "answer"),
    "history": ("history",),
    "messages": ("messages", "conversations"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
}
_TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}


def write_sources(draft: Draft, folder: Path) -> None:
    """Write `data.train` and `data.held_out` from the names of data sets."""
    place = str(draft.get("dataset_dir", "data"))
    info, found = _find_info(place, folder)
    for key, path in (("dataset", "data.train"), ("eval_dataset", "data.held_out")):
        names = _names(draft.get(key, []))
        if not names:
            continue
        sources = [_source(draft, key, name, info, found) for name in names]
        draft.write(
            path, [source for source in sources if source], key, *(("max_samples",) if key == "dataset" else ())
        )
    if not _names(draft.get("dataset", [])):
        draft.refuse("dataset is missing: a recipe trains on rows.")


def _names(value: Any) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else list(value)


def _find_info(place: str, folder: Path) -> tuple[dict[str, Any] | None, Path]:
    """Return the content of dataset_info.json, None without one, and the folder that its files lie in."""
    for base in (Path(), folder, *folder.resolve().parents[:2]):
        file = base / place / INFO
        if file.is_file():
            try:
                return json.loads(file.read_text(encoding="utf-8")), file.parent
            except ValueError:
                return None, file.parent
    return None, Path(place)


def _source(draft: Draft, key: str, name: str, info: dict[str, Any] | None, place: Path) -> dict[str, Any]:
    label = f"{key}[{name}]"
    entry = (info or {}).get(name)
    limit = draft.number("max_samples")
    source: dict[str, Any] = {"path": name}
    if entry is None:
        why = f"{place / INFO} does not exist" if info is None else f"it is not in {place / INFO}"
        draft.record(label, name, Fate.LOST, f"{why}, so the name stands for a path: write the file or the hub id")
    else:
        source = _entry(draft, label, name, entry, place)
    if limit:
        source["limit"] = min(int(limit), source.get("limit", int(limit)))
    return source


def _entry(draft: Draft, label: str, name: str, entry: dict[str, Any], place: Path) -> dict[str, Any]:
    """Return the source of an entry of dataset_info.json."""
    if entry.get("ranking") or "kto_tag" in entry.get("columns", {}):
        draft.refuse(f"{label}: its rows are preferences (ranking); a recipe trains on labels.")
    source: dict[str, Any] = {"path": name}
    if "hf_hub_url" in entry:
        source["path"] = entry["hf_hub_url"]
    elif "file_name" in entry:
        source["path"] = str(place / entry["file_name"])
    else:
        draft.record(label, name, Fate.LOST, "neither a file nor a data set of the Hugging Face hub: write a path")
    if entry.get("split", "train") != "train":
        source["split"] = entry["split"]
    if entry.get("subset"):
        source["name"] = entry["subset"]
    if entry.get("num_samples"):
        source["limit"] = int(entry["num_samples"])
    if entry.get("folder"):
        draft.record(f"{label}.folder", entry["folder"], Fate.LOST, "write the path of the folder as the source")
    for part, known in (("columns", _COLUMNS), ("tags", _TAGS)):
        for role, column in entry.get(part, {}).items():
            if column in known.get(role, ()):
                continue
            why = "only text is trained" if role in ("images", "videos", "audios") else "rename it in the rows"
            names = f" to {known[role][0]}" if role in known else ""
            draft.record(f"{label}.{part}.{role}", column, Fate.LOST, why + (names if "rename" in why else ""))
    return source

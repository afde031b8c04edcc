"""Code that a checkpoint was published with (`auto_map`), where transformers has the class by now."""

from __future__ import annotations

from pathlib import Path

from eaftdrope.errors import UserError


def without_published_code(raw: dict, source: Path) -> tuple[dict, list[str]]:
    """config.json's content without `auto_map`, and a note about it: the stock class then serves the checkpoint.

    Raises:
        UserError: transformers does not have the class, so only that code can run the model.
    """
    published = raw.get("auto_map")
    if not published:
        return raw, []
    import transformers

    places = list(published.values()) if isinstance(published, dict) else [published]
    # a hub reference is ORG/NAME--file.Class; tokenizers come as a pair, and are none of ours
    names = [place.rsplit(".", 1)[-1] for place in places if isinstance(place, str)]
    names = [name for name in names if "Token" not in name and "Process" not in name]
    missing = [name for name in (*names, *(raw.get("architectures") or [])) if not hasattr(transformers, name)]
    if missing or not names:
        raise UserError(
            f"{source} runs code of its own (auto_map), which a configuration cannot change: transformers "
            f"{transformers.__version__} has no class {missing[0] if missing else 'for it'}. Not converted."
        )
    kept = {key: value for key, value in raw.items() if key != "auto_map"}
    return kept, [
        f"the code that the source was published with (auto_map: {names[0]}) is not used: transformers has it."
    ]

"""The subject of an evaluation: a model by its reference, or a folder with an adapter, measured on its base model.

subject = find_subject("runs/mine")         # nothing is loaded yet
subject.fingerprint()                       # changes with the weights, whatever the folder's name
model, tokenizer = subject.load("float32", "cpu"), subject.tokenizer()
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.checkpoints.adapters import adapter_settings, adapter_tokenizer, is_adapter, load_adapted
from eaftdrope.errors import UserError
from eaftdrope.files import usable_path
from eaftdrope.models import check_model_reference, load_config, load_model, load_tokenizer, resolve_model

from ..score_cache import content_hash, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# The files of a model's folder that its answers depend on; a run folder has other files too.
_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "adapter_model.bin",
)


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        reference: as the user wrote it.
        base, revision: the model that the weights are loaded from.
        adapter: the folder of an adapter on it, or None.
    """

    reference: str
    base: str
    revision: str | None = None
    adapter: Path | None = None

    def config(self) -> PretrainedConfig:
        """Load the configuration of the base model."""
        return load_config(self.base, revision=self.revision)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer: the adapter's, if it has one."""
        if self.adapter is None:
            return load_tokenizer(self.base)
        return adapter_tokenizer(self.adapter, self.base, self.revision)

    def load(self, dtype: str, device: str) -> PreTrainedModel:
        """Load the model in evaluation mode, an adapter unmerged on its base.

        Raises:
            UserError: the weights cannot be read, or an adapter that does not fit its base.
        """
        if self.adapter is None:
            model = load_model(self.base, dtype=dtype)
        else:
            model = load_adapted(self.adapter, self.base, self.revision, dtype=dtype)
        return model.to(device).eval()

    def fingerprint(self) -> str:
        """Return a hash of the weights and settings: of the files' content, or of the hub's commit.

        Reads every weight file once (about a second per gigabyte).
        """
        digest = hashlib.sha256()
        source = resolve_model(self.base, revision=self.revision)
        if source.kind == "hub":
            # weights whose commit is unknown never match a cached score
            commit = getattr(self.config(), "_commit_hash", None) or os.urandom(16).hex()
            digest.update(f"{source.path}@{commit}".encode())
        else:
            _add_folder(digest, Path(source.path))
        if self.adapter is not None:
            _add_folder(digest, self.adapter)
        return digest.hexdigest()

    def identity(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the identity for `score_key`: the model's files and the tokenizer in its present state."""
        return content_hash([self.fingerprint(), tokenizer_fingerprint(tokenizer)])


def find_subject(reference: str) -> Subject:
    """Find a model without loading anything.

    Raises:
        UserError: no such model, or an adapter whose base model is unknown or missing.
    """
    if not is_adapter(reference):
        if problem := check_model_reference(reference):
            raise UserError(problem)
        return Subject(reference, reference)
    folder = usable_path(reference)
    settings = adapter_settings(folder)
    base = settings["base_model_name_or_path"]
    if problem := check_model_reference(base):
        raise UserError(
            f"the base model of the adapter {reference} cannot be used: {problem} Correct `base_model_name_or_path` in "
            "its adapter_config.json."
        )
    return Subject(reference, base, settings.get("revision"), folder)


def _add_folder(digest: hashlib._Hash, folder: Path) -> None:
    for file in sorted({file for pattern in _FILES for file in folder.glob(pattern)}):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())

"""What is measured: a model by its reference, or a folder with an adapter, which is measured on its base model.

subject = find_subject("runs/mine")         # nothing is loaded yet
subject.fingerprint()                       # changes with the weights, whatever the folder is called
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

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Everything in a model's folder that changes what it answers; a run's folder holds other files too, which do not.
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
    """`base` and `revision` are what the weights are loaded from; `adapter` is the folder of an adapter on them."""

    reference: str
    base: str
    revision: str | None = None
    adapter: Path | None = None

    def config(self) -> PretrainedConfig:
        return load_config(self.base, revision=self.revision)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.adapter is None:
            return load_tokenizer(self.base)
        return adapter_tokenizer(self.adapter, self.base, self.revision)

    def load(self, dtype: str, device: str) -> PreTrainedModel:
        """The model in evaluation mode, an adapter live on its base.

        Raises:
            UserError: weights that cannot be read, or an adapter that does not fit its base.
        """
        if self.adapter is None:
            model = load_model(self.base, dtype=dtype)
        else:
            model = load_adapted(self.adapter, self.base, self.revision, dtype=dtype)
        return model.to(device).eval()

    def fingerprint(self) -> str:
        """A hash of the weights and of what decides how they are used: of the files' content, or the hub's commit.

        Reads every weight file once (about a second a gigabyte).
        """
        digest = hashlib.sha256()
        source = resolve_model(self.base, revision=self.revision)
        if source.kind == "hub":
            # of weights whose commit is not known no score is ever found again
            commit = getattr(self.config(), "_commit_hash", None) or os.urandom(16).hex()
            digest.update(f"{source.path}@{commit}".encode())
        else:
            _add_folder(digest, Path(source.path))
        if self.adapter is not None:
            _add_folder(digest, self.adapter)
        return digest.hexdigest()


def find_subject(reference: str) -> Subject:
    """Look a reference up without loading anything.

    Raises:
        UserError: no such model, or an adapter whose base model is not known or not there.
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


def _add_folder(digest, folder: Path) -> None:
    for file in sorted({file for pattern in _FILES for file in folder.glob(pattern)}):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())

"""Chat models for `eaftdrope.rlm`: a model reference (adapters too) in this process, or one behind an endpoint."""

from __future__ import annotations

import os

from eaftdrope.rlm.models import HFModel, Model
from eaftdrope.rlm.served import ServedModel

from ..suites.subject import find_subject

# of a fingerprint, in the name that a journal has
_DIGITS = 12


def open_chat_model(reference: str, *, device: str = "cpu", dtype: str = "float32", batch_size: int = 8) -> HFModel:
    """Load a model in evaluation mode, an adapter on its base.

    Its name has a hash of its weights: the journal of a run with other weights is not resumed.

    Raises:
        UserError: no such model, or it cannot be loaded.
    """
    subject = find_subject(reference)
    tokenizer = subject.tokenizer()
    name = f"{reference}@{subject.identity(tokenizer)[:_DIGITS]}"
    return HFModel(subject.load(dtype, device), tokenizer, name=name, batch_size=batch_size)


def open_models(
    reference: str,
    sub_reference: str | None,
    *,
    endpoint: str | None = None,
    window: int | None = None,
    timeout: float = 600.0,
    device: str = "cpu",
    dtype: str = "float32",
) -> tuple[Model, Model]:
    """Open the root's model and the sub-model, which may be the same.

    Args:
        sub_reference: None for the root's model.
        endpoint: address of an OpenAI-compatible server that has both; the references are names there. Its key, if it
            needs one, is in the environment variable EAFTDROPE_API_KEY.
        window: context of served models in tokens; None: as the server states it.
        timeout: seconds for a request to the server.

    Raises:
        UserError: no such model, or it cannot be loaded; a server that cannot be reached, or states no window.
    """
    if endpoint is not None:
        key = os.environ.get("EAFTDROPE_API_KEY")
        names = dict.fromkeys((reference, sub_reference or reference))
        served = [ServedModel(endpoint, name, window=window, api_key=key, timeout=timeout) for name in names]
        return served[0], served[-1]
    root = open_chat_model(reference, device=device, dtype=dtype)
    is_same = sub_reference is None or sub_reference == reference
    return root, root if is_same else open_chat_model(sub_reference, device=device, dtype=dtype)

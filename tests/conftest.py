"""Settings of every test: no network, no telemetry, quiet libraries, a tokenizer made on the spot."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

from tests.tiny_models import make_word_tokenizer

# The same examples in every run: a failure that comes and goes tells nobody which change brought it. Other examples:
# pytest --hypothesis-profile=search
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def word_tokenizer():
    return make_word_tokenizer()

"""Settings of every test: no network, no telemetry, quiet libraries, a tokenizer made on the spot."""

import gc
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch keeps compiled graphs on disk. Those of a run held to other instructions give NaN or end the process.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    f"{tempfile.gettempdir()}/eaftdrope_tests_{os.getuid()}_{os.environ.get('ATEN_CPU_CAPABILITY', 'default')}",
)

import pytest
from hypothesis import settings

from tests.tiny_models import make_word_tokenizer

# The same examples in every run: a failure that comes and goes tells nobody which change brought it. Other examples:
# pytest --hypothesis-profile=search
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("repeatable")


def pytest_collection_finish():
    # the Trainer collects garbage at the end of each training, for 0.3 seconds among a million objects of the libraries
    gc.freeze()


@pytest.fixture(scope="session")
def word_tokenizer():
    return make_word_tokenizer()

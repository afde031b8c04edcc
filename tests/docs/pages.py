"""What the tests of the documentation share."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def generator():
    """docs/generate.py as a module; it belongs to no package."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

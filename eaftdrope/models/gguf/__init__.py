"""GGUF files: read once, dequantised into the cache as a folder that transformers reads in seconds (`copy.py`), with the
tokenizer that the file describes (`tokenizer.py`, `patterns.py`)."""

from .copy import copy_folder, dequantised_copy, reading

__all__ = ["copy_folder", "dequantised_copy", "reading"]

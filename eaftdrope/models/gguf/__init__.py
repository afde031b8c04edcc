"""GGUF files: read once and dequantised into the cache as a folder that transformers reads in seconds.

copy (the cached folder) -> tokenizer (the one that the file describes) -> patterns (how text is cut under each name).
"""

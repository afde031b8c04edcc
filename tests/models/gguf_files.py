"""Tiny GGUF files with a vocabulary of their own: one layer of Llama, random weights."""

from collections.abc import Sequence
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def write_gguf(
    path: Path,
    tokens: Sequence[str],
    *,
    model: str = "gpt2",
    pre: str | None = None,
    merges: Sequence[str] | None = None,
    types: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
    **keys: object,
) -> Path:
    """`keys` are further keys of `tokenizer.ggml.` (bool, int), `chat_template` and `chat_template_NAME` of `tokenizer.`"""
    import gguf
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(types or [NORMAL] * len(tokens))
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if merges is not None:
        writer.add_token_merges(list(merges))
    if scores is not None:
        writer.add_token_scores(list(scores))
    for name, value in keys.items():
        if name.startswith("chat_template"):
            writer.add_string("tokenizer." + name.replace("template_", "template."), value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32) * 0.1)

    add("token_embd.weight", len(tokens), 32)
    add("output.weight", len(tokens), 32)
    add("output_norm.weight", 32)
    for name in ("attn_norm", "ffn_norm"):
        add(f"blk.0.{name}.weight", 32)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        add(f"blk.0.{name}.weight", 32, 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_vocabulary(texts: Sequence[str], size: int = 1000) -> tuple[list[str], list[str]]:
    """Tokens and merges of a BPE that was trained across words, digits and lines: any wrong cut shows."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    )
    core = json.loads(made.to_str())["model"]
    return sorted(core["vocab"], key=core["vocab"].get), [" ".join(merge) for merge in core["merges"]]

"""A folder with the shapes and size of a 7B model, its weight files all holes: it takes no disk."""

from __future__ import annotations

import json
import struct
from pathlib import Path

LAYERS, HIDDEN, MLP, VOCABULARY, SHARDS = 32, 4096, 11008, 32000, 3


def tensors() -> dict[str, list[int]]:
    shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN], "lm_head.weight": [VOCABULARY, HIDDEN]}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = [HIDDEN, HIDDEN]
        for name, shape in (("gate", [MLP, HIDDEN]), ("up", [MLP, HIDDEN]), ("down", [HIDDEN, MLP])):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = [HIDDEN]
    return shapes | {"model.norm.weight": [HIDDEN]}


def make(folder: Path) -> int:
    """Bytes of the weights."""
    folder.mkdir(parents=True)
    files: list[dict[str, list[int]]] = [{} for _ in range(SHARDS)]
    for number, (name, shape) in enumerate(tensors().items()):
        files[number * SHARDS // len(tensors())][name] = shape
    weight_map, total = {}, 0
    for number, shapes in enumerate(files):
        file, header, end = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors", {}, 0
        for name, shape in shapes.items():
            size = 2
            for side in shape:
                size *= side
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            weight_map[name], end = file, end + size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total

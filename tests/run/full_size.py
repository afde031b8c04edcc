"""The published models of the recipes, as configurations at full size; on torch's meta device they weigh nothing."""

from __future__ import annotations


def _decoder(name, hidden, inner, layers, heads, key_heads, vocabulary, *, tied, head=128, **more):
    import transformers

    return getattr(transformers, f"{name}Config")(
        architectures=[f"{name}ForCausalLM"],
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        head_dim=head,
        max_position_embeddings=131072,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def _gemma():
    from transformers import Gemma3Config

    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "max_position_embeddings": 131072}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    vision |= {"image_size": 896, "patch_size": 14, "vision_use_head": False}
    architectures = ["Gemma3ForConditionalGeneration"]
    return Gemma3Config(text_config=text, vision_config=vision, architectures=architectures)


# hub id -> (configuration, parameters as published, those that text trains)
MODELS = {
    "package:smollm2-135m-instruct": (
        lambda: _decoder("Llama", 576, 1536, 30, 9, 3, 49152, tied=True, head=64),
        134_515_008,
        134_515_008,
    ),
    "Qwen/Qwen3-4B-Instruct-2507": (
        lambda: _decoder("Qwen3", 2560, 9728, 36, 32, 8, 151936, tied=True),
        4_022_468_096,
        4_022_468_096,
    ),
    "Qwen/Qwen3-4B-Thinking-2507": (
        lambda: _decoder("Qwen3", 2560, 9728, 36, 32, 8, 151936, tied=True),
        4_022_468_096,
        4_022_468_096,
    ),
    "Qwen/Qwen2.5-32B-Instruct": (
        lambda: _decoder("Qwen2", 5120, 27648, 64, 40, 8, 152064, tied=False),
        32_763_876_352,
        32_763_876_352,
    ),
    "zai-org/GLM-4-9B-0414": (
        lambda: _decoder("Glm4", 4096, 13696, 40, 32, 2, 151552, tied=False, attention_bias=True),
        9_400_279_040,
        9_400_279_040,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        lambda: _decoder("Llama", 4096, 14336, 32, 32, 8, 128256, tied=False),
        8_030_261_248,
        8_030_261_248,
    ),
    "google/gemma-3-4b-it": (_gemma, 4_300_079_472, 3_880_263_168),
}

"""The tiny random models and the tokenizers that tests share."""

from __future__ import annotations

from pathlib import Path

# of almost every model in the tests
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# of one that only has to train
SMALLEST = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama_config(**options):
    """The configuration of a Llama of `SHAPE`, changed by `options`."""
    from transformers import LlamaConfig

    return LlamaConfig(**{**SHAPE, **options})


def tiny_llama(seed: int = 0, **options):
    """A random Llama of `SHAPE`, changed by `options`."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**options))


def byte_tokenizer(eos: str = "<|im_end|>"):
    """One token a byte (ids 4 to 259), ChatML; `<|end|>` is a special token that no template writes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<|im_start|>", "<|im_end|>", "<|end|>"]
    vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token="<pad>", additional_special_tokens=specials[1:]
    )
    fast.chat_template = TEMPLATE
    return fast


def save_model(folder: Path, *, eos: str = "<|im_end|>", tied: bool = True) -> Path:
    """A random two-layer Llama and its tokenizer."""
    tokenizer = byte_tokenizer(eos)
    model = tiny_llama(
        vocab_size=260,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def character_tokenizer(specials, characters, template, **names):
    """A token for each character, after the special ones; `names` are the special tokens' roles."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: number for number, token in enumerate([*specials, *characters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=names.get("unk_token", "<s>")))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template, **names
    )


def make_word_tokenizer():
    """A word-level tokenizer of 128 ids with bos 1, eos 2 and pad 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )

"""A byte-level tokenizer with a ChatML template, and a tiny random Llama that goes with it."""

import copy
import importlib.util
import sys
import types

import pytest
import torch

from tests.tiny_models import TEMPLATE
from tests.tiny_models import tiny_llama as make_llama


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One token a byte (ids 3 to 258), `<|im_start|>` 1, `<|im_end|>` 2 (end of sequence and padding), `<s>` 0 unused."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "<|im_start|>": 1, "<|im_end|>": 2, **{c: i for i, c in enumerate(alphabet, 3)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture
def tiny_llama():
    """Random Llama of vocabulary 259 with weights large enough for its distributions to be far from uniform."""
    model = make_llama(
        vocab_size=259,
        max_position_embeddings=1024,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return model.eval()


@pytest.fixture
def answering(tiny_llama, byte_tokenizer, monkeypatch):
    """answering({question: answer}): the tiny model with a forward that continues the prompt of each known question with its
    answer, and any other with its end; generation itself is the real one."""
    from eaftdrope.evaluate.probes.answers import prompt_ids, question

    def make(answers):
        scripts = {
            tuple(prompt_ids(question(asked), byte_tokenizer)): byte_tokenizer(f"{answer}<|im_end|>").input_ids
            for asked, answer in answers.items()
        }
        forward, rows = tiny_llama.forward, []

        def scripted(input_ids=None, attention_mask=None, **kwargs):
            if input_ids.shape[1] > 1:
                prompts = [tuple(ids[int((ids != 2).nonzero()[0]) :].tolist()) for ids in input_ids]
                rows[:] = [iter(scripts.get(prompt, [2])) for prompt in prompts]
            out = forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            out.logits = torch.zeros_like(out.logits)
            for i, script in enumerate(rows):
                out.logits[i, -1, next(script, 2)] = 1.0
            return out

        monkeypatch.setattr(tiny_llama, "forward", scripted)
        return tiny_llama

    return make


@pytest.fixture
def bfcl(monkeypatch):
    """bfcl(functions, calls, accepted, category) -> verdict of BFCL's own checker. Its list of models imports every vendor's
    client, and only `underscore_to_dot` is needed of it."""
    if importlib.util.find_spec("bfcl_eval") is None:
        pytest.skip("bfcl-eval is not installed: the matcher is NOT compared with BFCL's own checker")
    stub = types.ModuleType("bfcl_eval.constants.model_config")
    stub.MODEL_CONFIG_MAPPING = {"model": types.SimpleNamespace(underscore_to_dot=False)}
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.delitem(sys.modules, "bfcl_eval.eval_checker.ast_eval.ast_checker", raising=False)
    try:
        from bfcl_eval.constants.enums import Language
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
    except ImportError as error:
        pytest.skip(f"bfcl-eval cannot be imported ({error}): the matcher is NOT compared with BFCL's own checker")

    def check(functions, calls, accepted, category):
        # it changes what it is given
        given = copy.deepcopy((functions, calls, accepted))
        return ast_checker(*given, Language.PYTHON, category, "model")["valid"]

    yield check
    sys.modules.pop("bfcl_eval.eval_checker.ast_eval.ast_checker", None)

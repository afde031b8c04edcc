"""Greedy generation in batches, and the function-call probe on a model made to answer."""

import json

import pytest
import torch

from eaftdrope.data import Example, parse_tool_calls, render_prompt
from eaftdrope.evaluate import build_probes, run_probes
from eaftdrope.evaluate.generation import generate, stop_token_ids
from tests.evaluate.probe_options import probe_options

PROMPTS = ["Hello there", "a", "What is the capital of France?", "xyz" * 20]


def test_batched_equals_one_at_a_time(tiny_llama, byte_tokenizer):
    alone = [
        generate(tiny_llama, byte_tokenizer, [prompt], max_new_tokens=24, batch_tokens=10_000)[0] for prompt in PROMPTS
    ]
    for batch_tokens in (100, 10_000):
        assert generate(tiny_llama, byte_tokenizer, PROMPTS, max_new_tokens=24, batch_tokens=batch_tokens) == alone
    assert len(set(alone)) == len(PROMPTS)


def test_a_model_that_learns_as_it_reads_generates_for_prompts_of_one_length(tiny_llama, byte_tokenizer, monkeypatch):
    """Each answer is that of its prompt on its own; prompts of the same length are generated together."""
    from eaftdrope.evaluate import generation
    from eaftdrope.ttt import TTTConfig, apply_ttt

    apply_ttt(tiny_llama, TTTConfig(window=16, chunk=8, fast_blocks=1, lr=2.0))
    prompts = [*PROMPTS, "Hello  here", "b"]
    alone = [
        generate(tiny_llama, byte_tokenizer, [prompt], max_new_tokens=24, batch_tokens=10_000)[0] for prompt in prompts
    ]
    sizes, plain = [], generation._generate_batch
    monkeypatch.setattr(
        generation, "_generate_batch", lambda model, rows, *rest: sizes.append(len(rows)) or plain(model, rows, *rest)
    )
    assert generate(tiny_llama, byte_tokenizer, prompts, max_new_tokens=24, batch_tokens=10_000) == alone
    assert sizes == [1, 1, 2, 2]
    # it does learn: the same weights without learning answer the long prompt otherwise
    tiny_llama.ttt.config = TTTConfig(window=16, chunk=8, fast_blocks=1, lr=0.0)
    assert generate(tiny_llama, byte_tokenizer, prompts[3:4], max_new_tokens=24, batch_tokens=10_000) != alone[3:4]


def greedy(model, ids, count):
    """The next `count` tokens, each from a forward over everything before it."""
    new = []
    with torch.no_grad():
        for _ in range(count):
            new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return new


def test_equals_a_plain_greedy_loop(tiny_llama, byte_tokenizer):
    new = greedy(tiny_llama, byte_tokenizer(PROMPTS[0]).input_ids, 24)
    assert 2 not in new
    # Sampling defaults that a checkpoint brings must not change a greedy answer.
    tiny_llama.generation_config.do_sample = True
    tiny_llama.generation_config.temperature = 5.0
    tiny_llama.generation_config.repetition_penalty = 3.0
    (answer,) = generate(tiny_llama, byte_tokenizer, PROMPTS[:1], max_new_tokens=24, batch_tokens=10_000)
    assert answer == byte_tokenizer.decode(new)
    assert tiny_llama.generation_config.repetition_penalty == 3.0


def test_the_head_is_never_multiplied_as_a_batch(tiny_llama, byte_tokenizer):
    """A slice of the hidden states is not contiguous, and torch then copies the head's weights for each row."""
    found = []
    hook = tiny_llama.lm_head.register_forward_hook(lambda _, inputs, __: found.append(inputs[0].is_contiguous()))
    generate(tiny_llama, byte_tokenizer, PROMPTS, max_new_tokens=4, batch_tokens=10_000)
    hook.remove()
    assert found == [True] * 4
    assert not tiny_llama.lm_head._forward_pre_hooks


def test_stops_at_every_end(tiny_llama, byte_tokenizer):
    tiny_llama.generation_config.eos_token_id = [7, 9]
    assert stop_token_ids(tiny_llama, byte_tokenizer) == [2, 7, 9]
    tiny_llama.generation_config.eos_token_id = None
    assert stop_token_ids(tiny_llama, byte_tokenizer) == [2]
    # A base model's tokenizer ends a text with another token than its template ends a turn.
    byte_tokenizer.eos_token = "<s>"
    try:
        assert stop_token_ids(tiny_llama, byte_tokenizer) == [0, 2]
    finally:
        byte_tokenizer.eos_token = "<|im_end|>"


def test_answer_is_cut_at_the_end_of_turn(tiny_llama, byte_tokenizer):
    ids = greedy(tiny_llama, byte_tokenizer("Hello").input_ids, 20)
    stop = ids[9]
    tiny_llama.generation_config.eos_token_id = [stop]
    # The other row goes on, so the first is filled up behind its end.
    answers = generate(tiny_llama, byte_tokenizer, ["Hello", "xyz"], max_new_tokens=20, batch_tokens=1000)
    assert answers[0] == byte_tokenizer.decode(ids[: ids.index(stop)])
    assert ids.index(stop) > 3 and len(answers[1]) > len(answers[0])


def test_progress_reaches_its_total(tiny_llama, byte_tokenizer):
    seen = []
    generate(
        tiny_llama,
        byte_tokenizer,
        PROMPTS,
        max_new_tokens=5,
        batch_tokens=100,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen) and seen[-1] == (20, 20) and len(seen) > 6


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def call_example(question, calls, **more):
    tool_calls = [{"type": "function", "function": {"name": name, "arguments": args}} for name, args in calls]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": tool_calls},
    ]
    return Example(messages=messages, tools=TOOLS, origin="row:1", **more)


EXAMPLES = [
    call_example("one", [("add", {"a": 1, "b": 2})]),
    call_example("two", [("add", {"a": 1})], ground_truth=[{"add": {"a": [1, 7], "b": ["", 3]}}]),
    call_example("three", [("add", {"a": 5})]),
    Example(messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], origin="row:4"),
    Example(text="a document"),
    call_example("four", [("add", {"a": 1}), ("sub", {"a": 2})]),
]
ANSWERS = {
    "one": [{"name": "add", "arguments": {"b": 2.0, "a": 1}}],
    "two": [{"name": "add", "arguments": {"a": 7}}],
    "three": [{"name": "add", "arguments": {"a": 6}}],
    "four": [{"name": "sub", "arguments": {"a": 2}}, {"name": "add", "arguments": {"a": 1}}],
}


@pytest.fixture
def answering(tiny_llama, byte_tokenizer, monkeypatch):
    """The tiny model with a forward that continues each known prompt with its answer: generation itself is the real one."""
    scripts = {}
    for example in EXAMPLES:
        if example.messages and "tool_calls" in example.answer:
            question = example.messages[0]["content"]
            prompt = render_prompt(example.prompt_messages, example.tools, byte_tokenizer)
            answer = f"<tool_call>{json.dumps(ANSWERS[question])}</tool_call><|im_end|>"
            assert parse_tool_calls(answer.removesuffix("<|im_end|>")) == ANSWERS[question]
            scripts[tuple(byte_tokenizer(prompt).input_ids)] = byte_tokenizer(answer).input_ids
    forward, rows = tiny_llama.forward, []

    def scripted(input_ids=None, attention_mask=None, **kwargs):
        if input_ids.shape[1] > 1:
            prompts = [ids[int((ids != 2).nonzero()[0]) :].tolist() for ids in input_ids]
            rows[:] = [iter(scripts[tuple(prompt)]) for prompt in prompts]
        out = forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        out.logits = torch.zeros_like(out.logits)
        for i, script in enumerate(rows):
            out.logits[i, -1, next(script, 2)] = 1.0
        return out

    monkeypatch.setattr(tiny_llama, "forward", scripted)
    return tiny_llama


def test_function_calls_are_scored(answering, byte_tokenizer):
    (probe,) = build_probes(
        [("function_calls", "target", probe_options("function_calls", max_new_tokens=200))], held_out_examples=EXAMPLES
    )
    exact, right = run_probes(answering, byte_tokenizer, [probe], batch_tokens=500)
    assert [hit for hit, _ in exact.units] == [1.0, 1.0, 0.0, 1.0]
    assert [hit for hit, _ in right.units] == [1.0, 1.0, 1.0, 1.0]
    assert (exact.metric, exact.value, exact.n, exact.better) == ("exact calls", 0.75, 4, "higher")
    assert (right.metric, right.group) == ("right function", "target")


def test_an_answer_longer_than_the_bound_is_wrong(answering, byte_tokenizer):
    options = probe_options("function_calls", max_new_tokens=40, limit=1)
    (probe,) = build_probes([("function_calls", "target", options)], held_out_examples=EXAMPLES)
    exact, right = run_probes(answering, byte_tokenizer, [probe])
    assert (exact.n, exact.value, right.value) == (1, 0.0, 0.0)

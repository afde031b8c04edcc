"""A model in this process: batched replies are single ones in float32, a journal repeats a run in bfloat16, and a run that is
killed in the middle of a batch keeps its replies."""

import pytest
import torch

from eaftdrope.errors import UserError
from eaftdrope.evaluate.rlm.chat_models import open_chat_model
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.models import HFModel, ScriptedModel
from tests.tiny_models import save_model

PROMPTS = [[{"role": "user", "content": "abc " * length}] for length in (9, 1, 4, 16, 2, 2, 7)]
ROOT = "```repl\nreplies = llm_query_batched(context)\nanswer = {'content': '|'.join(replies), 'ready': True}\n```"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


def same(reply):
    return reply.text, reply.tokens_in, reply.tokens_out


def test_batched_replies_are_single_ones_in_float32(folder):
    """Whatever their lengths, their order and the size of the batch."""
    single = [open_chat_model(folder, batch_size=1).generate([prompt], 12)[0] for prompt in PROMPTS]
    assert len({reply.text for reply in single}) > 1 and any(reply.text for reply in single)
    for size in (2, 3, 8):
        model = open_chat_model(folder, batch_size=size)
        assert list(map(same, model.generate(PROMPTS, 12))) == list(map(same, single))
        assert list(map(same, model.generate(PROMPTS[::-1], 12))) == list(map(same, single[::-1]))


@pytest.mark.parametrize(("size", "batches"), [(8, [7]), (3, [3, 3, 1]), (1, [1] * 7)])
def test_prompts_share_the_passes_of_the_model(folder, size, batches):
    """What makes batched calls cheaper than single ones, which benchmarks/rlm measures."""
    model, seen = open_chat_model(folder, batch_size=size), []
    generate = model.model.generate

    def counting(*, input_ids, **options):
        seen.append(len(input_ids))
        return generate(input_ids=input_ids, **options)

    model.model.generate = counting
    model.generate(PROMPTS, 2)
    assert seen == batches


def test_tokens_are_counted_up_to_the_stop_token(folder):
    model = open_chat_model(folder)
    (reply,) = model.generate(PROMPTS[:1], 12)
    ids = model.tokenizer.apply_chat_template(PROMPTS[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert (reply.tokens_in, reply.tokens_out) == (len(ids), 12)
    output = model.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    stop = output[5]
    model.model.generation_config.eos_token_id = [stop]
    place = output.index(stop)
    for batch in (PROMPTS[:1], PROMPTS):
        reply = model.generate(batch, 12)[0]
        assert reply.tokens_out == place + 1
        assert reply.text == model.tokenizer.decode(output[: place + 1], skip_special_tokens=True)


def test_what_the_checkpoint_says_about_generation_does_not_count(folder):
    model = open_chat_model(folder)
    expected = [reply.text for reply in model.generate(PROMPTS, 12)]
    options = {
        "repetition_penalty": 5.0,
        "do_sample": True,
        "temperature": 9.0,
        "no_repeat_ngram_size": 1,
        "num_beams": 3,
    }
    for name, value in options.items():
        setattr(model.model.generation_config, name, value)
    assert [reply.text for reply in model.generate(PROMPTS, 12)] == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "chat_template is not set"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
            "no system role",
        ),
    ],
)
def test_a_template_that_cannot_hold_a_run_is_refused(folder, template, message):
    model = open_chat_model(folder)
    model.tokenizer.chat_template = template
    with pytest.raises(UserError, match=rf"tiny cannot be asked in turns with a system prompt \(.*{message}"):
        HFModel(model.model, model.tokenizer, name="tiny")


def test_a_prompt_that_does_not_fit(folder):
    model = open_chat_model(folder)
    tokens = len(
        model.tokenizer.apply_chat_template(PROMPTS[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    model.check(PROMPTS[0], 512 - tokens)
    with pytest.raises(ValueError, match=rf"the prompt has {tokens} tokens; {tokens - 1} fit"):
        model.check(PROMPTS[0], 513 - tokens)


def test_a_prompt_of_megabytes_is_refused_before_it_is_encoded(folder):
    model = open_chat_model(folder)
    long = [{"role": "user", "content": "x" * 5_000_000}]
    model._ids = None
    with pytest.raises(ValueError, match=r"the prompt has more than 512 tokens\. Send a shorter part"):
        model.check(long, 10)


def test_the_journal_makes_a_run_in_bfloat16_repeatable(folder, tmp_path):
    """A batch that was killed and comes back in other pieces keeps the replies that it had; replayed, it has all of them."""

    def complete(model, journal):
        rlm = RLM(ScriptedModel(lambda _: ROOT), model, limits=Limits(sub_tokens=8))
        return rlm.complete([prompt[0]["content"] for prompt in PROMPTS], "?", journal=journal)

    class Killed(Exception):
        pass

    model, file = open_chat_model(folder, dtype="bfloat16", batch_size=3), tmp_path / "run.jsonl"
    assert model.model.dtype == torch.bfloat16
    whole = complete(model, None).answer.split("|")
    answer, batches = model._batch, []

    def killed_in_the_second(prompts, max_tokens):
        if batches:
            raise Killed
        batches.append(len(prompts))
        return answer(prompts, max_tokens)

    model._batch = killed_in_the_second
    with pytest.raises(Killed):
        complete(model, file)
    # the shortest three were answered together
    resumed = complete(open_chat_model(folder, dtype="bfloat16", batch_size=1), file)
    replies = resumed.answer.split("|")
    assert resumed.usage["replayed"] == 1 + 3
    assert [replies[index] for index in (1, 4, 5)] == [whole[index] for index in (1, 4, 5)]
    model._batch = None
    replayed = complete(model, file)
    assert replayed.answer == resumed.answer and replayed.usage["replayed"] == 1 + len(PROMPTS)

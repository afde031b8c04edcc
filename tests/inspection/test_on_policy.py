"""The contrast is drawn from the model's whole distribution, whatever the checkpoint's own sampling settings are."""

import torch
from datasets import Dataset

from eaftdrope.evaluate.generation import generate_ids
from eaftdrope.inspection.on_policy import sampled_rows, survey_of_rows
from eaftdrope.loss.gates import resolve_gate
from tests.tiny_models import make_word_tokenizer
from tests.trainer.tiny import VOCAB, tiny_model


def model_with_narrow_defaults():
    model = tiny_model(scale=0.3).eval()
    model.generation_config.update(do_sample=True, temperature=0.1, top_p=0.3, top_k=2)
    return model


def test_tokens_come_as_often_as_they_are_likely():
    model, tokenizer = model_with_narrow_defaults(), make_word_tokenizer()
    prompt = [5, 9, 17]
    torch.manual_seed(0)
    answers = generate_ids(model, tokenizer, [prompt] * 4000, max_new_tokens=1, batch_tokens=8000, sample=True)
    # an answer that ended at once is empty: its token was the end
    drawn = torch.bincount(torch.tensor([answer[0] if answer else 2 for answer in answers]), minlength=VOCAB) / 4000
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    # half the sum of differences; chance alone makes some 0.05 of it, a top_p of 0.3 would make 0.7
    assert (drawn - expected).abs().sum() / 2 < 0.1


def test_rows_keep_their_prompt_and_the_seed_decides():
    model, tokenizer = model_with_narrow_defaults(), make_word_tokenizer()
    rows = Dataset.from_list(
        [{"input_ids": [4, 5, number + 6, 8, 9], "labels": [-100] * 3 + [8, 9]} for number in range(6)]
    )
    arguments = dict(batch_tokens=2000)
    first = sampled_rows(model, tokenizer, rows, 3, seed=1, **arguments)
    assert [row.input_ids[:3] for row in first] == [[4, 5, 6], [4, 5, 8], [4, 5, 10]]
    for row in first:
        assert row.labels[:3] == [-100] * 3 and row.labels[3:] == row.input_ids[3:]
    assert sampled_rows(model, tokenizer, rows, 3, seed=1, **arguments) == first
    assert sampled_rows(model, tokenizer, rows, 3, seed=2, **arguments) != first
    seen = survey_of_rows(model, first, resolve_gate("eaft"), batch_tokens=2000)
    assert seen["tokens"] == seen["landscape"]["tokens"] == sum(len(row.input_ids) - 3 for row in first)
    # what a model samples is as surprising to it as it expects
    assert abs(seen["summary"]["nll"] - seen["summary"]["entropy"]) < 0.5

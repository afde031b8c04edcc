"""token_nll and the three likelihood probes against plain loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from eaftdrope.errors import UserError
from eaftdrope.evaluate import run_probes
from eaftdrope.evaluate.likelihood import TokenRow, batches, rows_nll, token_nll
from eaftdrope.evaluate.probes.held_out_loss import HeldOutLossProbe
from eaftdrope.evaluate.probes.multiple_choice import MultipleChoiceProbe, Question, choice_row
from eaftdrope.evaluate.probes.perplexity import PerplexityProbe


def random_rows(count=9, seed=0, longest=40):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, longest, (), generator=generator))
        ids = torch.randint(3, 259, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.5, ids, -100)
        rows.append(TokenRow(ids.tolist(), labels.tolist()))
    return rows


def plain_nll(model, row):
    """Token by token, one row, float64 log-softmax of the model's own logits."""
    with torch.no_grad():
        logits = model(torch.tensor([row.input_ids])).logits[0].double()
    logp = logits.log_softmax(-1)
    terms = [-logp[t - 1, y].item() for t, y in enumerate(row.labels) if t > 0 and y != -100]
    return math.fsum(terms), len(terms)


def test_token_nll_equals_a_plain_loop_whatever_the_batch(tiny_llama):
    rows = random_rows()
    expected = [plain_nll(tiny_llama, row) for row in rows]
    for batch_tokens in (1, 64, 10_000):
        found = rows_nll(tiny_llama, rows, batch_tokens=batch_tokens)
        for (nll, count), (plain, plain_count) in zip(found, expected):
            assert count == plain_count
            assert nll == pytest.approx(plain, rel=1e-5, abs=1e-6)


def test_token_nll_without_logits_to_keep(tiny_llama):
    rows = random_rows(4)
    expected = rows_nll(tiny_llama, rows, batch_tokens=10_000)
    forward = tiny_llama.forward
    seen = []

    def older(input_ids, attention_mask=None, use_cache=None):
        seen.append(len(input_ids))
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    tiny_llama.forward = older
    found = rows_nll(tiny_llama, rows, batch_tokens=10_000)
    assert torch.tensor(found).flatten().tolist() == pytest.approx(torch.tensor(expected).flatten().tolist(), rel=1e-6)
    assert seen == [4]


def test_long_rows_cross_the_chunk_border(tiny_llama):
    ids = torch.randint(3, 259, (700,), generator=torch.Generator().manual_seed(3)).tolist()
    row = TokenRow(ids, ids)
    ((nll, count),) = rows_nll(tiny_llama, [row], batch_tokens=10_000)
    assert count == 699
    assert nll == pytest.approx(plain_nll(tiny_llama, row)[0], rel=1e-6)


def test_rows_without_a_label_count_nothing_and_run_nothing(tiny_llama):
    ids = torch.tensor([[5, 6, 7]])
    tiny_llama.forward = None
    # The first token is never predicted, so its label counts nothing either.
    nll, count = token_nll(tiny_llama, ids, torch.tensor([[5, -100, -100]]), torch.ones_like(ids))
    assert nll.tolist() == [0.0] and count.tolist() == [0]


def test_bfloat16_logits_are_summed_in_float32(tiny_llama):
    """Only the model itself runs in bfloat16: with the same logits, the loss equals float64's to float32 accuracy."""
    model = tiny_llama.to(torch.bfloat16)
    row = random_rows(1, longest=200, seed=5)[0]
    ((nll, _),) = rows_nll(model, [row], batch_tokens=1000)
    assert nll == pytest.approx(plain_nll(model, row)[0], rel=1e-5)


def test_batches_hold_every_row_once_and_keep_the_bound():
    lengths = [3, 9, 1, 9, 4, 4, 20, 2]
    found = list(batches(lengths, 18))
    assert sorted(i for batch in found for i in batch) == list(range(8))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 18
    assert found[0] == [6] and found[1] == [1, 3]


def test_held_out_loss_equals_cross_entropy_over_all_tokens(tiny_llama, byte_tokenizer):
    rows = random_rows(7)
    logits, targets = [], []
    for row in rows:
        with torch.no_grad():
            logits.append(tiny_llama(torch.tensor([row.input_ids])).logits[0, :-1])
        targets.append(torch.tensor(row.labels[1:]))
    expected = F.cross_entropy(torch.cat(logits), torch.cat(targets)).item()
    (score,) = run_probes(tiny_llama, byte_tokenizer, [HeldOutLossProbe(rows)], batch_tokens=100)
    assert score.value == pytest.approx(expected, rel=1e-6)
    assert (score.group, score.metric, score.n, score.better) == ("target", "held-out loss", 7, "lower")
    assert sum(weight for _, weight in score.units) == (torch.cat(targets) != -100).sum()


def test_perplexity_equals_a_plain_loop(tiny_llama, byte_tokenizer):
    text = "It was a bright cold day in April, and the clocks were striking thirteen. " * 3
    probe = PerplexityProbe([text, "Short."], max_tokens=None, window=32)
    ids = byte_tokenizer(text).input_ids
    terms = []
    for piece in [ids[i : i + 32] for i in range(0, len(ids), 32)] + [byte_tokenizer("Short.").input_ids]:
        with torch.no_grad():
            logp = tiny_llama(torch.tensor([piece])).logits[0].double().log_softmax(-1)
        terms += [-logp[t - 1, piece[t]].item() for t in range(1, len(piece))]
    (score,) = run_probes(tiny_llama, byte_tokenizer, [probe])
    assert score.value == pytest.approx(math.exp(sum(terms) / len(terms)), rel=1e-5)
    assert sum(weight for _, weight in score.units) == len(terms)


def test_perplexity_windows_are_spread_and_bounded(byte_tokenizer):
    text = "".join(chr(97 + i // 10) for i in range(200))
    rows = PerplexityProbe([text], max_tokens=40, window=10).windows(byte_tokenizer)
    assert [byte_tokenizer.decode(row.input_ids) for row in rows] == ["a" * 10, "f" * 10, "k" * 10, "p" * 10]
    assert all(row.labels == [-100, *row.input_ids[1:]] for row in rows)


def test_perplexity_windows_begin_with_bos_where_texts_do(word_tokenizer):
    from tokenizers.processors import TemplateProcessing

    plain = PerplexityProbe(["w4 w5 w6 w7 w8"], 4096, window=3).windows(word_tokenizer)
    assert [row.input_ids for row in plain] == [[4, 5, 6], [7, 8]]
    backend = word_tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    try:
        rows = PerplexityProbe(["w4 w5 w6 w7 w8"], 4096, window=3).windows(word_tokenizer)
        assert [(row.input_ids, row.labels) for row in rows] == [
            ([1, 4, 5], [-100, 4, 5]),
            ([1, 6, 7], [-100, 6, 7]),
            ([1, 8], [-100, 8]),
        ]
        assert choice_row(word_tokenizer, "w4", "w5 w6").labels[-2:] == [5, 6]
        assert choice_row(word_tokenizer, "w4", "w5 w6").input_ids[0] == 1
    finally:
        backend.post_processor = before


def test_perplexity_of_nothing_is_refused(byte_tokenizer):
    with pytest.raises(UserError, match=r"the perplexity probe has no text: its files are empty\."):
        PerplexityProbe([""], 4096).windows(byte_tokenizer)


QUESTIONS = [
    Question("What is 2 + 3?", ("5", "seven hundred", "4", "no"), 0),
    Question("Which is a colour?", ("stone", "green", "a very long answer indeed", "x"), 1),
    Question("Who?", ("me", "you"), 1),
    Question("Where do camels live?", ("in the sea", "on ice", "in the desert", "in caves"), 2),
    Question("Opposite of hot?", ("warm", "spicy", "dry", "cold"), 3),
]


def test_multiple_choice_equals_brute_force(tiny_llama, byte_tokenizer):
    plain, normalised = [], []
    for q in QUESTIONS:
        costs = []
        for choice in q.choices:
            prompt = byte_tokenizer(f"Question: {q.question}\nAnswer:").input_ids
            whole = byte_tokenizer(f"Question: {q.question}\nAnswer: {choice}").input_ids
            with torch.no_grad():
                logp = tiny_llama(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            costs.append(-sum(logp[t - 1, whole[t]].item() for t in range(len(prompt), len(whole))))
        plain.append(costs.index(min(costs)) == q.answer)
        lengths = [len(choice) for choice in q.choices]
        ratios = [cost / length for cost, length in zip(costs, lengths)]
        normalised.append(ratios.index(min(ratios)) == q.answer)
    # The two ways must differ somewhere, or the test would not tell them apart.
    assert plain != normalised
    for batch_tokens in (50, 5000):
        scores = run_probes(tiny_llama, byte_tokenizer, [MultipleChoiceProbe(QUESTIONS)], batch_tokens=batch_tokens)
        assert [score.metric for score in scores] == ["multiple choice", "multiple choice, plain"]
        assert [hit for hit, _ in scores[0].units] == normalised
        assert [hit for hit, _ in scores[1].units] == plain
        assert scores[0].value == sum(normalised) / 5 and scores[0].better == "higher"


def test_model_is_left_as_it_came(tiny_llama, byte_tokenizer):
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    tiny_llama.gradient_checkpointing_enable()
    tiny_llama.config.use_cache = False
    torch.manual_seed(7)
    state = torch.get_rng_state()
    seen = []
    with torch.enable_grad():
        run_probes(
            tiny_llama,
            byte_tokenizer,
            [HeldOutLossProbe(random_rows(3)), MultipleChoiceProbe(QUESTIONS[:1])],
            batch_tokens=60,
            progress=lambda name, done, total: seen.append((name, done, total, tiny_llama.training)),
        )
        assert torch.is_grad_enabled()
    assert tiny_llama.training and not tiny_llama.model.layers[0].training and tiny_llama.model.layers[1].training
    assert tiny_llama.is_gradient_checkpointing and tiny_llama.config.use_cache is False
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())
    # Dropout is off while measuring, and each probe ends at its own total.
    assert not any(training for *_, training in seen)
    assert [entry[:3] for entry in seen if entry[1] == entry[2]] == [("held_out_loss", 3, 3), ("multiple_choice", 4, 4)]


def test_modes_come_back_after_an_error(tiny_llama, byte_tokenizer):
    tiny_llama.train()
    with pytest.raises(UserError):
        run_probes(tiny_llama, byte_tokenizer, [PerplexityProbe([""], 4096)])
    assert tiny_llama.training


def test_an_adapter_is_measured(tiny_llama, byte_tokenizer):
    from peft import LoraConfig, get_peft_model

    rows = random_rows(3)
    base = run_probes(tiny_llama, byte_tokenizer, [HeldOutLossProbe(rows)])[0].value
    model = get_peft_model(tiny_llama, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    (adapted,) = run_probes(model, byte_tokenizer, [HeldOutLossProbe(rows)])
    with model.disable_adapter():
        (off,) = run_probes(model, byte_tokenizer, [HeldOutLossProbe(rows)])
    assert off.value == pytest.approx(base, rel=1e-6)
    assert abs(adapted.value - base) > 1e-3
    merged = model.merge_and_unload()
    assert run_probes(merged, byte_tokenizer, [HeldOutLossProbe(rows)])[0].value == pytest.approx(
        adapted.value, rel=1e-4
    )

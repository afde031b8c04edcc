"""KL and top-1 agreement with a base model against plain loops in float64; what is stored of the base model."""

import copy
import dataclasses
import math

import pytest
import torch

from eaftdrope.errors import UserError
from eaftdrope.evaluate import build_probes, run_probes
from eaftdrope.evaluate.probes import agreement as capture
from eaftdrope.evaluate.probes.agreement import AgreementProbe, general_prompts, load, spread
from eaftdrope.evaluate.probes.answers import prompt_ids, question
from eaftdrope.evaluate.probes.build import cheap_probes
from tests.evaluate.probe_options import probe_options

PROMPTS = [question(text) for text in ("Hello", "What is the capital of France?", "x" * 30, "Why?")]


def probe(**options):
    return AgreementProbe(PROMPTS, **{"max_tokens": 1024, "max_new_tokens": 12, **options})


def drifted(model, amount, seed=1):
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weights in other.parameters():
            weights.add_(amount * weights.std() * torch.randn_like(weights))
    return other


def plain_loop(base, model, tokenizer, count):
    """Token by token, float64: [(KL, same top)] of every position of every prompt's greedy answer and of its end."""
    found = []
    for example in PROMPTS:
        ids, positions = prompt_ids(example, tokenizer), []
        for step in range(count + 1):
            with torch.no_grad():
                p = base(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
                q = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            positions.append(((p.exp() * (p - q)).sum().item(), p.argmax() == q.argmax()))
            if step == count or p.argmax() == 2:
                break
            ids = [*ids, p.argmax().item()]
        found.append(positions)
    return found


@pytest.mark.parametrize("batch_tokens", [70, 4000])
def test_equals_a_plain_loop(tiny_llama, byte_tokenizer, tmp_path, batch_tokens):
    tuned = drifted(tiny_llama, 0.1)
    expected = plain_loop(tiny_llama, tuned, byte_tokenizer, 12)
    agreement = probe()
    run_probes(tiny_llama, byte_tokenizer, [agreement], capture=tmp_path / "c", batch_tokens=batch_tokens)
    divergence, same = run_probes(tuned, byte_tokenizer, [agreement], batch_tokens=batch_tokens)
    assert [weight for _, weight in divergence.units] == [len(row) for row in expected]
    for (total, _), row in zip(divergence.units, expected):
        # float16 of log-probabilities: 2^-11 of each
        assert total == pytest.approx(math.fsum(kl for kl, _ in row), rel=1e-3, abs=1e-5)
    assert [total for total, _ in same.units] == [sum(bool(top) for _, top in row) for row in expected]
    kl = math.fsum(kl for row in expected for kl, _ in row) / sum(map(len, expected))
    assert divergence.value == pytest.approx(kl, rel=1e-3) and kl > 0.05
    assert 0.2 < same.value < 1
    assert (divergence.metric, divergence.better, divergence.kind) == ("KL from the base model", "lower", "mean")
    assert (same.metric, same.better, same.group) == ("top-1 agreement with the base model", "higher", "general")


def test_the_base_model_agrees_with_itself(tiny_llama, byte_tokenizer, tmp_path):
    agreement = probe()
    divergence, same = run_probes(tiny_llama, byte_tokenizer, [agreement], capture=tmp_path / "c")
    assert (divergence.value, divergence.stderr, same.value, same.stderr) == (0.0, 0.0, 1.0, 0.0)
    measured, measured_same = run_probes(tiny_llama, byte_tokenizer, [agreement])
    assert 0 <= measured.value < 1e-6 and measured_same.value == 1.0
    assert [weight for _, weight in measured.units] == [weight for _, weight in divergence.units]


def test_planted_changes_move_it(tiny_llama, byte_tokenizer, tmp_path):
    agreement = probe()
    run_probes(tiny_llama, byte_tokenizer, [agreement], capture=tmp_path / "c")
    scores = [run_probes(drifted(tiny_llama, amount), byte_tokenizer, [agreement]) for amount in (0.01, 0.05, 0.3)]
    kl, same = ([pair[index].value for pair in scores] for index in (0, 1))
    assert 1e-5 < kl[0] < kl[1] < kl[2] and kl[2] > 20 * kl[0]
    assert same[0] > same[2]


def test_one_token_made_more_probable_is_seen(tiny_llama, byte_tokenizer, tmp_path, monkeypatch):
    """A shift of one logit by d changes KL to log(1 - p + p e^d) - p d at each position."""
    agreement = probe()
    run_probes(tiny_llama, byte_tokenizer, [agreement], capture=tmp_path / "c")
    p = load(agreement.captured, key=agreement._key(byte_tokenizer)).log_probs[:, 50].double().exp()
    expected = (torch.log(1 - p + p * math.exp(3)) - 3 * p).mean().item()
    forward = tiny_llama.forward

    def shifted(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits[..., 50] += 3
        return out

    monkeypatch.setattr(tiny_llama, "forward", shifted)
    monkeypatch.setattr("eaftdrope.evaluate.likelihood.keeps_logits", lambda model: False)
    assert run_probes(tiny_llama, byte_tokenizer, [agreement])[0].value == pytest.approx(expected, rel=1e-3)


def test_the_base_model_is_asked_once(tiny_llama, byte_tokenizer, tmp_path, monkeypatch):
    """A second capture reads the file: a run that goes on, or the next arm of a comparison."""
    file = tmp_path / "c"
    first = run_probes(tiny_llama, byte_tokenizer, [probe()], capture=file)
    monkeypatch.setattr(tiny_llama, "forward", None)
    again = probe()
    assert run_probes(tiny_llama, byte_tokenizer, [again], capture=file) == first
    assert again.captured == file and [entry.name for entry in tmp_path.iterdir()] == ["c"]
    for other in (probe(max_new_tokens=11), AgreementProbe(PROMPTS[:2], max_tokens=1024, max_new_tokens=12)):
        with pytest.raises(UserError, match=r"has the base model's answers to other prompts, or with other settings"):
            run_probes(tiny_llama, byte_tokenizer, [other], capture=file)


def test_killed_in_the_middle_leaves_no_capture(tiny_llama, byte_tokenizer, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        run_probes(tiny_llama, byte_tokenizer, [probe()], capture=tmp_path / "c")
    monkeypatch.undo()
    assert not (tmp_path / "c").exists()
    run_probes(tiny_llama, byte_tokenizer, [probe()], capture=tmp_path / "c")
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_without_a_base_model_it_is_refused(tiny_llama, byte_tokenizer):
    with pytest.raises(
        UserError, match=r"the probe agreement compares with a base model, whose predictions are not stored"
    ):
        run_probes(tiny_llama, byte_tokenizer, [probe()])


def test_positions_are_spread_and_bounded(monkeypatch):
    prompts, answers = [[1, 2, 3], [4]], [[5] * 9, [6] * 4]
    rows = spread(prompts, answers, vocabulary=100, max_tokens=99)
    assert [row.positions for row in rows] == [list(range(2, 12)), list(range(5))]
    assert rows[1].input_ids == [4, 6, 6, 6, 6]
    rows = spread(prompts, answers, vocabulary=100, max_tokens=5)
    assert [row.positions for row in rows] == [[2, 5, 8, 11], [2]]
    monkeypatch.setattr(capture, "CAPTURE_BYTES", 3 * 200)
    assert sum(len(row.positions) for row in spread(prompts, answers, vocabulary=100, max_tokens=99)) == 3
    # an answer without a position is left out
    assert [row.input_ids for row in spread(prompts, answers, vocabulary=300, max_tokens=99)] == [[1, 2, 3, *[5] * 9]]


@pytest.mark.parametrize("vocabulary", [49_152, 151_936, 262_144])
def test_a_capture_is_smaller_than_128_mb(vocabulary):
    rows = spread([[1]] * 100, [[2] * 100] * 100, vocabulary=vocabulary, max_tokens=10**6)
    assert 127e6 < 2 * vocabulary * sum(len(row.positions) for row in rows) <= 128e6


def test_a_subset_reads_the_same_capture(tiny_llama, byte_tokenizer, tmp_path):
    agreement, tuned = probe(), drifted(tiny_llama, 0.1)
    run_probes(tiny_llama, byte_tokenizer, [agreement], capture=tmp_path / "c")
    divergence, same = run_probes(tuned, byte_tokenizer, [agreement])
    few, few_same = run_probes(tuned, byte_tokenizer, cheap_probes([agreement], 2))
    assert torch.allclose(torch.tensor(few.units), torch.tensor(divergence.units[::2]), rtol=1e-5)
    assert few_same.units == same.units[::2]


def test_a_distribution_that_has_an_impossible_token(tiny_llama, byte_tokenizer, tmp_path):
    """Logits of minus infinity, as padding columns of a head have them."""
    with torch.no_grad():
        tiny_llama.lm_head.bias = torch.nn.Parameter(torch.zeros(259))
        tiny_llama.lm_head.bias[7] = -math.inf
    agreement = probe()
    run_probes(tiny_llama, byte_tokenizer, [agreement], capture=tmp_path / "c")
    assert 0 <= run_probes(tiny_llama, byte_tokenizer, [agreement])[0].value < 1e-6
    other = copy.deepcopy(tiny_llama)
    other.lm_head.bias.data[7] = 0.0
    assert 1e-4 < run_probes(other, byte_tokenizer, [agreement])[0].value < 10


def test_the_shipped_prompts_and_a_file(tmp_path):
    prompts = general_prompts()
    texts = [example.prompt_messages[0]["content"] for example in prompts]
    assert len(set(texts)) == 48 and all(len(example.prompt_messages) == 1 for example in prompts)
    options = probe_options("agreement", limit=4, max_tokens=9, max_new_tokens=5)
    (built,) = build_probes([("agreement", "general", options)])
    assert [example.prompt_messages[0]["content"] for example in built.prompts] == texts[::12]
    assert (built.max_tokens, built.max_new_tokens) == (9, 5)
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "A"}\n{"messages": [{"role": "user", "content": "B"}]}\n')
    (built,) = build_probes([("agreement", "general", probe_options("agreement", file=str(file)))])
    assert [example.prompt_messages[-1]["content"] for example in built.prompts] == ["A", "B"]
    assert dataclasses.replace(built, captured=file) == built
    file.write_text("")
    with pytest.raises(UserError, match=r"p\.jsonl: no prompts\."):
        build_probes([("agreement", "general", probe_options("agreement", file=str(file)))])

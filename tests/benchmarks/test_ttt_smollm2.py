"""TTT on SmolLM2: the meaning of its numbers, its plan, and that an interrupted training resumes exactly."""

import math

import pytest
import torch

from benchmarks.ttt.smollm2 import models, plan, run
from benchmarks.ttt.smollm2.document import Document, beyond, mean_loss
from benchmarks.ttt.smollm2.measure import PassKeys, losses_by_chunk, pass_key
from benchmarks.ttt.smollm2.plan import Evaluate, Train, tasks
from benchmarks.ttt.smollm2.rules import muon, orthogonalised
from benchmarks.ttt.smollm2.summary import differences, paired, tables
from benchmarks.ttt.smollm2.texts import load_texts
from benchmarks.ttt.smollm2.training import Training, row_order
from eaftdrope.errors import UserError
from eaftdrope.ttt import TTTConfig
from tests.tiny_models import byte_tokenizer, tiny_llama

# rules


def test_orthogonalised_in_a_basis_is_orthogonalised():
    torch.manual_seed(0)
    gradient = torch.randn(2, 12, 5, dtype=torch.float64) @ torch.randn(2, 5, 9, dtype=torch.float64)
    cheap, whole = orthogonalised(gradient, rank=5), orthogonalised(gradient, rank=100)
    torch.testing.assert_close(cheap, whole, rtol=1e-9, atol=1e-9)
    values = torch.linalg.svdvals(cheap)[:, :5]
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_muon_step_has_a_norm_of_one_per_row_whatever_the_gradient():
    torch.manual_seed(0)
    gradients = [torch.randn(2, 6, 8) * 1e-3, torch.randn(2, 8, 6) * 10]
    steps = muon(gradients, TTTConfig(window=4, chunk=4))
    norm = sum(step.flatten(1).square().sum(1) for step in steps).sqrt()
    torch.testing.assert_close(norm, torch.ones(2))
    # downhill
    assert all((step * gradient).sum() > 0 for step, gradient in zip(steps, gradients, strict=True))


# numbers


def test_mean_losses_weight_the_last_chunk_by_its_tokens():
    torch.manual_seed(0)
    nll = torch.rand(4 * plan.CHUNK - 1, dtype=torch.float64)
    by_chunk = [part.mean().item() for part in nll.split(plan.CHUNK)]
    assert mean_loss(by_chunk, 0, None) == pytest.approx(nll.mean().item())
    assert beyond(by_chunk) == pytest.approx(nll[plan.WINDOW :].mean().item())
    assert mean_loss(by_chunk, 128, 256) == pytest.approx(nll[128:256].mean().item())


def test_paired_differences_use_the_passages_for_the_error_and_keep_the_seeds():
    first = [[[1.0, 1.0, 2.0], [1.0, 1.0, 4.0]], [[1.0, 1.0, 3.0], [1.0, 1.0, 5.0]]]
    second = [[[9.0, 9.0, 1.0], [9.0, 9.0, 1.0]]] * 2
    mean, error, by_seed = paired(first, second)
    # by passage, over seeds: 1.5 and 3.5
    assert mean == pytest.approx(2.5) and by_seed == pytest.approx([2.0, 3.0])
    assert error == pytest.approx(math.sqrt(2) / math.sqrt(2))


# the plan


def losses_of(task):
    """Invented: best at rate 3 for `prime`, at 0.03 for the others."""
    best = 3.0 if task.reads == "prime" else 0.03
    return [abs(math.log(task.rate / best)) if task.rate else 5.0] * 16


def run_plan(found, parts):
    done = []
    for task in tasks(found, parts):
        entry = found.entry(task)
        if isinstance(task, Train):
            entry |= {"rows": 48 if task.arm == "control" else 32, "values": [1.0]}
        else:
            entry["values"] = [losses_of(task), losses_of(task)]
        found.finish(entry)
        done.append(task)
    return done


def test_rates_are_fitted_on_other_text_and_never_at_the_edge(tmp_path):
    found = Document(tmp_path / "smollm2.json", {})
    done = run_plan(found, ("untrained",))
    tested = {task.reads: task.rate for task in done if task.text == "test"}
    others = dict.fromkeys(("in_place", "warmup", "muon", "muon_warmup"), 0.03)
    assert tested == {"full": 0, "window": 0, "sink": 0, "prime": 3.0, **others}
    assert sorted(found.fit(plan.ORIGINAL, "prime")) == [0.1, 0.3, 1.0, 3.0, 10.0]
    assert sorted(found.fit(plan.ORIGINAL, "muon")) == [0.01, 0.03, 0.1, 0.3, 1.0]


def test_seeds_share_the_rate_of_the_first_and_controls_have_equal_tokens_and_equal_time(tmp_path):
    found = Document(tmp_path / "smollm2.json", {})
    done = run_plan(found, ("untrained", "short"))
    fitted = {task.weights for task in done if isinstance(task, Evaluate) and task.text == "fit"}
    assert fitted == {"original", "control-1200-42@32", "control-1200-42@48", "meta-1200-42@32"}
    tested = {(task.weights, task.reads) for task in done if isinstance(task, Evaluate) and task.text == "test"}
    assert {("control-1200-44@32", "prime"), ("control-1200-44@48", "sink"), ("meta-1200-43@32", "sink")} <= tested
    compared = {name: by_seed for name, _, _, by_seed in differences(found, plan.SHORT)}
    assert len(compared["meta - control, equal tokens, naive TTT"]) == 3
    assert "meta - control, equal time" in tables(found)


def test_a_document_resumes_and_refuses_other_settings(tmp_path):
    file = tmp_path / "smollm2.json"
    found, task = Document(file, {"digest": "a"}), Evaluate("original", "full", 0.0, "test")
    found.entry(task)["values"].append([1.0, 2.0])
    found.write()
    again = Document(file, {"digest": "a"})
    assert again.entry(task)["values"] == [[1.0, 2.0]] and not again.has(task)
    with pytest.raises(UserError, match="other settings \\(digest\\)"):
        Document(file, {"digest": "b"})


# texts


def test_fit_passages_are_not_trained_on(tmp_path):
    torch.manual_seed(0)
    documents = [f"{index} " + "".join(chr(97 + int(c)) for c in torch.randint(26, (2100,))) for index in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(f'{{"text": "{text}"}}' for text in documents))
    (tmp_path / "test.txt").write_text("z" * 5000)
    tokenizer = byte_tokenizer()
    texts = load_texts(tokenizer, tmp_path / "train.jsonl", tmp_path / "test.txt", 2, 2)
    assert [tokenizer.decode(row[:1]) for row in texts.fit] == ["1", "3"]
    trained = "".join(tokenizer.decode(row) for row in texts.rows)
    assert documents[0][:1000] in trained and documents[1][:1000] not in trained
    assert texts.test.shape == (2, 2048) and len(texts.novel) == 5000
    with pytest.raises(UserError, match="more than 5 are needed"):
        load_texts(tokenizer, tmp_path / "train.jsonl", tmp_path / "test.txt", 5, 2)


def test_the_key_of_a_trial_is_stated_twice_and_its_loss_is_that_of_its_digits():
    tokenizer = byte_tokenizer()
    keys = PassKeys(tokenizer, tokenizer("Once. There was. A novel. " * 20).input_ids)
    ids, count = keys.trial(100, 3)
    text = tokenizer.decode(ids)
    assert count == 5 and text.count(text[-5:]) == 3 and torch.equal(ids, keys.trial(100, 3)[0])
    assert len(ids) - len(keys.trial(50, 3)[0]) == 50
    model = tiny_llama(vocab_size=260).eval()
    expected = model(ids[None]).logits[0, -6:-1].log_softmax(-1).gather(1, ids[-5:, None]).sum()
    loss, exact = pass_key(model, ids, count)
    assert loss == pytest.approx(-expected.item(), rel=2e-2) and not exact


# models and trainings


@pytest.fixture
def tiny(monkeypatch):
    """The program on a model of two blocks, the last of them fast, whose chunks have 8 tokens."""
    monkeypatch.setattr(models, "load_model", lambda *_, **__: tiny_llama(vocab_size=64, initializer_range=0.2))
    monkeypatch.setattr(models, "FAST_BLOCKS", 1)
    monkeypatch.setattr(models, "_TTT", TTTConfig(window=16, sink=2, chunk=8, fast_blocks=1))
    return torch.randint(64, (7, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arm", plan.TRAINED)
def test_a_resumed_training_is_the_training_that_was_not_interrupted(tiny, tmp_path, arm):
    task = Train(arm, 1200, 42)
    whole = Training(task, tiny, "digest", tmp_path / "whole")
    halves = Training(task, tiny, "digest", tmp_path / "halves")
    for _ in range(4):
        whole._step()
    halves._step()
    halves.run(-math.inf, print)
    resumed = Training(task, tiny, "digest", tmp_path / "halves")
    for _ in range(3):
        resumed._step()
    assert resumed.losses == whole.losses
    before = models.slow_weights(models.build("original", *plan.TRAINED[arm], tmp_path), arm)
    for name, weight in whole.slow.items():
        assert torch.equal(weight, resumed.slow[name]), name
        assert not torch.equal(weight, before[name]), name
    with pytest.raises(UserError, match="another text"):
        Training(task, tiny, "other", tmp_path / "halves")


def test_only_meta_training_changes_prime_mlps(tiny, tmp_path):
    slow = {arm: Training(Train(arm, 1200, 42), tiny, "", tmp_path).slow for arm in plan.TRAINED}
    assert slow["control"].keys() == slow["meta_in_place"].keys() < slow["meta"].keys() == slow["meta_muon"].keys()
    assert all(name.startswith("ttt.") for name in slow["meta"].keys() - slow["control"].keys())
    assert not any(name.startswith("model.layers.0.") for name in slow["meta"])


def test_trained_weights_are_measured_with_the_fast_mlps_they_were_trained_with(tiny, tmp_path):
    for arm, reads in (("meta", "prime"), ("control", "prime")):
        trained = Training(Train(arm, 0, 42), tiny, "", tmp_path)
        for _ in range(16):
            trained._step()
        trained.cpu_seconds = 1.0
        trained._keep()
        model = models.build(f"{arm}-0-42@16", reads, 0.3, tmp_path)
        if arm == "meta":
            assert losses_by_chunk(model, tiny[0]) == losses_by_chunk(trained.model.eval(), tiny[0])
        # naive TTT copies the MLPs that the control has trained
        gate = trained.model.model.layers[1].mlp.gate_proj.weight
        assert torch.equal(model.model.layers[1].mlp.gate_proj.weight, gate)
        assert torch.equal(model.ttt.w0()[0], gate) == (arm == "control")
    with pytest.raises(UserError, match="no such file"):
        models.build("control-0-42@99", "sink", 0.0, tmp_path)


def test_every_pass_over_the_rows_has_its_own_order():
    orders = [[row_order(5, 42, number) for number in range(start, start + 5)] for start in (0, 5)]
    assert [sorted(order) for order in orders] == [[0, 1, 2, 3, 4]] * 2 and orders[0] != orders[1]
    assert orders[0] != [row_order(5, 43, number) for number in range(5)]


def test_an_interrupted_measurement_resumes_at_the_next_passage(tiny, tmp_path, monkeypatch):
    document = Document(tmp_path / "smollm2.json", {})
    texts = type("Texts", (), {"test": tiny, "fit": tiny})
    monkeypatch.setattr(run, "losses_by_chunk", lambda model, ids: [float(ids[0])])
    task = Evaluate("original", "sink", 0.0, "test")
    late = run.Runner(document, texts, None, run.Sizes(), tmp_path, -math.inf)
    assert not late.run(task, print) and document.entry(task)["values"] == []
    document.entry(task)["values"] = [[-1.0]] * 3
    assert run.Runner(document, texts, None, run.Sizes(), tmp_path, math.inf).run(task, print)
    assert document.entry(task)["values"] == [[-1.0]] * 3 + [[float(row[0])] for row in tiny[3:]]

"""Our probes beside lm-eval on the same rows, item by item, and our bridge to it; on task files of our own, without a hub."""

import importlib.util
import json
import math

import pytest
import torch

from eaftdrope.errors import UserError
from eaftdrope.evaluate.likelihood import rows_nll
from eaftdrope.evaluate.probes.multiple_choice import MultipleChoiceProbe, Question, choice_row
from eaftdrope.evaluate.probes.perplexity import PerplexityProbe
from eaftdrope.evaluate.scores import change_stderr
from tests.tiny_models import SMALLEST, make_word_tokenizer, tiny_llama

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip(
        "lm-eval is not installed: multiple choice and perplexity are NOT compared with it "
        "(pip install --no-deps lm-eval, pip install sacrebleu)",
        allow_module_level=True,
    )

WORDS = ("rain", "sand", "river", "stone", "cold", "warm", "the", "town", "one", "two", "three", "fell", "on", "nobody")
CHOICE_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
TEXT_TASK = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""


def _words(generator, least, most):
    count = torch.randint(least, most + 1, (1,), generator=generator).item()
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())


@pytest.fixture(scope="module")
def questions():
    """60 questions whose choices have from one to nine words, some with punctuation and letters of several bytes."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(60):
        choices = [_words(generator, 1, 9) + mark for mark in ("", ".", " é", "?")[: 2 + i % 3]]
        rows.append({"question": f"{_words(generator, 3, 12)}?", "choices": choices, "answer": i % len(choices)})
    return rows


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    return [_words(generator, 5, 40) for _ in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, questions, texts):
    """AnswerTask files: two halves of the questions, a group of them with an average, one without, a tag, and the texts."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in {"one": questions[:40], "two": questions[40:], "texts": [{"text": t} for t in texts]}.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = TEXT_TASK if name == "texts" else CHOICE_TASK + "tag: halves\n"
        (folder / f"{name}.yaml").write_text(task.format(name=name, file=file))
    average = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (folder / "both.yaml").write_text("group: both\ntask: [one, two]\n" + average)
    (folder / "loose.yaml").write_text("group: loose\ntask: [one, two]\n")
    return folder


def make_tokenizer(*, bos):
    """Learnt from the words, so that a token may reach over what lm-eval calls context and continuation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    core.train_from_iterator([" ".join(WORDS), "Question: Answer:"] * 3, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>", **names)


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def tokenizer(request):
    return make_tokenizer(bos=request.param)


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(
        vocab_size=300, max_position_embeddings=512, initializer_range=0.2, eos_token_id=1, pad_token_id=1
    )
    return model.eval()


@pytest.fixture(scope="module")
def ask(folder):
    """`ask(model, tokenizer, task)`: lm-eval's whole answer, through our bridge."""
    from eaftdrope.evaluate.lm_eval import find_tasks, run_tasks

    def run(model, tokenizer, name, **options):
        tasks = find_tasks([name], include=folder)
        options = {"batch_size": 4, "limit": None, **options}
        return run_tasks(model, tokenizer, [name], manager=tasks.manager, **options)

    return run


def test_multiple_choice_to_the_item(ask, model, tokenizer, questions):
    found = ask(model, tokenizer, "one")
    theirs = sorted(found["samples"]["one"], key=lambda row: row["doc_id"])
    ours = MultipleChoiceProbe(
        [Question(row["question"], tuple(row["choices"]), row["answer"]) for row in questions[:40]]
    )
    normalised, plain = ours.run(model, tokenizer)
    assert [mark for mark, _ in plain.units] == [row["acc"] for row in theirs]
    assert [mark for mark, _ in normalised.units] == [row["acc_norm"] for row in theirs]
    assert plain.value == found["results"]["one"]["acc,none"]
    assert normalised.value == found["results"]["one"]["acc_norm,none"]
    # not by chance: the two rules disagree, and so do the likelihoods behind them, to the last choice
    assert plain.units != normalised.units and 0.1 < plain.value < 0.9
    rows = [choice_row(tokenizer, row["question"], choice) for row in questions[:40] for choice in row["choices"]]
    costs = [cost for cost, _ in rows_nll(model, rows, batch_tokens=512)]
    likelihoods = [-answer[0][0] for row in theirs for answer in row["resps"]]
    assert costs == pytest.approx(likelihoods, rel=1e-4)


def test_perplexity_to_the_text(ask, model, texts):
    # lm-eval puts BOS before every text; where the tokenizer writes it too, it must not stand there twice
    tokenizer = make_tokenizer(bos=True)
    found = ask(model, tokenizer, "texts")
    theirs = sorted(found["samples"]["texts"], key=lambda row: row["doc_id"])
    rows = PerplexityProbe(texts, None, window=512).windows(tokenizer)
    assert [row.input_ids for row in rows] == [tokenizer(text).input_ids for text in texts]
    costs = [cost for cost, _ in rows_nll(model, rows, batch_tokens=512)]
    assert costs == pytest.approx([-row["resps"][0][0] for row in theirs], rel=1e-5)
    words = sum(len(text.split()) for text in texts)
    perplexity = found["results"]["texts"]["word_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(sum(costs) / words), rel=1e-5)


# id 1 is BOS, 5 and 6 are words, 7 is a word of the answer
WORD_TEMPLATE = "{% if bos %}{{ bos_token }} {% endif %}{% for m in messages %}{{ m['content'] }} {% endfor %}"
GENERATED_TASK = """
task: generated
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "w7"
generation_kwargs: {{until: ["w9"], max_gen_toks: 2}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def one_question(tmp_path_factory):
    """AnswerTask files of one row each, on words of `make_word_tokenizer`."""
    folder = tmp_path_factory.mktemp("one")
    file = folder / "rows.jsonl"
    file.write_text(json.dumps({"question": "w5 w6", "text": "w5 w6", "choices": ["w7", "w8"], "answer": 0}) + "\n")
    choice = CHOICE_TASK.replace("Question: ", "").replace("\\nAnswer:", "")
    for name, task in {"choice": choice, "texts": TEXT_TASK, "generated": GENERATED_TASK}.items():
        (folder / f"{name}.yaml").write_text(task.format(name=name, file=file))
    (folder / "spaced.jsonl").write_text('{"text": "<s> w5 w6"}\n{"text": "w5 w6 w7"}\n')
    (folder / "mixed.yaml").write_text(
        GENERATED_TASK.format(file=folder / "spaced.jsonl").replace("task: generated", "task: mixed")
    )
    return folder


@pytest.fixture(scope="module")
def one_question_tasks(one_question):
    from eaftdrope.evaluate.lm_eval import find_tasks

    return find_tasks(["choice", "texts", "generated", "mixed"], include=one_question).manager


@pytest.mark.parametrize("written_by", ["tokenizer", "template", "both"])
def test_one_bos(one_question_tasks, tiny_word_model, written_by):
    """What the model is given, whoever writes BOS, for each kind of task, with and without the chat template."""
    from tokenizers import processors

    from eaftdrope.evaluate.lm_eval import run_tasks

    tokenizer = make_word_tokenizer()
    if written_by != "template":
        bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = bos
    tokenizer.chat_template = WORD_TEMPLATE.replace("{% if bos %}", f"{{% if {written_by != 'tokenizer'} %}}")

    def given(*names, chat):
        """The sequences of token ids of the first call for each kind of request, without padding."""
        tiny_word_model.given.clear()
        options = {"batch_size": 4, "limit": None, "manager": one_question_tasks}
        run_tasks(tiny_word_model, tokenizer, list(names), chat=chat, **options)
        return [sorted([i for i in row if i != 0] for row in rows) for rows in tiny_word_model.given[:3]]

    begin = [1] if written_by != "template" else []
    choice, texts, generated = given("choice", "texts", "generated", "mixed", chat=False)
    # the last token of an answer is not an input
    assert choice == [[*begin, 5, 6]]
    # lm-eval's own prefix, which is there for a tokenizer without BOS too
    assert texts == [[1, 5]]
    # the first of a batch of prompts may begin with BOS where the second does not
    assert generated == sorted([[*begin, 5, 6], [1, 5, 6], [*begin, 5, 6, 7]])
    assert given("choice", "texts", "generated", chat=True) == [[[1, 5, 6]], [[1, 5]], [[1, 5, 6]]]


@pytest.fixture(scope="module")
def tiny_word_model():
    """A model of the word tokenizer's vocabulary; `given` has the ids of each of its calls."""
    model = tiny_llama(**SMALLEST, vocab_size=128, max_position_embeddings=64, eos_token_id=2, pad_token_id=0).eval()
    model.given = []
    model.register_forward_pre_hook(
        lambda module, args, options: module.given.append((*args, options.get("input_ids"))[0].tolist()),
        with_kwargs=True,
    )
    return model


def test_the_bridges_scores(ask, model, folder, questions):
    from eaftdrope.evaluate.lm_eval import harness_scores

    tokenizer = make_tokenizer(bos=False)
    found = ask(model, tokenizer, "one", limit=16)
    acc, norm = harness_scores(found, "one")
    assert [score.metric for score in (acc, norm)] == ["one: acc", "one: acc_norm"]
    assert (acc.value, acc.stderr, acc.n) == (
        found["results"]["one"]["acc,none"],
        found["results"]["one"]["acc_stderr,none"],
        16,
    )
    assert (acc.kind, acc.better, len(acc.units)) == ("share", "higher", 16)
    # the same rows: a change is compared row by row, and none of 16 rows is a change here
    assert change_stderr(acc, acc) == pytest.approx(2**0.5 / 18)
    (group,) = harness_scores(ask(model, tokenizer, "both"), "both")
    assert (group.metric, group.n, len(group.units)) == ("both: acc", 60, 60)
    for name in ("loose", "halves"):
        scores = harness_scores(ask(model, tokenizer, name), name)
        assert [(score.metric, score.n) for score in scores] == [
            ("one: acc", 40),
            ("one: acc_norm", 40),
            ("two: acc", 20),
            ("two: acc_norm", 20),
        ]
    (perplexity,) = harness_scores(ask(model, tokenizer, "texts"), "texts")
    assert (perplexity.better, perplexity.kind, perplexity.units) == ("lower", "mean", ())
    # lm-eval has no error of it
    assert perplexity.value > 1 and perplexity.stderr is None


def test_all_right_is_no_certainty():
    """lm-eval's error of rows that are all right or all wrong is 0; of one row it has none."""
    from eaftdrope.evaluate.lm_eval import harness_scores

    def found(marks, error, metric="acc"):
        samples = [{"doc_id": i, "filter": "none", metric: mark} for i, mark in enumerate(marks)]
        values = {f"{metric},none": sum(marks) / len(marks), f"{metric}_stderr,none": error}
        counts = {"effective": len(marks)}
        return {"results": {"t": values}, "n-samples": {"t": counts}, "samples": {"t": samples}, "higher_is_better": {}}

    for marks, error in (([1.0] * 8, 0.0), ([0.0] * 8, 0.0), ([1.0] * 8, float("nan"))):
        assert harness_scores(found(marks, error), "t")[0].stderr == pytest.approx((2 * 10) ** 0.5 / 12 / 12**0.5)
    assert harness_scores(found([2.5] * 8, 0.0), "t")[0].stderr is None
    assert harness_scores(found([1.0, 0.0], 0.3), "t")[0].stderr == 0.3


def test_a_task_is_identified_by_its_rows_and_files(folder):
    from eaftdrope.evaluate.lm_eval import find_tasks

    def prints():
        return find_tasks(["one", "both", "halves"], include=folder).fingerprints

    before = prints()
    assert prints() == before and before["one"] != before["both"]
    task = (folder / "one.yaml").read_text()
    (folder / "one.yaml").write_text(task.replace("Question:", "Q:"))
    changed = prints()
    (folder / "one.yaml").write_text(task)
    assert all(changed[name] != before[name] for name in before) and prints() == before
    # Python that the functions of a task import is in no setting of it
    (folder / "parts").mkdir()
    helper = folder / "parts" / "helper.py"
    helper.write_text("x = 1")
    with_helper = prints()
    helper.write_text("x = 2")
    changed = prints()
    helper.unlink()
    assert len({tuple(found.values()) for found in (before, with_helper, changed)}) == 3
    (folder / ".hidden").mkdir(exist_ok=True)
    (folder / ".hidden" / "other.py").write_text("")
    assert prints() == before


def test_what_a_task_scores_with_is_in_its_fingerprint(folder, monkeypatch):
    from eaftdrope.evaluate import score_cache as cache
    from eaftdrope.evaluate.lm_eval import find_tasks

    before, real = find_tasks(["one"], include=folder).fingerprints, cache.version
    for name in ("lm-eval", "sacrebleu"):
        monkeypatch.setattr(cache, "version", lambda package, name=name: "0.1" if package == name else real(package))
        assert find_tasks(["one"], include=folder).fingerprints != before, name
        monkeypatch.undo()


def test_tasks_that_are_not_there(folder, tmp_path):
    from eaftdrope.evaluate.lm_eval import find_tasks

    (tmp_path / "gone.yaml").write_text(CHOICE_TASK.format(name="gone", file=tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match=r"lm-eval cannot measure gone: .*gone\.jsonl.* It downloads a task's data"):
        find_tasks(["gone"], include=tmp_path)
    broken = CHOICE_TASK.format(name="broken", file=tmp_path / "gone.jsonl") + "no_such_setting: 1\n"
    (tmp_path / "broken.yaml").write_text(broken)
    with pytest.raises(
        UserError, match=r"lm-eval cannot measure broken: TypeError: .*no_such_setting.* Correct the task,"
    ):
        find_tasks(["broken"], include=tmp_path)


@pytest.mark.slow
def test_lm_evals_own_tasks_by_name(folder):
    from eaftdrope.evaluate.lm_eval import find_tasks

    with pytest.raises(UserError, match=r"lm-eval has no task 'mmlu_anatomi'\. Did you mean mmlu_anatomy"):
        find_tasks(["mmlu_anatomi", "one"], include=folder)

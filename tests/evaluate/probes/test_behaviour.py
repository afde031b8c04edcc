"""The probes of behaviour on scripted models: planted right and wrong answers, on each side of every check."""

import json
from dataclasses import replace

import pytest
import torch

from eaftdrope.data import encode_prompt
from eaftdrope.errors import UserError
from eaftdrope.evaluate import build_probes, run_probes
from eaftdrope.evaluate.probes.build import PROBES
from eaftdrope.evaluate.probes.call_refusal import CallRefusalProbe, OfferedTools
from eaftdrope.evaluate.probes.format_keeping import FORMATS, REQUESTS, FormatKeepingProbe
from eaftdrope.evaluate.probes.language_drift import LanguageDriftProbe, foreign_share, script_of
from eaftdrope.evaluate.probes.turn_consistency import TurnConsistencyProbe, TurnPair, _second_turn, turn_pairs
from eaftdrope.evaluate.probes.verbosity import VerbosityProbe
from eaftdrope.evaluate.scores import ENOUGH, score_units
from eaftdrope.evaluate.verdicts import judge_change, judge_changes
from tests.evaluate.probe_options import probe_options

BEHAVIOUR = ("format_keeping", "call_refusal", "verbosity", "language_drift", "turn_consistency", "long_recall")


def build(name, **options):
    group = "target" if name == "serving" else "general"
    (probe,) = build_probes([(name, group, probe_options(name, **options))])
    return probe


@pytest.fixture
def replying(tiny_llama, byte_tokenizer, monkeypatch):
    """replying({prompt ids: answer}): the tiny model with a forward that continues each known prompt with its answer."""

    def make(answers):
        scripts = {tuple(ids): byte_tokenizer(f"{text}<|im_end|>").input_ids for ids, text in answers.items()}
        forward, rows = tiny_llama.forward, []

        def scripted(input_ids=None, attention_mask=None, **kwargs):
            if input_ids.shape[1] > 1:
                masks = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                prompts = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, masks, strict=True)]
                rows[:] = [iter(scripts.get(prompt, [2])) for prompt in prompts]
            out = forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            out.logits = torch.zeros_like(out.logits)
            for i, script in enumerate(rows):
                out.logits[i, -1, next(script, 2)] = 1.0
            return out

        monkeypatch.setattr(tiny_llama, "forward", scripted)
        return tiny_llama

    return make


# --- enough items -----------------------------------------------------------------------------------------------------


def test_each_has_a_hundred_items_by_default(monkeypatch):
    sizes = {
        "format_keeping": len(build("format_keeping").tasks),
        "verbosity": len(build("verbosity").prompts),
        "language_drift": len(build("language_drift").prompts),
        "turn_consistency": len(build("turn_consistency").pairs),
        "long_recall": build("long_recall", length=128).trials,
    }
    assert min(sizes.values()) >= ENOUGH == 100, sizes
    assert set(BEHAVIOUR) < PROBES.keys()


def test_fewer_items_give_no_verdict():
    def score(value, n, least=ENOUGH):
        return score_units("p", "general", "m", [(value, 1.0)] * n, kind="share", better="higher", least=least)

    assert judge_change(score(1.0, 100), score(0.0, 100)).word == "worse"
    assert judge_change(score(1.0, 99), score(0.0, 99)).text == "not enough evidence (needs 100 items)"
    assert judge_change(score(1.0, 1), score(0.0, 1)).text == "not enough evidence (needs 100 items)"
    assert judge_change(score(1.0, 99, least=0), score(0.0, 99, least=0)).word == "worse"
    # the other metric is judged as if it were compared by itself
    few, enough = judge_changes([(score(1.0, 99), score(0.0, 99)), (score(0.5, 100), score(0.4, 100))])
    assert (few.margin, enough.margin) == (None, judge_change(score(0.5, 100), score(0.4, 100)).margin)


# --- format_keeping ---------------------------------------------------------------------------------------------------

KEPT = {
    "JSON list": ('["red", "dark blue", "green"]', 'Sure: ["red", "blue", "green"]', '["red", "blue"]', "red, blue, green"),
    "JSON object": (
        '{"first": "a", "second": "b", "third": "c"}',
        '{"second": "b", "first": "a", "third": "c"}',
        '{"first": "a", "second": "b", "third": ""}',
        '```json\n{"first": "a", "second": "b", "third": "c"}\n```',
    ),
    "numbered": ("1. red\n2. dark blue\n3. green", "1. red\n2. blue", "1) red\n2) blue\n3) green", "Here:\n1. a\n2. b\n3. c"),
    "dashes": ("- red\n- blue\n- green", "* red\n* blue\n* green", "- red\n- blue\n- green\n- grey", "- red, blue, green"),
    "lines": ("red\nblue\ngreen", "1. red\n2. blue\n3. green", "red\n\nblue\ngreen", "red, blue, green"),
    "commas": ("red, dark blue, green", "red, blue", "red; blue; green", "red,\nblue,\ngreen"),
    "semicolons": ("red; blue; green", "red, blue, green", "red; blue; green;", "a: red; blue; green"),
    "bars": ("[red|blue|green]", "red|blue|green", "[red, blue, green]", "[red|blue|green|grey]"),
    "tags": ("<answer>red, blue, green</answer>", "<answer>red, blue</answer>", "red, blue, green", "<answer>a, b, c"),
    "upper case": ("RED, DARK BLUE, GREEN", "Red, Blue, Green", "RED, BLUE", "RED BLUE GREEN"),
    "pairs": ("a: red\nb: blue\nc: green", "a: red, b: blue, c: green", "a: red\nb: blue", "1: red\n2: blue\n3: green"),
    "fence": ("```\nred\nblue\ngreen\n```", "red\nblue\ngreen", "```\nred\nblue\n```", "Here:\n```\nred\nblue\ngreen\n```"),
}  # fmt: skip


def test_every_format_has_answers_on_both_sides():
    assert KEPT.keys() == FORMATS.keys() and len(FORMATS) * len(REQUESTS) == 120
    for name, (kept, *broken) in KEPT.items():
        check = FORMATS[name][1]
        assert check(kept), name
        assert not [text for text in (*broken, "", "I cannot do that.") if check(text)], name


def test_formats_are_counted(answering, byte_tokenizer):
    tasks = [(REQUESTS[0], "commas"), (REQUESTS[0], "JSON list"), (REQUESTS[1], "commas")]
    asked = [f"{request} {FORMATS[name][0]}" for request, name in tasks]
    model = answering({asked[0]: "red, blue, green\n", asked[1]: "red, blue", asked[2]: "<think>x</think>\na, b, c"})
    (score,) = run_probes(model, byte_tokenizer, [FormatKeepingProbe(tasks, 40)])
    assert [hit for hit, _ in score.units] == [1.0, 0.0, 1.0]
    assert (score.metric, score.kind, score.better, score.least) == ("formats kept", "share", "higher", ENOUGH)


# --- language_drift ---------------------------------------------------------------------------------------------------


def test_scripts():
    found = [script_of(character) for character in "aéßжαع字あアー한ａ1 .ー々"]
    assert found[:9] == ["LATIN", "LATIN", "LATIN", "CYRILLIC", "GREEK", "ARABIC", "CJK", "HIRAGANA", "KATAKANA"]
    assert found[10:14] == ["HANGUL", "LATIN", None, None]
    assert foreign_share("What?", "Да, a") == pytest.approx(2 / 3)
    assert foreign_share("Что?", "Да") == foreign_share("What?", "") == foreign_share("What?", "12 + 3 😀") == 0
    assert foreign_share("雪とは", "雪は白いコト") == 0 and foreign_share("雪是什么？", "雪は") == 0.5
    assert foreign_share("雪是什么？", "snow") == 1


def test_every_language_has_a_script_of_its_own():
    probe = build("language_drift")
    assert len(set(probe.prompts)) == 104
    scripts = {frozenset(script_of(c) for c in prompt) - {None} for prompt in probe.prompts}
    assert {"LATIN"} in scripts and {"CYRILLIC"} in scripts and {"HANGUL"} in scripts and {"CJK"} in scripts
    # a question answered in its own words has no drift
    assert all(foreign_share(prompt, prompt) == 0 for prompt in probe.prompts)


def test_drift_is_averaged_over_the_questions(answering, byte_tokenizer):
    model = answering({"Was?": "ja", "Что?": "yes", "什么？": "雪ab"})
    (score,) = run_probes(model, byte_tokenizer, [LanguageDriftProbe(["Was?", "Что?", "什么？"], 20)])
    assert [share for share, _ in score.units] == pytest.approx([0, 1, 2 / 3])
    assert (score.value, score.better) == (pytest.approx(5 / 9), "lower")


# --- verbosity --------------------------------------------------------------------------------------------------------


def test_the_change_is_the_log_of_the_ratio_of_lengths(answering, byte_tokenizer):
    probe = VerbosityProbe(["A", "B", "C"], 60)
    short = run_probes(answering({"A": "abc", "B": "abcdefg", "C": ""}), byte_tokenizer, [probe])
    long = run_probes(answering({"A": "abcdefg", "B": "x" * 15, "C": "y"}), byte_tokenizer, [probe])
    # each is one more than its characters, doubled
    assert long[0].value - short[0].value == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert [score.better for score in long] == ["lower", "lower"]
    assert [empty for empty, _ in short[1].units] == [0, 0, 1] and long[1].value == 0


# --- turn_consistency -------------------------------------------------------------------------------------------------


def test_pairs_and_their_checks():
    pairs = turn_pairs()
    assert len({(pair.first, pair.second) for pair in pairs}) == 120
    for pair in pairs:
        assert pair.word in pair.first and pair.word not in pair.second
        assert pair.is_kept(f"It is {pair.word}.") and not pair.is_kept("I do not know.") and not pair.is_kept("")
        assert not pair.is_kept(f"It is {pair.word}ish.")
    assert not replace(pairs[4], word="banana").is_kept("banana it is")
    assert pairs[4].kind == "ending" and pairs[4].is_kept("Twelve. Banana!")


def test_the_second_prompt_has_the_first_answer(replying, byte_tokenizer):
    pairs = [TurnPair("I am Ada.", "Who am I?", "name", "Ada"), TurnPair("I am Bo.", "Who am I?", "name", "Bo")]
    answers = {}
    for pair, first, second in zip(pairs, ("Hi Ada.", ""), ("You are Ada.", "You are Ada."), strict=True):
        asked = _second_turn(pair, first or "...")
        answers[tuple(encode_prompt(replace(asked, messages=asked.messages[:2]), byte_tokenizer))] = first
        answers[tuple(encode_prompt(asked, byte_tokenizer))] = second
    calls = []
    probe = TurnConsistencyProbe(pairs, 20)
    (score,) = run_probes(
        replying(answers), byte_tokenizer, [probe], progress=lambda name, done, total: calls.append((done, total))
    )
    assert [hit for hit, _ in score.units] == [1.0, 0.0]
    assert calls[-1][0] == calls[-1][1] and calls == sorted(calls)


def test_turns_need_a_chat_template(tiny_llama, byte_tokenizer):
    import copy

    plain = copy.deepcopy(byte_tokenizer)
    plain.chat_template = None
    with pytest.raises(UserError, match="turn_consistency needs a chat template"):
        run_probes(tiny_llama, plain, [build("turn_consistency", limit=2)])


def test_a_plan_leaves_out_what_needs_a_chat_template(byte_tokenizer):
    import copy

    from eaftdrope.evaluate.suites.plan import EvaluationStep, _without_conversations

    probes = [build("turn_consistency", limit=2), CallRefusalProbe([], 8), build("format_keeping", limit=2)]
    steps = [*(EvaluationStep("behaviour", probe.name, probe) for probe in probes), EvaluationStep("lm-eval", "mmlu")]
    notes, plain = [], copy.deepcopy(byte_tokenizer)
    assert _without_conversations("m", steps, byte_tokenizer, notes) == steps and not notes
    plain.chat_template = None
    assert _without_conversations("m", steps, plain, notes) == steps[2:]
    assert notes == [
        f"m: {name} is left out: it needs a chat template." for name in ("turn_consistency", "call_refusal")
    ]


# --- call_refusal -----------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'


def test_calls_with_and_without_a_fitting_tool(replying, byte_tokenizer):
    from eaftdrope.data import render_prompt

    replies = [("A", False, "I cannot."), ("B", False, CALL), ("C", False, "<tool_call>\n{bro"), ("D", True, CALL)]
    replies += [("E", True, "No."), ("F", True, "<tool_call>\n{bro")]
    offers, answers = [], {}
    for question, fits, reply in replies:
        offer = OfferedTools([{"role": "user", "content": question}], [TOOL], fits)
        offers.append(offer)
        text = render_prompt(offer.messages, offer.tools, byte_tokenizer)
        answers[tuple(byte_tokenizer(text, add_special_tokens=False).input_ids)] = reply
    refused, called = run_probes(replying(answers), byte_tokenizer, [CallRefusalProbe(offers, 80)])
    assert (refused.metric, [hit for hit, _ in refused.units]) == ("no call where none fits", [1, 0, 0])
    assert (called.metric, [hit for hit, _ in called.units]) == ("a call where one fits", [1, 0, 0])


def test_rows_of_bfcl_and_of_a_file(tmp_path):
    pytest.importorskip("bfcl_eval", reason="needs bfcl-eval")
    probe = build("call_refusal")
    assert [sum(offer.fits is fits for offer in probe.offers) for fits in (False, True)] == [100, 100]
    assert all(offer.tools and offer.messages[-1]["role"] == "user" for offer in probe.offers)
    assert len({json.dumps(offer.messages) for offer in probe.offers}) > 190
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL]}) + "\n")
    (offer,) = build("call_refusal", file=str(rows)).offers
    assert (offer.messages[0]["content"], offer.fits, offer.tools[0]["function"]["name"]) == ("Hi", False, "add")
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    with pytest.raises(UserError, match="a row needs `messages` and `tools`"):
        build("call_refusal", file=str(rows))


# --- long_recall ------------------------------------------------------------------------------------------------------


def test_needles_at_multiples_of_the_trained_length(tiny_llama, byte_tokenizer, monkeypatch):
    """A model that finds the needle of the first length only."""
    from eaftdrope.evaluate.long_context import retrieval
    from eaftdrope.evaluate.probes import long_recall

    def answers(model, tokenizer, prompts, **options):
        texts = [tokenizer.decode(ids) for ids in prompts]
        found = [text.partition(" is: ")[2][:7] if len(ids) < 520 else "1234567" for text, ids in zip(texts, prompts)]
        return [tokenizer(f" {number}.").input_ids for number in found]

    monkeypatch.setattr(retrieval, "generate_ids", answers)
    probe = build("long_recall", length=512, multiples=[1, 2], trials=20)
    one, two = run_probes(tiny_llama, byte_tokenizer, [probe])
    assert (one.metric, one.value, one.n) == ("numbers recalled at 1 x 512 tokens", 1.0, 20)
    assert (two.metric, two.value, two.better) == ("numbers recalled at 2 x 512 tokens", 0.0, "higher")
    assert long_recall.LongRecallProbe is PROBES["long_recall"]
    with pytest.raises(UserError, match="needs the trained length"):
        build("long_recall")
    tiny_llama.config.n_positions = 1000
    with pytest.raises(UserError, match="reads 1,024 tokens, and the model has learned positions for 1,000 only"):
        run_probes(tiny_llama, byte_tokenizer, [probe])


def test_long_recall_reads_with_the_model_itself(tiny_llama, byte_tokenizer):
    scores = run_probes(tiny_llama, byte_tokenizer, [build("long_recall", length=400, multiples=[1, 2], trials=3)])
    assert [score.n for score in scores] == [3, 3] and all(score.value == 0 for score in scores)


# --- long_loss --------------------------------------------------------------------------------------------------------


def test_long_loss_scores_the_same_tokens_after_more_context(tiny_llama, byte_tokenizer, tmp_path):
    import torch

    (tmp_path / "text.txt").write_text("".join(chr(97 + (7 * index) % 23) for index in range(400)))
    probe = build("long_loss", files=[str(tmp_path / "text.txt")], length=32, multiples=[1, 4], passages=5)
    short, long = probe.rows(byte_tokenizer, 1), probe.rows(byte_tokenizer, 4)
    assert [len(row.input_ids) for row in (*short, *long)] == [32] * 5 + [128] * 5
    for one, four in zip(short, long, strict=True):
        assert four.input_ids[-32:] == one.input_ids
        assert one.labels[:16] == [-100] * 16 and one.labels[16:] == four.labels[112:] == one.input_ids[16:]
        assert four.labels[:112] == [-100] * 112
    scores = run_probes(tiny_llama, byte_tokenizer, [probe])
    assert [score.metric for score in scores] == ["nats per token at 1 x 32 tokens", "nats per token at 4 x 32 tokens"]
    ids = torch.tensor([row.input_ids for row in long])
    with torch.no_grad():
        logits = tiny_llama(ids).logits[:, 111:-1].log_softmax(-1)
    expected = -logits.gather(-1, ids[:, 112:, None]).mean().item()
    assert scores[1].value == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="no text is as long"):
        run_probes(tiny_llama, byte_tokenizer, [build("long_loss", files=[str(tmp_path / "text.txt")], length=512)])
    with pytest.raises(UserError, match="long_loss needs the trained length"):
        build("long_loss")

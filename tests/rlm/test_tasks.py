"""The generators: the same task again, oracles that score 1, floors, scores of odd answers, disjoint sets of names."""

import re
from collections import Counter
from statistics import mean

import pytest

from eaftdrope.errors import UserError
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.models import ScriptedModel
from eaftdrope.rlm.tasks import KINDS, make_task
from eaftdrope.rlm.tasks.entries import FIRST_USER, TYPES, classifier, classify
from eaftdrope.rlm.tasks.pairs import f1
from eaftdrope.rlm.tasks.task import NAMES, NOUNS, exact, near, number

LIMITS = Limits(sub_calls=2_000)
# the mean score of a policy that does not read the context, of 60 tasks of 8,000 characters
FLOORS = {
    "needle": (0.05, 0.35),
    "count": (0.03, 0.25),
    "aggregate": (0.2, 0.5),
    # nearly .85 with ten entries per user
    "pairs": (0.25, 0.36),
    "multi-hop": (0.25, 0.55),
    "code": (0.0, 0.1),
}


def text_of(task):
    return task.context if isinstance(task.context, str) else "\n".join(task.context)


@pytest.mark.parametrize("kind", KINDS)
def test_an_oracle_solves_every_form(kind):
    """Six seeds: each form of a query, in both sets of names and of phrasings."""
    for seed in range(6):
        sets = {"names": ("train", "test")[seed % 2], "phrasings": ("test", "train")[seed // 3]}
        task = make_task(kind, seed, 3_000, **sets)
        assert task.score(task.gold) == 1.0
        sub_model = classifier()
        result = RLM(ScriptedModel([task.oracle]), sub_model, limits=LIMITS).complete(task.context, task.query)
        assert (task.score(result.answer), result.turns, result.finished) == (1.0, 1, True), (seed, result)
        assert bool(sub_model.seen) == (kind in ("aggregate", "pairs"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_determines_the_task(kind):
    def written(seed, **sets):
        task = make_task(kind, seed, 2_000, **sets)
        return task.context, task.query, task.gold, task.guess, task.oracle

    assert written(4) == written(4)
    contexts = [written(4), written(5), written(4, names="train")]
    assert len({str(context) for context, *_ in contexts}) == 3
    # another phrasing is another query over the same document
    (context, query, gold, *_), (same, other, same_gold, *_) = written(4), written(4, phrasings="test")
    assert (context, gold) == (same, same_gold) and query != other


@pytest.mark.parametrize("kind", KINDS)
def test_the_length_is_reached(kind):
    # needles and pairs come on top of the filler, a fact on top of its document
    assert 0.93 < len(text_of(make_task(kind, 0, 20_000))) / 20_000 < 1.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_floor(kind):
    tasks = [make_task(kind, seed, 8_000) for seed in range(60)]
    low, high = FLOORS[kind]
    assert low <= mean(task.score(task.guess) for task in tasks) <= high


def test_a_guess_of_a_count_pays_less_in_longer_contexts():
    def floor(chars):
        return mean(task.score(task.guess) for task in (make_task("count", seed, chars) for seed in range(30)))

    assert floor(500) > 0.5 > floor(4_000) > floor(64_000)


def test_names_are_disjoint():
    train, test = set(NAMES["train"]), set(NAMES["test"])
    assert len(train) == len(test) == 16 and not train & test and not set(NOUNS) & (train | test)
    # a count of one label must not find another
    for names in NAMES.values():
        assert not [(a, b) for a in names for b in names if a != b and b.startswith(a)]
    users = {name: set() for name in NAMES}
    for name in NAMES:
        for kind in KINDS:
            for seed in range(3):
                task = make_task(kind, seed, 30_000, names=name)
                words = set(re.findall(r"[a-z]+", f"{text_of(task)} {task.query}".lower()))
                other = test if name == "train" else train
                # multi-hop joins a noun and a name
                assert not {word for word in words if word in other or any(word.endswith(o) for o in other)}, kind
                users[name] |= set(map(int, re.findall(r"user (\d+)", text_of(task))))
    assert users["train"] and not users["train"] & users["test"]
    assert max(users["train"]) < FIRST_USER["test"]


def test_the_commonest_type_is_not_a_tie():
    for seed in range(2, 300, 3):
        task = make_task("aggregate", seed, 400)
        types = Counter(classify(line.split(" || ")[2]) for line in task.context.split("\n"))
        (first, count), *others = types.most_common(2)
        assert task.gold == first and all(count > other for _, other in others)


def test_callers_and_values_of_code():
    """Counted without the generator's own graph."""
    for seed in range(120):
        task = make_task("code", seed, 800)
        source = "\n".join(task.context)
        bodies = dict(re.findall(r"def (\w+)\(x\):\n(.*)", source))
        (name,) = [name for name in bodies if re.search(rf"\b{name}\b", task.query)]
        if seed % 2:
            scope = {}
            exec(source, scope)
            assert task.gold == str(scope[name](3))
            continue

        def calls(caller, name=name, bodies=bodies):
            called = re.findall(r"(\w+)\(x \+", bodies[caller])
            return name in called or any(calls(other) for other in called)

        assert task.gold == str(sum(map(calls, bodies)))


def test_the_sets_of_names_do_not_share_numbers():
    """Else a number that was learned in training would be right in the test."""
    golds = {names: {make_task("needle", seed, 200, names=names).gold for seed in range(50)} for names in NAMES}
    assert len(golds["train"] & golds["test"]) < 3


def test_every_question_has_one_type():
    from random import Random

    from eaftdrope.rlm.tasks.entries import entry_maker

    draw = entry_maker(Random(0), range(3))
    drawn = [draw() for _ in range(2_000)]
    assert all(classify(entry.question) == entry.type for entry in drawn)
    assert {entry.type for entry in drawn} == set(TYPES) and {entry.user for entry in drawn} == {0, 1, 2}


def test_a_classifier_is_wrong_as_often_as_stated():
    def wrong(rate):
        prompts = [f"Type?\nWhy does a {noun} {number} need a mirror?" for noun in NOUNS for number in range(40)]
        replies = classifier(rate).generate([[{"role": "user", "content": prompt}] for prompt in prompts], 8)
        assert {reply.text for reply in replies} <= set(TYPES)
        return mean(reply.text != "description" for reply in replies)

    assert wrong(0.0) == 0 and 0.06 < wrong(0.1) < 0.14
    assert wrong(0.1) == wrong(0.1)


def test_errors_of_the_sub_model_cost_what_they_should():
    """An oracle root does not help if a tenth of 100 entries are classified wrongly."""
    task = make_task("pairs", 0, 8_000)
    result = RLM(ScriptedModel([task.oracle]), classifier(0.1), limits=LIMITS).complete(task.context, task.query)
    assert 0.5 < task.score(result.answer) < 0.99


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("12", 1.0),
        (" 12\n", 1.0),
        ("13", 0.75),
        ("10", 0.75**2),
        ("1,2", 0.0),
        ("12.", 1.0),
        ("There are 12 entries.", 1.0),
        ("12.0", 0.0),
        ("-12", 0.75**24),
        ("1" * 5_000, 0.0),
        ("12 or 13", 0.0),
        ("", 0.0),
    ],
)
def test_scores_of_counts(answer, score):
    assert near(12)(answer) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("12345", 1.0),
        ("The number is 12,345.", 1.0),
        ("12345 or 54321", 0.0),
        ("12346", 0.0),
        ("", 0.0),
        ("x12345y", 1.0),
    ],
)
def test_numbers(answer, score):
    assert number(12_345)(answer) == score


@pytest.mark.parametrize(
    ("answer", "score"), [("Osprey", 1.0), ("'osprey'.", 1.0), ("the osprey", 0.0), ("", 0.0), ("osprey osprey", 0.0)]
)
def test_exact_scores(answer, score):
    assert exact("osprey")(answer) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("1,2\n3,4", 1.0),
        ("(2, 1); [4,3]", 1.0),
        ("1,2\n2,1\n3,4", 1.0),
        ("1,2", 2 / 3),
        # one of three is not a pair
        ("1,2\n3,4\nnone", 4 / 5),
        ("1,2,3,4", 0.0),
        ("", 0.0),
    ],
)
def test_scores_of_pairs(answer, score):
    assert f1({(1, 2), (3, 4)})(answer) == pytest.approx(score)


def test_no_pairs_is_an_answer():
    assert f1(set())("") == 1.0 and f1(set())("1,2") == 0.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "nedle"}, "kind='nedle': not one of needle, count"),
        ({"names": "all"}, "names='all': not one of train, test"),
        ({"phrasings": ""}, "phrasings='': not one of train, test"),
        ({"chars": 0}, "chars=0: must be positive"),
    ],
)
def test_what_no_task_has_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        make_task(**{"kind": "needle", "seed": 0, "chars": 100, **wrong})

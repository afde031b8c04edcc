"""The rules of the miniature's verdict, on synthetic numbers."""

import pytest

from benchmarks.miniature.verdict import PieceTable, best_stretch, compare, judge, saturated


def make_piece(arm, seed, theta, by_scale, quarters=(1.0, 1.0, 1.0, 1.0), filler=1.5, dense=None):
    cells = {
        str(scale): {"accuracy": value, "by_quarter": list(quarters), "filler_loss": filler, "answer_loss": 0.1}
        for scale, value in zip((1, 2, 4, 8, "8 dense"), (*by_scale, dense or by_scale[-1]), strict=True)
    }
    return {"arm": arm, "seed": seed, "theta": theta, "optimiser": "muon", "plain": cells, "fitted": cells}


def make_pieces(theta, far, seeds=(0, 1, 2), **rope):
    """Return pieces; `far` is arm -> accuracy at 8x."""
    pieces = [make_piece("rope", seed, theta, (1, 0.5, 0.3, 0.1), **rope) for seed in seeds]
    for arm, value in far.items():
        pieces += [make_piece(arm, seed, theta, (1, 0.9, 0.9, value + 0.001 * seed)) for seed in seeds]
    return pieces


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome", "mean"),
    [
        ([0.9, 0.92], [0.8, 0.8], "ahead", 0.11),
        ([0.8, 0.8], [0.9, 0.92], "behind", -0.11),
        # one seed is the other way round
        ([0.9, 0.79], [0.8, 0.8], "tie", 0.045),
        ([0.81, 0.81], [0.8, 0.8], "tie", 0.01),
        ([0.9], [0.8], "not judged", 0.1),
    ],
)
def test_compare(ours, theirs, outcome, mean):
    found = compare(dict(enumerate(ours)), dict(enumerate(theirs)))
    assert found[0] == outcome
    assert found[1] == pytest.approx(mean)


def test_saturation_is_the_mean_over_seeds_of_the_lowest_quarter():
    quarters = [(0.985, 1.0, 1.0, 1.0), (0.995, 1.0, 1.0, 1.0)]
    pieces = [make_piece("rope", seed, 40.0, (1, 1, 1, 1), quarters[seed]) for seed in (0, 1)]
    assert saturated(PieceTable(pieces, "muon"), 40.0, "rope")
    pieces[0]["fitted"]["1"]["by_quarter"][0] = 0.984
    assert not saturated(PieceTable(pieces, "muon"), 40.0, "rope")
    assert not saturated(PieceTable(pieces, "muon"), 40.0, "nope")


def test_sentences_follow_the_numbers():
    wins = make_pieces(40.0, {"drope-10": 0.95, "yarn": 0.8, "pi": 0.7, "nope": 0.95})
    for piece in wins:
        if piece["arm"] == "nope":
            piece["theta"] = None
    loses = make_pieces(10000.0, {"drope-10": 0.85, "yarn": 0.99}, quarters=(0.9, 1, 1, 1), filler=1.4)
    said = judge(wins + loses, "muon")["sentences"]
    assert said == [
        "theta 40: RoPE is saturated at 1x (lowest quarter 1.000).",
        "theta 40, 8x: drope-10 is ahead of the best stretch (yarn) (accuracy +0.150).",
        "theta 40, 8x: drope-10 ties with nope (accuracy +0.000).",
        "theta 40, 8x: drope-10 is ahead of rope (accuracy +0.851).",
        "theta 40, 8x, dense: drope-10 is ahead of the best stretch (yarn) (accuracy +0.150).",
        "theta 40, 8x, dense: drope-10 ties with nope (accuracy +0.000).",
        "theta 40, 8x, dense: drope-10 is ahead of rope (accuracy +0.851).",
        "theta 40: drope-10 has recovered at 1x (filler loss +0.000 nats against RoPE's).",
        "theta 10000: RoPE is NOT saturated at 1x (lowest quarter 0.900 < 0.99), so that every comparison with it and its "
        "stretches is confounded.",
        "theta 10000, 8x: drope-10 is behind the best stretch (yarn) (accuracy -0.140).",
        "theta 10000, 8x: drope-10 is behind nope (accuracy -0.100).",
        "theta 10000, 8x: drope-10 is ahead of rope (accuracy +0.751).",
        "theta 10000, 8x, dense: drope-10 is behind the best stretch (yarn) (accuracy -0.140).",
        "theta 10000, 8x, dense: drope-10 is behind nope (accuracy -0.100).",
        "theta 10000, 8x, dense: drope-10 is ahead of rope (accuracy +0.751).",
        "theta 10000: drope-10 has not recovered at 1x (filler loss +0.100 nats against RoPE's).",
        "Against the best stretch at 8x the outcome depends on theta: ahead at 40, behind at 10000.",
        "Against the best stretch at 8x, dense the outcome depends on theta: ahead at 40, behind at 10000.",
    ]


def test_the_same_outcome_everywhere_does_not_depend_on_theta():
    pieces = [piece for theta in (40.0, 100.0) for piece in make_pieces(theta, {"drope-10": 0.5, "ntk": 0.9})]
    assert judge(pieces, "muon")["sentences"][-2] == (
        "Against the best stretch at 8x the outcome does not depend on theta: behind at 40, behind at 100."
    )


def test_a_part_of_the_pieces_is_judged_as_far_as_it_goes():
    table = PieceTable(make_pieces(40.0, {}), "muon")
    assert best_stretch(table, 40.0, 8) is None
    judged = judge(make_pieces(40.0, {"yarn": 0.9}), "muon")
    assert judged["recovered"]["40 drope-10"] == {"recovered": None, "filler_loss_above_rope": None}
    assert judged["outcomes"] == []
    one_seed = judge(make_pieces(40.0, {"drope-10": 0.9, "yarn": 0.5}, seeds=[0]), "muon")
    assert {found["outcome"] for found in one_seed["outcomes"]} == {"not judged"}
    assert judge([], "muon")["sentences"] == []

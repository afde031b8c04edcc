"""The tail benchmark: its arithmetic on a tiny random model, its verdict, and its errors."""

import json
import math

import pytest
import torch

from benchmarks.tail import errors
from benchmarks.tail.__main__ import main
from benchmarks.tail.curves import distances, held_out_loss, load_rows
from benchmarks.tail.inputs import source_name
from benchmarks.tail.kept import watch_kept_columns
from benchmarks.tail.verdict import judge
from eaftdrope.loss import fused_linear_eaft
from eaftdrope.loss import tail as product
from eaftdrope.loss.definition import eaft_loss
from tests.tiny_models import save_model
from tests.tiny_run import save_rows

THRESHOLD = 2.0**-8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tail")
    save_model(path / "model")
    save_rows(path / "rows.jsonl", 40)
    return path


@pytest.fixture(scope="module")
def inputs():
    """Return (hidden, head, labels): half of the rows are confident of a token, so that there is a tail to drop; the rows
    of the head share a component, as in a trained head."""
    generator = torch.Generator().manual_seed(0)
    head_VD = (1 + torch.randn(300, 16, generator=generator)).bfloat16()
    labels_N = torch.randint(0, 300, (96,), generator=generator)
    hidden_ND = torch.randn(96, 16, generator=generator)
    hidden_ND[::2] += 0.5 * head_VD[labels_N[::2]].float()
    return hidden_ND.bfloat16(), head_VD, labels_N


@pytest.fixture(scope="module")
def truth(inputs):
    return errors.truth_by_gate(*inputs)


# errors


@pytest.mark.parametrize("gate", errors.GATES)
def test_the_truth_is_the_gradient_of_the_definition(inputs, truth, gate):
    hidden, head = (value.double().requires_grad_() for value in inputs[:2])
    logits = hidden @ head.T
    logits.retain_grad()
    eaft_loss(logits, inputs[2], gate=gate, num_items=1).backward()
    assert errors.relative(truth[gate].hidden_ND, hidden.grad) < 1e-12
    assert errors.relative(truth[gate].weight_VD, head.grad) < 1e-12
    assert errors.relative(truth[gate].logits_NV, logits.grad) < 1e-7


def test_flops_are_those_of_three_products():
    assert errors.flops(1) == 1
    assert errors.flops(0) == pytest.approx(1 / 3)
    assert errors.flops(0.11) == pytest.approx(0.4067, abs=1e-4)


def test_a_row_order_stays_within_its_tile():
    keep_NV = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
    assert errors.order_rows(keep_NV, "as they come", 3).tolist() == [0, 1, 2, 3, 4]
    assert errors.order_rows(keep_NV, "sorted", 3).tolist() == [1, 2, 0, 4, 3]


@pytest.mark.parametrize("height", [32, 96, 500])
def test_sparse_gradients_by_hand(inputs, truth, height):
    """Compute row by row and column by column, in float64."""
    grad_NV, hidden_ND, head_VD = truth["eaft"].logits_NV.double(), inputs[0].double(), inputs[1].double()
    keep_NV = grad_NV.abs() >= THRESHOLD
    order_N = errors.order_rows(keep_NV, "sorted", 64)
    found = errors.sparse_gradients(grad_NV, hidden_ND, head_VD, order_N, keep_NV, height)

    kept_NV = torch.zeros_like(grad_NV)
    by_hidden, by_weight = torch.zeros_like(hidden_ND), torch.zeros_like(head_VD)
    for group in order_N.split(height):
        union_V = keep_NV[group].any(0)
        dropped_RV = grad_NV[group] * ~union_V
        kept_NV[group] = grad_NV[group] * union_V
        by_hidden[group] = torch.outer(dropped_RV.sum(1), dropped_RV.sum(0) @ head_VD / dropped_RV.sum())
        by_weight += torch.outer(dropped_RV.sum(0), dropped_RV.sum(1) @ hidden_ND[group] / dropped_RV.sum())
    assert 0.05 < found.share < 0.98, "nothing is dropped, or nothing kept: the case tests nothing"
    assert found.share >= (kept_NV != 0).double().mean()
    for actual, expected in (
        (found.hidden_no_tail_ND, kept_NV @ head_VD),
        (found.hidden_ND, kept_NV @ head_VD + by_hidden),
        (found.weight_VD, kept_NV.T @ hidden_ND),
        (found.weight_rank1_VD, kept_NV.T @ hidden_ND + by_weight),
    ):
        # the rows of a float32 gradient sum to 0 only to 1e-7
        assert errors.relative(actual, expected) < 1e-5


@pytest.mark.parametrize("gate", errors.GATES)
def test_the_operator_is_the_grid_at_its_own_height(inputs, truth, gate):
    """The computation of the benchmark matches the operator: same columns, same errors."""
    hidden_ND, head_VD, labels_N = inputs
    rows = errors.operator(truth[gate], hidden_ND, head_VD, labels_N, gate, thresholds=(THRESHOLD,))
    exact, sparse = (row for row in rows if row["dtype"] == "float32")
    heights = (product.GROUP_ROWS,)
    written, _ = errors.grid(truth[gate], hidden_ND.float(), head_VD.float(), (THRESHOLD,), heights)
    assert (exact["share"], exact["flops"]) == (1.0, 1.0)
    assert max(exact["hidden_error"], exact["weight_error"]) < 1e-5
    assert sparse["share"] == pytest.approx(written["share"], abs=2 / 300)
    assert sparse["flops"] == pytest.approx(errors.flops(sparse["share"]))
    assert sparse["hidden_error"] == pytest.approx(written["hidden_error"], rel=0.02)
    assert sparse["weight_error"] == pytest.approx(written["weight_error"], rel=0.02)
    assert written["hidden_error"] < written["hidden_error_no_tail"] / 2


def test_kept_columns_are_counted_by_the_rows_that_share_them(inputs, monkeypatch):
    monkeypatch.setattr(product, "GROUP_ROWS", 64)
    hidden_ND, head_VD, labels_N = inputs
    untouched = product.TailSparseGradients._add_group
    groups = []
    with watch_kept_columns() as kept:
        watched = product.TailSparseGradients._add_group

        def noted(self, rows_R, hidden_RD, grad_RV):
            watched(self, rows_R, hidden_RD, grad_RV)
            groups.append((len(rows_R), self.kept_columns[-1]))

        monkeypatch.setattr(product.TailSparseGradients, "_add_group", noted)
        hidden_ND = hidden_ND.float().requires_grad_()
        fused_linear_eaft(hidden_ND, head_VD.float(), labels_N, tail="sparse", tail_threshold=THRESHOLD, num_items=1)
        monkeypatch.setattr(product.TailSparseGradients, "_add_group", watched)
    assert product.TailSparseGradients._add_group is untouched
    assert [rows for rows, _ in groups] == [64, 32]
    assert kept.share == sum(rows * columns for rows, columns in groups) / (96 * 300)
    kept.reset()
    assert kept.share is None


# curves


def curve(*losses):
    return [(6 * index, loss) for index, loss in enumerate(losses)]


def test_a_difference_within_the_spread_is_safe():
    exact = {0: curve(3.0, 2.0), 1: curve(3.0, 2.1), 2: curve(3.0, 2.2)}
    sparse = {0: curve(3.0, 2.05), 1: curve(3.0, 2.1), 2: curve(3.0, 2.11)}
    verdict = judge(exact, sparse)
    assert verdict["safe"] is True
    assert verdict["spread_over_seeds"] == pytest.approx(0.1)
    assert verdict["final_difference"] == pytest.approx({0: 0.05, 1: 0.0, 2: -0.09})
    assert verdict["mean_final_difference"] == pytest.approx(-0.04 / 3)
    assert verdict["gain_of_exact"] == pytest.approx(0.9)
    assert verdict["largest_final_difference_by_gain"] == pytest.approx(0.1)


@pytest.mark.parametrize("last", [2.32, 2.08, math.nan])
def test_one_seed_beyond_the_spread_is_not(last):
    exact = {0: curve(3.0, 2.0), 1: curve(3.0, 2.1), 2: curve(3.0, 2.2)}
    sparse = {0: curve(3.0, 2.0), 1: curve(3.0, 2.1), 2: curve(3.0, last)}
    assert judge(exact, sparse)["safe"] is False


def test_the_largest_difference_is_looked_for_along_the_whole_curve():
    exact = {0: curve(3.0, 2.5, 2.0), 1: curve(3.0, 2.4, 2.1)}
    sparse = {0: curve(3.0, 2.5, 2.01), 1: curve(3.0, 2.1, 2.1)}
    assert judge(exact, sparse)["largest_along_the_curve"] == {
        "difference": pytest.approx(-0.3), "step": 6, "seed": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "sparse", [{0: curve(3.0, 2.0)}, {0: curve(3.0, 2.0), 2: curve(3.0, 2.0)}, {0: curve(3.0, 2.0), 1: curve(3.0)}]
)
def test_curves_that_can_not_be_compared_give_no_verdict(sparse):
    with pytest.raises(ValueError, match=r"two seeds of both arms|not measured at the same steps"):
        judge({0: curve(3.0, 2.0), 1: curve(3.0, 2.0)}, sparse)


def test_distances_are_relative_to_what_training_moved():
    first = {"head": torch.zeros(2), "a": torch.zeros(2), "b": torch.zeros(2)}
    exact = {"head": torch.tensor([3.0, 4.0]), "a": torch.tensor([0.0, 2.0]), "b": torch.zeros(2)}
    sparse = {"head": torch.tensor([3.0, 0.0]), "a": torch.tensor([0.0, 2.0]), "b": torch.tensor([1.0, 0.0])}
    assert distances(exact, sparse, first, "head") == {"head": 0.8, "body": 0.5}


def test_the_held_out_loss_is_that_of_the_models_own_logits(folder):
    """The mean over the tokens of all batches, independent of their split and of the gate."""
    from eaftdrope.models import load_model
    from eaftdrope.trainer import apply_eaft

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 260, (3, 12), generator=generator)
    labels = ids.clone()
    labels[0, :9] = -100
    model = load_model(str(folder / "model")).train()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    apply_eaft(model, "eaft")
    batches = [{"input_ids": ids[rows], "labels": labels[rows]} for rows in (slice(1), slice(1, 3))]
    # bfloat16 logits
    assert held_out_loss(model, batches) == pytest.approx(expected.item(), rel=2e-3)
    assert model.training


def test_held_out_rows_are_not_trained_on(folder):
    from benchmarks.tail.curves import CurveSettings
    from eaftdrope.models import load_tokenizer

    settings = CurveSettings(str(folder / "model"), 4, 2, 512, 5, 1, 1e-3, "cosine", 2, ("eaft",))
    rows, held_out = load_rows(settings, str(folder / "rows.jsonl"), None, load_tokenizer(settings.model))
    assert (len(rows), len(held_out)) == (8, 5)
    assert not set(rows["origin"]) & set(held_out["origin"])
    lengths = [len(ids) for ids in held_out["input_ids"]]
    assert lengths == sorted(lengths)


def test_both_verbs_from_the_command_line(folder):
    """A sparse tail that keeps every column trains to the same loss; the JSON has every documented field."""
    common = ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]
    for verb, options in (
        ("errors", ["--tokens", "40"]),
        ("curves", ["--steps", "2", "--eval-every", "1", "--held-out-rows", "8", "--seeds", "2", "--gates", "eaft"]),
    ):
        out, figure = folder / f"{verb}.json", folder / f"{verb}.png"
        main([verb, *common, *options, "--out", str(out), "--figure", str(figure)])
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert json.loads(out.read_text())["model"] == "model"
        assert str(folder) not in out.read_text(), "a path of this machine is in the result"
        assert not out.with_name(out.name + ".partial").exists()

    found = json.loads((folder / "errors.json").read_text())
    assert [(part["data"], part["gate"]) for part in found["results"]] == [("rows", "eaft"), ("rows", "none")]
    assert len(found["results"][0]["grid"]) == len(errors.THRESHOLDS) * len(errors.ORDERS) * len(errors.HEIGHTS)
    assert found["environment"]["versions"]["torch"] == torch.__version__

    found = json.loads((folder / "curves.json").read_text())
    assert [(run["arm"], run["seed"]) for run in found["runs"]] == [(a, s) for s in (0, 1) for a in ("exact", "sparse")]
    for run in found["runs"]:
        assert [step for step, _ in run["held_out_loss"]] == [0, 1, 2]
        assert len(run["batch_cross_entropy"]) == len(run["step_seconds"]) == 2
        assert ("kept_share" in run) == (run["arm"] == "sparse")
    first = {run["held_out_loss"][0][1] for run in found["runs"]}
    assert len(first) == 1, "not all runs start from the same weights and held-out rows"
    assert {run["seed"]: run["batch_cross_entropy"][0] for run in found["runs"]}[0] != pytest.approx(
        {run["seed"]: run["batch_cross_entropy"][0] for run in found["runs"]}[1]
    ), "a seed is an order of the rows"
    assert found["verdict"]["eaft"]["gain_of_exact"] != 0
    assert found["complete"] is True
    assert found["settings"]["data"] == found["settings"]["held_out"] == "rows"


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["errors", "--data", "missing.jsonl"], "missing.jsonl"),
        (["errors", "--model", "package:smollm3"], "no such model package"),
        (["errors", "--out", "no/such/folder/x.json"], "the folder no/such/folder does not exist. Create it first."),
        (["errors", "--figure", "x.gif"], "pass a .png or .svg file"),
        (["curves", "--seeds", "1"], "which needs at least 2"),
        (["curves", "--steps", "10", "--eval-every", "4"], "--eval-every 4 does not divide --steps 10"),
        (["curves", "--gates", "eaft", "eafd"], "--gates eafd: unknown gate"),
        (["curves", "--steps", "0"], "argument --steps: invalid"),
        (["curves", "--scheduler", "cosin"], "argument --scheduler: invalid choice"),
        ([], "the following arguments are required: verb"),
    ],
)
def test_refusals(folder, capsys, arguments, message):
    known = {"--model": str(folder / "model"), "--data": str(folder / "rows.jsonl")}
    rest = [part for option in known.items() if arguments and option[0] not in arguments for part in option]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *rest])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_a_result_is_drawn_again_and_one_without_a_verdict_is_refused(tmp_path, capsys):
    verdict = judge({0: curve(3.0, 2.0), 1: curve(3.0, 2.1)}, {0: curve(3.0, 2.0), 1: curve(3.0, 2.1)})
    runs = [
        {
            "gate": "eaft",
            "arm": arm,
            "seed": seed,
            "held_out_loss": curve(3.0, 2.0 + seed / 10),
            "kept_share": [0.1, None],
        }
        for arm in ("exact", "sparse")
        for seed in (0, 1)
    ]
    settings = {"model": "m", "data": "d", "held_out": "h", "batch_size": 1, "steps": 6, "learning_rate": 1e-3}
    result = {
        "what": "benchmarks.tail curves", "settings": settings, "held_out_tokens": 9, "runs": runs,
        "environment": {"processor": "p", "date": "2026-01-01T00:00:00"}, "verdict": {"eaft": verdict},
    }  # fmt: skip
    path, figure = tmp_path / "r.json", tmp_path / "r.png"
    path.write_text(json.dumps(result))
    main(["draw", str(path), str(figure)])
    assert figure.read_bytes().startswith(b"\x89PNG")
    for text, message in ((json.dumps({**result, "verdict": {}}), "nothing to draw"), ("{", "cannot be read")):
        path.write_text(text)
        with pytest.raises(SystemExit) as stop:
            main(["draw", str(path), str(figure)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_too_few_rows_and_tokens_are_refused(folder, capsys):
    common = ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]
    for arguments, message in (
        (["curves", *common, "--steps", "20", "--held-out-rows", "1"], "has 40 rows, but 81 are needed"),
        (["errors", *common, "--tokens", "100000"], "trained tokens, fewer than 100000"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_a_file_goes_by_its_base_name(folder):
    assert source_name(str(folder / "rows.jsonl")) == "rows"
    assert source_name("package:bfcl") == "package:bfcl"
    (folder / "Tiny-1.5B").mkdir()
    assert source_name(str(folder / "Tiny-1.5B")) == "Tiny-1.5B"

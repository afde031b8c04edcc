"""`eaftdrope bench loss`: every method is measured in turn, beside the floor, with the error of its gradients."""

import pytest
import torch

from eaftdrope.cli import main
from eaftdrope.loss import cost
from eaftdrope.loss.cost import FLOOR, measure


def test_every_method_has_its_ratio_and_its_error(monkeypatch):
    # each call takes as many seconds as its place in the round: floor 1, then 2, 3, 4
    ticks = iter(range(1, 100))

    def seconds(call, device):
        call()
        return float((next(ticks) - 1) % 4 + 1)

    monkeypatch.setattr(cost, "_seconds", seconds)
    floor, ours, gated, plain, liger = measure(16, 64, 32, "float32", "eaft", "cpu", repeat=3)
    assert (floor.method, floor.seconds, floor.ratio, floor.gradient_error) == (FLOOR, 1.0, 1.0, None)
    assert [(row.method, row.ratio) for row in (ours, gated, plain)] == [
        ("eaftdrope, gate eaft", 2.0),
        ("full logits, gate eaft", 3.0),
        ("full logits, plain cross-entropy", 4.0),
    ]
    assert all(0 <= row.gradient_error < 2e-6 and row.extra_bytes is None for row in (ours, gated, plain))
    assert liger.unavailable in ("needs a GPU", "not installed")


def test_a_wrong_gradient_shows():
    inputs = cost._inputs(8, 32, 16, torch.float32, "cpu")
    exact = cost._gradient_error(lambda h, w, y: torch.nn.functional.cross_entropy(h @ w.T, y), inputs, "none")
    wrong = cost._gradient_error(lambda h, w, y: 1.01 * torch.nn.functional.cross_entropy(h @ w.T, y), inputs, "none")
    assert exact < 1e-6 and wrong == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loss", "--shape", "576"], "--shape 576: pass two sizes, such as 576x49152."),
        (["loss", "--shape", "0x10"], "--shape 0x10: pass two sizes"),
        (["loss", "--dtype", "float16"], "--dtype float16: pass bfloat16 or float32."),
        (["loss", "--gate", "eaftt"], "--gate eaftt: unknown gate 'eaftt'. Did you mean"),
        (["training"], "bench training needs the repository: run `python -m benchmarks.training`"),
        (["drope"], "bench drope needs the repository: run `python -m benchmarks.miniature`"),
    ],
)
def test_wrong_options_and_moved_benchmarks(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *options])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(message)


def test_the_verb_prints_the_table(capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "bench",
                "loss",
                "--shape",
                "16x64",
                "--rows",
                "8",
                "--dtype",
                "float32",
                "--device",
                "cpu",
                "--repeat",
                "1",
            ]
        )
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "8 tokens, head 16x64, float32, cpu, median of 1" in out and "eaftdrope, gate eaft" in out

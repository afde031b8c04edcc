"""The search finds a planted temperature, and says when there is none to find."""

import math

import pytest
import torch

from eaftdrope.errors import UserError
from eaftdrope.evaluate.long_context import fit_slope, fit_temperature
from eaftdrope.evaluate.long_context.temperature import GRID, HIGHEST, LOWEST, search
from eaftdrope.evaluate.scores import score_units


def bowl(centre, depth=1.0, noise=0.0, windows=8):
    """A loss with its least at `centre`; `noise` makes the windows disagree about where it is."""
    calls = []

    def measure(beta):
        calls.append(beta)
        where = [centre + noise * (2 * (i % 2) - 1) for i in range(windows)]
        units = [(100 * (2 + depth * (math.log(beta) - math.log(w)) ** 2), 100.0) for w in where]
        return score_units("perplexity", "general", "p", units, kind="exp", better="lower")

    return measure, calls


@pytest.mark.parametrize("centre", [0.62, 0.97, 1.0, 1.113, 1.37, 1.69, 2.9])
def test_the_search_finds_the_least(centre):
    measure, calls = bowl(centre)
    fit = search(4096, measure)
    assert fit.beta == pytest.approx(centre, abs=0.01)
    assert not fit.at_edge and set(GRID) <= set(fit.tried)
    assert len(calls) == len(set(calls)) == len(fit.tried) <= 24
    assert fit.best.value == min(score.value for score in fit.tried.values())


@pytest.mark.parametrize(("centre", "edge"), [(0.1, LOWEST), (50.0, HIGHEST)])
def test_a_least_beyond_the_range_is_said(centre, edge):
    fit = search(4096, bowl(centre)[0])
    assert fit.at_edge and fit.beta == edge


def test_what_windows_disagree_about_is_not_distinguishable():
    clear = search(4096, bowl(1.3, noise=0.05)[0])
    assert clear.distinguishable and clear.plain.value - clear.best.value > 2 * clear.stderr > 0
    unclear = search(4096, bowl(1.03, noise=0.3)[0])
    assert not unclear.distinguishable and unclear.stderr > 0
    one = search(4096, bowl(1.3, windows=1)[0])
    assert one.stderr is None and not one.distinguishable


def test_one_that_is_best_as_it_is():
    fit = search(4096, bowl(1.0)[0])
    assert abs(fit.beta - 1.0) < 0.01
    assert not fit.distinguishable or fit.beta != 1.0


def test_slope_is_least_squares_through_one():
    assert fit_slope({2.0: 1 + 0.3 * math.log(2), 8.0: 1 + 0.3 * math.log(8)}) == pytest.approx(0.3)
    x, y = [math.log(2), math.log(4)], [0.2, 0.1]
    expected = (x[0] * y[0] + x[1] * y[1]) / (x[0] ** 2 + x[1] ** 2)
    assert fit_slope({1.0: 1.7, 2.0: 1.2, 4.0: 1.1}) == pytest.approx(expected)
    with pytest.raises(UserError, match="a slope needs a length beyond the trained one"):
        fit_slope({1.0: 1.2})


def test_a_planted_temperature_is_found_in_a_model(tiny_llama, byte_tokenizer):
    """Text that the model wrote itself is least surprising at its own temperature: with queries of 1 / 1.3 of their length
    that is beta = 1.3."""
    with torch.no_grad():
        for layer in tiny_llama.model.layers:
            layer.self_attn.q_proj.weight *= 3
        torch.manual_seed(0)
        written = tiny_llama.generate(
            torch.full((16, 1), 40), max_new_tokens=95, min_new_tokens=95, do_sample=True, top_k=0,
            suppress_tokens=[0, 1, 2],
        )  # fmt: skip
        for layer in tiny_llama.model.layers:
            layer.self_attn.q_proj.weight /= 1.3
    assert written.shape == (16, 96)
    # Bytes that are no text of their own: what is tokenised must come back.
    texts = [row.tolist() for row in written]

    class Ids:
        """A tokenizer whose texts are token ids."""

        bos_token_id = None

        def __call__(self, ids, **_):
            return type("Encoding", (), {"input_ids": ids if isinstance(ids, list) else []})

        def decode(self, ids):
            return "."

    seen = []
    fit = fit_temperature(
        tiny_llama, Ids(), texts, 96, windows=16, batch_tokens=16 * 96, progress=lambda *pair: seen.append(pair)
    )
    assert fit.beta == pytest.approx(1.3, abs=0.06)
    assert fit.distinguishable and not fit.at_edge and fit.plain.n == 16
    assert sorted(beta for beta, _ in seen) == sorted(fit.tried)
    # the model is left as it was
    assert all(layer.self_attn.scaling == 8**-0.5 for layer in tiny_llama.model.layers)


def test_a_text_shorter_than_the_length(tiny_llama, byte_tokenizer):
    with pytest.raises(UserError, match=r"the text has 5 tokens, too few for a window of 64"):
        fit_temperature(tiny_llama, byte_tokenizer, ["hello"], 64)

"""The window itself: a model that learns nothing is the stock class under an explicit mask, to the last bit."""

import pytest
import torch

from eaftdrope import apply_ttt
from eaftdrope.ttt import TTTConfig, TTTState, sliding
from tests.ttt.tiny import CHUNK, CLASSES, LENGTH, WINDOW, add_ttt, random_ids, read, stock_model, tiny, window_mask

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@torch.no_grad()
def stock_in_chunks(stock, ids, sink):
    """Final hidden states `[B, T, D]` of the stock full-attention class, chunk by chunk, with a window's mask and keys."""
    rows, keys = [], None
    mask = window_mask(LENGTH, WINDOW, sink)
    for start in range(0, ids.shape[1], CHUNK):
        end = min(start + CHUNK, ids.shape[1])
        kept = [*range(min(sink, start)), *range(max(min(sink, start), start - WINDOW + 1), start)]
        seen = torch.tensor([*kept, *range(start, end)])
        output = stock.base_model(
            ids[:, start:end],
            attention_mask=mask[None, None, start:end, seen].expand(len(ids), -1, -1, -1),
            position_ids=torch.arange(start, end)[None],
            past_key_values=keys,
            use_cache=True,
        )
        rows.append(output.last_hidden_state)
        keys = output.past_key_values
        following = [*range(min(sink, end)), *range(max(min(sink, end), end - WINDOW + 1), end)]
        places = torch.tensor([seen.tolist().index(position) for position in following])
        for layer in keys.layers:
            layer.keys, layer.values = layer.keys[:, :, places], layer.values[:, :, places]
    return torch.cat(rows, dim=1)


# (architecture, sink): one in every form, the others with a sink
SHAPES = [*((kind, 2) for kind in CLASSES), ("qwen3", 0)]


# with a rate of 0 no gradient is computed; a clip of 0 makes every step of the learning path 0
@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 0.0, "layout": "in_place"}, {"clip": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "sink"), SHAPES)
def test_without_learning_it_is_the_stock_class_under_a_mask(kind, sink, dtype, options):
    ids = random_ids()
    stock = stock_model(kind, dtype=dtype)
    expected = stock_in_chunks(stock, ids, sink)
    model = tiny(kind, dtype=dtype, zero=True, sink=sink, **options)
    with torch.no_grad():
        found = model.base_model(ids, past_key_values=TTTState(model), use_cache=True).last_hidden_state
        assert torch.equal(found, expected)
        logits = torch.cat([stock.lm_head(hidden) for hidden in expected.split(CHUNK, dim=1)], dim=1)
        assert torch.equal(read(model, ids, CHUNK), logits)
        if dtype == torch.float64:
            # in training the first blocks take the row as a whole, and sums of another length round differently
            assert (model(ids).logits - logits).abs().max() < 1e-13


def test_steps_of_0_change_nothing_in_place():
    """Each row has weights of its own then, and products over one row round differently."""
    ids = random_ids()
    expected = stock_in_chunks(stock_model(), ids, sink=2)
    model = tiny(layout="in_place", clip=0.0)
    with torch.no_grad():
        assert (model.base_model(ids).last_hidden_state - expected).abs().max() < 1e-13


@pytest.mark.parametrize("kind", CLASSES)
def test_a_stock_window_is_an_explicit_mask(kind):
    ids = random_ids()
    stock = stock_model(kind)
    with torch.no_grad():
        expected = stock(ids, attention_mask=window_mask(LENGTH)[None, None].expand(2, -1, -1, -1)).logits
        full = stock(ids).logits
        converted = sliding(stock_model(kind), window=WINDOW).eval()
        assert (converted(ids).logits - expected).abs().max() < 1e-12
        assert (full - expected).abs().max() > 1e-2
        model = add_ttt(converted, zero=True, window=None, sink=0, lr=0.0)
        assert (model(ids).logits - expected).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_window_of_the_whole_text_is_the_original(kind, dtype):
    """One chunk holds the text, so shapes are equal too, and nothing is rounded differently."""
    ids = random_ids()
    with torch.no_grad():
        expected = stock_model(kind, dtype=dtype)(ids).logits
        assert torch.equal(sliding(stock_model(kind, dtype=dtype), window=64).eval()(ids).logits, expected)
        for sink in (0, 2):
            config = TTTConfig(window=64, sink=sink, chunk=32, fast_blocks=2)
            model = apply_ttt(stock_model(kind, dtype=dtype), config)
            assert torch.equal(model(ids).logits, expected)


def test_an_eager_model_gets_the_same_window():
    """Eager attention adds its mask, so true and false would be two numbers."""
    ids = random_ids()
    with torch.no_grad():
        expected = tiny(dtype=torch.float32)(ids).logits
        eager = stock_model(dtype=torch.float32, attn_implementation="eager")
        assert eager.config._attn_implementation == "eager"
        model = add_ttt(eager)
        assert (model(ids).logits - expected).abs().max() < 1e-4
        assert (read(model, ids, 3) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("window", [1, 2])
def test_windows_of_one_and_two_tokens(window):
    ids = random_ids()
    stock = stock_model()
    mask = window_mask(LENGTH, window, sink=1)[None, None].expand(2, -1, -1, -1)
    with torch.no_grad():
        expected = stock(ids, attention_mask=mask).logits
        model = tiny(zero=True, lr=0.0, window=window, chunk=window, sink=1)
        for piece in (1, 4, LENGTH):
            assert (read(model, ids, piece) - expected).abs().max() < 1e-12

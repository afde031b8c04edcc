"""The memory of fast weights in the plan, against what autograd keeps for the backward."""

import pytest

from eaftdrope.recipe import make_recipe
from eaftdrope.run.memory import estimate, fast_weights_of
from eaftdrope.run.plan import meta_model
from eaftdrope.run.settings import TrainingSettings
from eaftdrope.ttt.config import TTTConfig
from tests.tiny_models import llama_config

ROWS, LENGTH, VOCABULARY, INNER, HIDDEN = 2, 256, 128, 192, 64


def tiny_config():
    return llama_config(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=4,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )


def settings_of(ttt, **train):
    recipe = make_recipe(
        {"model": "tiny/model", "data": {"train": "tiny/data"}, "train": train, "output": {"dir": "runs/tiny"}}
    )
    return TrainingSettings(
        model=recipe.model,
        data=recipe.data,
        loss=recipe.loss,
        train=recipe.train,
        probes=recipe.probes,
        max_length=LENGTH,
        folder="runs/tiny",
        ttt=ttt,
    )


def kept_tensors(ttt, *, autocast):
    """{address: (bytes, shape)} of the storages that a forward of the body keeps, without parameters and casts of them."""
    import torch
    from transformers import LlamaForCausalLM

    from eaftdrope.ttt import apply_ttt

    model = apply_ttt(LlamaForCausalLM(tiny_config()).train(), ttt)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(sorted(p.shape)) for p in model.parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model.model(input_ids=torch.randint(0, VOCABULARY, (ROWS, LENGTH))).last_hidden_state
    found, seen, stack = {}, set(), [hidden.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        for name in dir(node):
            saved = getattr(node, name, None) if name.startswith("_saved_") or name == "saved_tensors" else None
            for tensor in saved if isinstance(saved, list | tuple) else [saved]:
                if isinstance(tensor, torch.Tensor):
                    storage, shape = tensor.untyped_storage(), tuple(tensor.shape)
                    cast = tensor.dim() == 2 and tuple(sorted(shape)) in shapes
                    if storage.data_ptr() not in weights and not cast:
                        found[storage.data_ptr()] = (storage.nbytes(), shape)
    return found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("horizon", "checkpoint"), [(1, False), (2, False), (None, False), (1, True)])
def test_the_estimate_is_what_autograd_keeps(horizon, checkpoint, autocast):
    ttt = TTTConfig(window=64, chunk=32, fast_blocks=2, horizon=horizon, checkpoint=checkpoint)
    kept = kept_tensors(ttt, autocast=autocast)
    fast_shapes = {(ROWS, INNER, HIDDEN), (ROWS, HIDDEN, INNER)}
    config, settings = tiny_config(), settings_of(ttt, batch_size=ROWS)
    model = meta_model(settings.model, None, config, ttt=ttt)
    fast = fast_weights_of(settings, config, model, autocast=autocast)
    # exact: one copy per chunk, gradients of second-order chunks
    assert fast.kept_bytes == sum(size for size, shape in kept.values() if shape in fast_shapes)
    assert (fast.parameters, fast.blocks, fast.chunks) == (2 * 3 * INNER * HIDDEN, 2, 8)
    memory = estimate(settings, config, model, device="cpu", autocast=autocast)
    measured = sum(size for size, _ in kept.values())
    assert memory.activations + fast.kept_bytes == pytest.approx(measured, rel=0.15)


def test_what_grows_with_rows_and_what_with_length():
    def planned(length=LENGTH, rows=1, **options):
        import dataclasses

        settings = dataclasses.replace(
            settings_of(TTTConfig(window=64, chunk=32, fast_blocks=2, **options), batch_size=rows), max_length=length
        )
        config = tiny_config()
        return fast_weights_of(
            settings, config, meta_model(settings.model, None, config, ttt=settings.ttt), autocast=False
        )

    one, two = planned(), planned(rows=2)
    assert two.bytes == 2 * one.bytes and two.row_bytes == one.row_bytes == 16 * one.parameters
    assert planned(2 * LENGTH).kept_bytes == one.kept_bytes + 8 * 4 * one.parameters
    assert planned(layout="in_place").added == 0 and one.added > one.parameters
    assert planned(checkpoint=True).activation_bytes < one.activation_bytes / 2


def test_a_model_that_does_not_learn_has_none():
    settings, config = settings_of(None), tiny_config()
    model = meta_model(settings.model, None, config)
    assert fast_weights_of(settings, config, model, autocast=False) is None
    assert estimate(settings, config, model, device="cpu", autocast=False).fast_weights == 0


@pytest.mark.parametrize(
    ("ttt", "part"),
    [
        (TTTConfig(window=300, chunk=32), "Every row fits into the window of 300 tokens"),
        (
            TTTConfig(window=64, chunk=32, horizon=9),
            "ttt.horizon 9: a row has at most 8 chunks, so this is the same as all.",
        ),
        (TTTConfig(window=64, chunk=32, warmup=8), "ttt.warmup 8: a row has at most 8 chunks, so the inner rate never"),
        (TTTConfig(window=64, chunk=32, lr=0.0), "ttt.lr 0: nothing is learned while reading."),
    ],
)
def test_notes_of_the_plan(ttt, part):
    from eaftdrope.run.plan import make_plan

    (note,) = make_plan(settings_of(ttt), tiny_config(), autocast=False).notes
    assert part in note


def test_a_sink_beyond_the_trained_length_needs_the_cache():
    import dataclasses

    from eaftdrope.errors import UserError
    from eaftdrope.run.plan import make_plan

    ttt = TTTConfig(window=64, chunk=32)
    long = dataclasses.replace(settings_of(ttt, gradient_checkpointing=True), max_length=513)
    with pytest.raises(
        UserError, match=r"ttt\.data\.max_length 513 with gradient checkpointing: beyond the 512 tokens"
    ):
        make_plan(long, tiny_config(), autocast=False)
    for fitting in (
        dataclasses.replace(long, max_length=512),
        dataclasses.replace(long, ttt=dataclasses.replace(ttt, sink=0)),
        dataclasses.replace(settings_of(ttt), max_length=513),
    ):
        assert make_plan(fitting, tiny_config(), autocast=False).reading.parameters > 0


def test_an_architecture_that_cannot_learn_is_refused_before_weights_are_read():
    from transformers import GPT2Config

    from eaftdrope.errors import UserError
    from eaftdrope.run.plan import make_plan

    with pytest.raises(UserError, match=r"GPT2LMHeadModel has no list of blocks at base_model\.layers"):
        make_plan(
            settings_of(TTTConfig(window=64, chunk=32)), GPT2Config(n_layer=2, n_embd=32, n_head=2), autocast=False
        )

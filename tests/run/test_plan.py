"""The plan: counts that are exact, an estimate that knows what does not fit, and its rendering."""

import io
from dataclasses import replace

import pytest
import torch

from eaftdrope.recipe import make_recipe
from eaftdrope.run.machine import Device, format_bytes
from eaftdrope.run.plan import make_plan, meta_model, plan_lines, plan_table, plan_text
from eaftdrope.run.record import DataStats
from eaftdrope.run.settings import eaft_settings

CPU = Device("cpu", "a processor", 16 * 2**30)
HIDDEN, INNER, LAYERS, VOCABULARY = 64, 192, 3, 128
LINEAR = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
PARAMETERS = VOCABULARY * HIDDEN + LINEAR + (2 * LAYERS + 1) * HIDDEN


@pytest.fixture
def config():
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    )


def recipe(lora=None, loss=None, **train):
    train = {"batch_size": 4, "accumulation": 2, **train}
    """The settings of a recipe."""
    made = make_recipe(
        {
            "model": "tiny/model",
            "data": {"train": "tiny/data", "max_length": 256},
            "lora": lora,
            "loss": loss or {},
            "train": train,
            "output": {"dir": "runs/tiny", "merge": lora is not None},
        }
    )
    return eaft_settings(made)


def test_an_anchor_shows_its_base_and_its_cost(config):
    anchor = {"anchor": {"kl": 0.1, "mask_target": True}}
    plain, full, adapted, with_head = (
        make_plan(recipe(lora, loss), config, autocast=False, device=CPU)
        for lora, loss in ((None, None), (None, anchor), ({"r": 4}, anchor), ({"modules_to_save": ["lm_head"]}, anchor))
    )
    assert plain.anchor is None and plain.memory.base_model == adapted.memory.base_model == 0
    # the frozen second copy, the base's tile and hidden states
    assert full.memory.base_model == 4 * PARAMETERS
    assert full.memory.loss_tile == 2 * plain.memory.loss_tile == adapted.memory.loss_tile
    assert full.memory.total == plain.memory.total + plain.memory.loss_tile + 4 * PARAMETERS
    kind = "0.1 KL(base || model), without the label; one more forward, of"
    assert full.anchor == f"{kind} a second copy of the model, and 4 products with the head instead of 3"
    assert adapted.anchor == f"{kind} the model without its adapters, and 3 products with the head instead of 2"
    assert "4 products" in with_head.anchor
    lines = dict(plan_lines(full))
    assert lines["anchor"] == full.anchor and lines["  base model"].endswith("whole on every device")
    assert "anchor" not in dict(plan_lines(plain)) and "  base model" not in dict(plan_lines(adapted))


def test_full_fine_tune(config):
    plan = make_plan(recipe(), config, autocast=False, device=CPU)
    assert (plan.parameters, plan.trained_parameters) == (PARAMETERS, PARAMETERS)
    assert (plan.method, plan.architecture) == ("full fine-tune", "LlamaForCausalLM")
    assert (plan.rows_per_step, plan.tokens_per_step, plan.steps, plan.data) == (8, 2048, None, None)
    m = plan.memory
    assert (m.weights, m.gradients, m.optimizer) == (4 * PARAMETERS, 4 * PARAMETERS, 8 * PARAMETERS)
    # one tile holds every row here: 1024 rows of the vocabulary, and the gradient of the hidden states
    assert m.loss_tile == 1024 * (VOCABULARY + HIDDEN) * 4
    assert m.total == m.weights + m.gradients + m.optimizer + m.activations + m.loss_tile
    assert plan.fits is True


def test_adapters_are_counted_as_peft_makes_them(config):
    plan = make_plan(recipe({"r": 8}), config, autocast=False, device=CPU)
    adapters = LAYERS * 8 * (4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + INNER))
    assert (plan.parameters, plan.trained_parameters) == (PARAMETERS, adapters)
    assert plan.method == "LoRA r 8, alpha 16"
    assert (plan.memory.gradients, plan.memory.optimizer) == (4 * adapters, 8 * adapters)


def test_a_module_to_save_is_trained_beside_the_adapters(config):
    config.tie_word_embeddings = False
    plan = make_plan(recipe({"r": 8, "modules_to_save": ["lm_head"]}), config, autocast=False, device=CPU)
    head = VOCABULARY * HIDDEN
    assert plan.parameters == PARAMETERS + head
    assert plan.trained_parameters == LAYERS * 8 * (4 * 2 * HIDDEN + 3 * (HIDDEN + INNER)) + head


def test_no_weight_is_made(config):
    lora = recipe({"r": 8})
    assert {parameter.device.type for parameter in meta_model(lora.model, lora.lora, config).parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("train", "rows", "steps"),
    [
        ({"epochs": 1}, 80, 10),
        ({"epochs": 1}, 81, 11),
        ({"epochs": 3}, 81, 33),
        ({"epochs": 0.5}, 81, 6),
        ({"epochs": 2, "batch_size": 3, "accumulation": 1}, 10, 8),
        ({"steps": 7}, 81, 7),
    ],
)
def test_steps(config, train, rows, steps):
    plan = make_plan(recipe(**train), config, DataStats(rows, rows * 100, rows * 30), autocast=False, device=CPU)
    assert plan.steps == steps
    assert plan.tokens_per_step == plan.rows_per_step * 100


def test_steps_are_those_of_the_trainer(config, tmp_path):
    """Against transformers' own arithmetic, on a run of ten rows."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 10, "labels": [[1, 2, 3]] * 10})
    for batch, accumulation, epochs in ((3, 2, 2), (4, 1, 1.5), (2, 4, 1)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(AutoModelForCausalLM.from_config(config), arguments, train_dataset=rows)
        trainer.train()
        planned = recipe(batch_size=batch, accumulation=accumulation, epochs=epochs)
        plan = make_plan(planned, config, DataStats(10, 30, 30), autocast=False, device=CPU)
        assert plan.steps == trainer.state.global_step


def test_processes_share_the_rows(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    plan = make_plan(recipe(), config, DataStats(81, 8100, 100), autocast=False, device=CPU)
    assert (plan.degrees.processes, plan.rows_per_step, plan.tokens_per_step) == (4, 32, 3200)
    # 21 rows a process: 6 batches of 4, 3 steps
    assert plan.steps == 3


def test_what_does_not_fit_is_said_with_the_ways_out(config):
    small = Device("cuda", "a small GPU", 2**20)
    plan = make_plan(recipe(), config, autocast=True, device=small)
    assert plan.fits is False
    assert plan.notes[-1] == (
        f"It will probably not fit: {format_bytes(plan.memory.total)} needed, a small GPU has 1 MB. What reduces it: "
        "train.gradient_checkpointing: true, a smaller train.batch_size (raise train.accumulation as much), "
        "a smaller data.max_length, lora."
    )
    unknown = make_plan(recipe(), config, autocast=True, device=Device("mps", "a GPU", None))
    assert (unknown.fits, unknown.notes) == (None, ())


def test_notes_on_length_and_cut_rows(config):
    config.max_position_embeddings = 128
    plan = make_plan(recipe(), config, DataStats(50, 5000, 500, truncated=5), autocast=False, device=CPU)
    assert plan.notes == (
        "data.max_length 256 is beyond the model's context of 128 tokens.",
        "5 of 50 rows (10%) are truncated at data.max_length.",
    )


@pytest.mark.parametrize(
    ("dtype", "precision", "instructions", "noted"),
    [
        ("bfloat16", "auto", False, True),
        ("float32", "bfloat16", False, True),
        ("auto", "auto", False, True),
        ("float32", "auto", False, False),
        ("bfloat16", "auto", True, False),
        ("fast", "auto", False, False),
        ("fast", "bfloat16", False, True),
    ],
)
def test_a_processor_that_is_slow_in_bfloat16(dtype, precision, instructions, noted, config, monkeypatch):
    monkeypatch.setattr("eaftdrope.loss.products.has_instructions", lambda dtype: instructions)
    config.dtype = torch.bfloat16
    planned = recipe(precision=precision)
    planned = replace(planned, model=planned.model.model_copy(update={"dtype": dtype}))
    notes = make_plan(planned, config, autocast=False, device=CPU).notes
    assert any("no bfloat16 instructions" in note and "model.dtype=fast" in note for note in notes) is noted
    assert not make_plan(planned, config, autocast=False, device=Device("cuda", "a GPU", None)).notes


def test_text(config):
    planned = recipe({"r": 8}, steps=5)
    plan = make_plan(planned, config, DataStats(81, 8100, 2000, 3, 1), autocast=True, device=CPU)
    lines = plan_text(plan_lines(plan)).splitlines()
    assert lines[:7] == [
        f"model         tiny/model (LlamaForCausalLM, {PARAMETERS:,} parameters)",
        f"trained       {plan.trained_parameters:,} parameters ({plan.trained_parameters / PARAMETERS:.2%}), "
        "LoRA r 8, alpha 16",
        "loss          gate eaft",
        "precision     float32 weights, bfloat16 autocast",
        "data          81 rows, 8,100 tokens, 2,000 of them trained (25%), 3 rows truncated, 1 skipped",
        "per step      8 rows, 800 tokens",
        "steps         5, 4,000 tokens",
    ]
    names = [line[:13].strip() for line in lines[7:13]]
    assert names == ["memory", "weights", "gradients", "optimizer", "activations", "loss tile"]
    assert lines[13] == f"fits on       1 GPU: from 16 GB ({format_bytes(plan.gpus[0].needed)} needed on each)"
    assert lines[14] == "writes        runs/tiny/"
    assert any(line.strip().startswith("the merged model: about ") for line in lines)


def test_table_holds_the_lines_of_the_text(config):
    from rich.console import Console

    plan = make_plan(recipe(), config, autocast=False, device=CPU)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan_table(plan_lines(plan)))
    shown = " ".join(console.export_text().split())
    for line in plan_text(plan_lines(plan)).splitlines():
        assert " ".join(line.split()) in shown


def test_sizes():
    assert [format_bytes(size) for size in (0, 85 * 2**20, 2.5 * 2**30, 200 * 2**30)] == [
        "0 MB",
        "85 MB",
        "2.50 GB",
        "200 GB",
    ]


def test_a_backend_that_can_not_work_here_is_refused_before_anything_is_loaded(monkeypatch):
    from eaftdrope.errors import UserError
    from eaftdrope.recipe import make_recipe
    from eaftdrope.run import build

    monkeypatch.setattr(build, "training_device", lambda: CPU)

    def planned(backend):
        data = {"model": "org/model", "data": {"train": "package:bfcl"}, "output": {"dir": "runs/x"}}
        made = make_recipe({**data, "loss": {"backend": backend}})
        return made.model, made.loss, made.train.precision

    monkeypatch.delenv("EAFTDROPE_LOSS_BACKEND", raising=False)
    for backend in ("auto", "torch"):
        build.check_backend(*planned(backend))
    with pytest.raises(UserError, match=r"loss\.backend: cuda cannot work on this machine's cpu"):
        build.check_backend(*planned("cuda"))
    monkeypatch.setenv("EAFTDROPE_LOSS_BACKEND", "cuda")
    build.check_backend(*planned("torch"))
    with pytest.raises(UserError, match="EAFTDROPE_LOSS_BACKEND: cuda cannot work on this machine's cpu"):
        build.check_backend(*planned("auto"))
    monkeypatch.setenv("EAFTDROPE_LOSS_BACKEND", "cdua")
    with pytest.raises(UserError, match="EAFTDROPE_LOSS_BACKEND: unknown loss backend 'cdua'"):
        build.check_backend(*planned("auto"))

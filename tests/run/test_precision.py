"""The types a run computes in: as the recipe says, or as the device is fast at."""

import pytest
import torch

from eaftdrope.recipe import make_recipe
from eaftdrope.run.build import build_model
from eaftdrope.run.machine import Device, slow_in_bfloat16, uses_bfloat16, weights_dtype
from eaftdrope.run.plan import make_plan
from eaftdrope.run.settings import eaft_settings
from tests.tiny_models import SMALLEST, tiny_llama


def recipe(dtype="fast", precision="auto", reference="org/model"):
    return make_recipe(
        {
            "model": {"reference": reference, "dtype": dtype},
            "data": {"train": "tiny/data"},
            "train": {"steps": 1, "precision": precision},
            "output": {"dir": "runs/tiny"},
        }
    )


@pytest.fixture
def processor(monkeypatch):
    """Sets which feature flags the processor has, and whether torch has a fast product for it; there is no GPU."""
    monkeypatch.setattr("eaftdrope.run.machine.training_device", lambda: Device("cpu", "a processor", None))

    def choose(flags, instructions=True):
        monkeypatch.setattr("eaftdrope.run.machine.cpu_flags", lambda: set(flags.split()))
        monkeypatch.setattr("eaftdrope.loss.products.has_instructions", lambda dtype: instructions)

    return choose


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("avx2 avx512f avx512_bf16", True),
        ("amx_bf16", True),
        ("avx2 avx512f", False),
        ("asimd bf16", False),
        ("", False),
    ],
)
def test_what_the_processor_is_fast_at(flags, fast, processor):
    processor(flags)
    assert uses_bfloat16("auto") is fast
    assert weights_dtype("fast") == ("bfloat16" if fast else "float32")
    # a torch without oneDNN makes nothing of them
    processor(flags, instructions=False)
    assert not uses_bfloat16("auto") and slow_in_bfloat16()


@pytest.mark.parametrize(("kind", "dtype"), [("xpu", "bfloat16"), ("mps", "float32")])
def test_fast_is_settled_by_the_device_that_trains(kind, dtype, processor):
    processor("avx512_bf16" if dtype == "float32" else "avx2")
    assert weights_dtype("fast", Device(kind, "a GPU", None)) == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("flags", ["avx2", "avx512_bf16"])
def test_what_the_recipe_says_stands(dtype, flags, processor):
    processor(flags)
    assert weights_dtype(dtype) == dtype
    assert uses_bfloat16("bfloat16") and not uses_bfloat16("float32")


@pytest.mark.parametrize(("flags", "dtype"), [("avx2", torch.float32), ("avx512_bf16", torch.bfloat16)])
def test_the_model_and_its_plan_have_the_same_type(flags, dtype, processor, tmp_path):
    processor(flags)
    tiny_llama(**{**SMALLEST, "intermediate_size": 32}, vocab_size=32).save_pretrained(tmp_path / "model")
    chosen = recipe(reference=str(tmp_path / "model"))
    model = build_model(chosen.model)
    assert model.dtype == dtype
    plan = make_plan(eaft_settings(chosen), model.config, autocast=False, device=Device("cpu", "a processor", None))
    assert plan.memory.weights == sum(p.numel() for p in model.parameters()) * dtype.itemsize
    assert plan.precision == f"{str(dtype).removeprefix('torch.')} weights"

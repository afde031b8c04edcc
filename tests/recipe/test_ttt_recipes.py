"""The recipes of test-time training: at full size by their plans, and whole on tiny models of the same architectures."""

import json

import pytest
import yaml

from eaftdrope.cli.recipes import shipped_recipes
from eaftdrope.recipe import load_recipe
from eaftdrope.run.machine import Device
from eaftdrope.run.plan import make_plan
from eaftdrope.run.stages.chain import open_stages
from tests.recipe.test_drope_recipes import QWEN, llama, qwen3, shape
from tests.tiny_models import byte_tokenizer
from tests.tiny_run import save_text, train

SHIPPED = {name: path for name, path in shipped_recipes().items() if name.startswith("ttt/")}
# name -> (configuration as published, its parameters, fast weights, blocks that learn, GB of a device)
FULL_SIZE = {
    "ttt/smollm2_135m": (
        lambda: llama(**shape(576, 1536, 30, 9, 3, 49152, 8192)),
        *(134_515_008, 8 * 3 * 576 * 1536, 8, 12),
    ),
    "ttt/qwen3_4b": (lambda: qwen3(**QWEN), 4_022_468_096, 9 * 3 * 2560 * 9728, 9, 80),
    "ttt/llama3.1_8b": (
        lambda: llama(**shape(4096, 14336, 32, 32, 8, 128256, 131072, tied=False)),
        *(8_030_261_248, 4 * 3 * 4096 * 14336, 4, 141),
    ),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_fits_the_hardware_in_its_header(name):
    make, parameters, fast, blocks, memory = FULL_SIZE[name]
    recipe, config = load_recipe(SHIPPED[name], ["output.dir=unused"]), make()
    assert f" {memory} GB" in SHIPPED[name].read_text(encoding="utf-8")
    (stage,) = open_stages(recipe)
    settings = stage.settings(config)
    device = Device("cuda", "a GPU", int(memory * 1e9))
    plan = make_plan(settings, config, autocast=settings.train.precision == "bfloat16", device=device)
    assert (plan.parameters, plan.reading.parameters, plan.reading.blocks) == (parameters, fast, blocks)
    assert plan.reading.chunks == settings.max_length // settings.ttt.chunk == 8
    # every row has its own: what was learned before and after a chunk, its gradient and the step, in float32
    assert plan.reading.row_bytes == 16 * fast
    assert plan.fits and plan.memory.total > 0.25 * device.memory, (plan.memory, device)
    assert [fit.devices for fit in plan.gpus] == [1]
    # several windows, so that what left the window has to be remembered
    assert settings.max_length >= 4 * settings.ttt.window
    assert not plan.notes


def test_these_are_the_recipes():
    assert set(SHIPPED) == set(FULL_SIZE)


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 260}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Tiny models of both architectures, and text."""
    import torch
    from transformers import LlamaForCausalLM, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("project")
    for make, model in {llama: LlamaForCausalLM, qwen3: Qwen3ForCausalLM}.items():
        torch.manual_seed(0)
        config = make(**{**TINY, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True})
        config.head_dim = 8
        model(config).save_pretrained(folder / config.model_type)
        byte_tokenizer().save_pretrained(folder / config.model_type)
    save_text(folder / "text.jsonl")
    return folder


@pytest.mark.parametrize(
    "name",
    ["ttt/qwen3_4b", *(pytest.param(name, marks=pytest.mark.end_to_end) for name in FULL_SIZE if "qwen" not in name)],
)
def test_a_recipe_runs_on_a_tiny_model_of_its_architecture(name, project, tmp_path):
    """Model, data and sizes replaced; everything else (adapters, checkpointing, schedule, layout, loss) as it is."""
    from transformers import AutoTokenizer

    from eaftdrope.ttt import load_ttt, sequence_nll

    data = yaml.safe_load(SHIPPED[name].read_text(encoding="utf-8"))
    data["model"] = {"reference": str(project / ("qwen3" if "qwen" in name else "llama"))}
    section = data["ttt"]
    section |= {"window": 32, "chunk": 16, "fast_blocks": 1}
    section["data"] |= {"train": str(project / "text.jsonl"), "held_out": 0.5, "max_length": 128}
    section["train"] |= {"steps": 3, "precision": "float32"}
    section["probes"] = {"target": [], "general": []}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    ended = train(path, f"output.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.out
    run = tmp_path / "run" / "ttt"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines if "position/nll_64_128" in row] == [1, 2, 3]
    model = load_ttt(run)
    assert hasattr(model, "peft_config") == ("lora" in section)
    ids = AutoTokenizer.from_pretrained(run)("The rain fell on the town. " * 4, return_tensors="pt").input_ids
    assert sequence_nll(model, ids).isfinite().all()

"""The recipes of the three domains: at full size by their plans, their data by rows of its shape, and whole on tiny models
of the same architectures with the same chat templates."""

import importlib.util
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from eaftdrope.cli.recipes import shipped_recipes
from eaftdrope.recipe import load_recipe, make_recipe
from eaftdrope.run.memory import fits
from eaftdrope.run.plan import meta_model
from eaftdrope.run.settings import eaft_settings
from tests.run.full_size import MODELS
from tests.tiny_models import byte_tokenizer
from tests.tiny_run import train

SHIPPED = shipped_recipes()
DOMAINS = ("math", "medical", "tool_use")
QWEN, THINKING = "Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507"
GLM, QWEN32 = "zai-org/GLM-4-9B-0414", "Qwen/Qwen2.5-32B-Instruct"
LLAMA8, GEMMA = "meta-llama/Llama-3.1-8B-Instruct", "google/gemma-3-4b-it"
SMOLLM = "package:smollm2-135m-instruct"
# (domain, model): what the paper has
PAPER = [("math", QWEN), ("math", GLM), ("math", QWEN32), ("medical", THINKING), ("tool_use", QWEN)]


def header(name):
    """The lines of the recipe's header, without the marks of comments."""
    return [line.lstrip("# ") for line in SHIPPED[name].read_text(encoding="utf-8").split("\n\n")[0].splitlines()]


def command(name, label):
    """The overrides of the first command under a label of the header."""
    lines = header(name)
    lines = lines[next(n for n, line in enumerate(lines) if line.startswith(f"{label}:")) :]
    lines = lines[next(n for n, line in enumerate(lines) if f"eaftdrope train recipes/{name}.yaml" in line) :]
    last = next(n for n, line in enumerate(lines) if not line.endswith("\\"))
    words = shlex.split(" ".join(line.rstrip("\\") for line in lines[: last + 1]))
    return words[words.index(f"recipes/{name}.yaml") + 1 :]


def table(name):
    """model -> (GB of each of 8, 4, 2 and 1 GPUs for all weights, None: none is enough; GB of one for LoRA)."""
    rows = [line.split() for line in header(name)]
    rows = [
        row
        for row in rows
        if len(row) > 6 and "/" in row[0] and all(cell == "-" or cell.isdigit() for cell in row[1:6])
    ]
    return {row[0]: ([None if cell == "-" else int(cell) for cell in row[1:5]], int(row[5])) for row in rows}


def overrides_for(name, model):
    """What makes the recipe one for this model, as its header has it; of one for a CPU, what reads the data from the hub."""
    if model == THINKING:
        return command(name, "Thinking")
    text = " ".join(line.rstrip("\\ ") for line in header(name))
    return (
        [word.strip("'") for word in re.findall(r"'data\.\w+=[^']*'|data\.\w+=\S+", text)]
        if model == SMOLLM
        else [f"model={model}"]
    )


LARGE = [(name, model) for name in DOMAINS for model in table(name)]
SMALL_ONES = [(f"{name}_cpu", SMOLLM) for name in DOMAINS]


# ---- as they are ----


def test_the_table_has_the_models_of_the_tests():
    assert all(set(table(name)) == set(MODELS) - {SMOLLM} for name in DOMAINS)


@cache
def at_full_size(model, dtype, rank):
    """(configuration, model on meta) of a published model; rank 0 is without adapters."""
    config = MODELS[model][0]()
    recipe = make_recipe(
        {
            "model": {"reference": model, "dtype": dtype},
            "lora": {"r": rank} if rank else None,
            "data": {"train": "org/rows"},
            "output": {"dir": "runs/x"},
        }
    )
    return config, meta_model(recipe.model, recipe.lora, config)


@pytest.mark.parametrize(("name", "model"), LARGE)
def test_full_size_fits_the_hardware_of_the_table(name, model):
    """What the table states is the estimate, for the whole fine-tune and for LoRA."""
    full, lora = table(name)[model]
    for more, devices, expected in (([], (8, 4, 2, 1), full), (command(name, "LoRA"), (1,), [lora])):
        recipe = load_recipe(SHIPPED[name], [*overrides_for(name, model), *more])
        assert recipe.model.reference == model
        config, on_meta = at_full_size(model, recipe.model.dtype, recipe.lora.r if recipe.lora else 0)
        found = {fit.devices: fit.size for fit in fits(eaft_settings(recipe), config, on_meta, autocast=True)}
        assert [found[count] for count in devices] == expected


@pytest.mark.parametrize(("name", "model"), [*LARGE, *SMALL_ONES])
def test_full_and_lora(name, model):
    """The command line of the header makes it LoRA, with a rate that adapters take and the batch of the whole recipe."""
    chosen = overrides_for(name, model)
    full = load_recipe(SHIPPED[name], chosen)
    lora = load_recipe(SHIPPED[name], [*chosen, *command(name, "LoRA")])
    assert full.lora is None and full.model.dtype == "float32"
    assert lora.lora.target_modules == "all-linear" and lora.train.learning_rate > full.train.learning_rate
    devices = 1 if model == SMOLLM else 8
    rows = full.train.batch_size * full.train.accumulation * devices
    assert lora.train.batch_size * lora.train.accumulation == rows == (16 if model == SMOLLM else 64)


@pytest.mark.parametrize(("name", "model"), PAPER)
def test_the_hyper_parameters_of_the_paper(name, model):
    settings = command(name, "Paper") if name == "tool_use" else ["train.epochs=10"]
    text = " ".join(header(name))
    assert "train.epochs=10" in text and "table 4" in text and "means of 3 runs, no deviations" in text
    recipe = load_recipe(SHIPPED[name], [*overrides_for(name, model), *settings])
    train = recipe.train
    assert (train.learning_rate, train.scheduler, train.warmup_ratio, train.epochs) == (1e-5, "cosine", 0.03, 10)
    assert (recipe.data.max_length, 8 * train.batch_size * train.accumulation) == (16384, 64)
    assert (recipe.loss.gate, recipe.lora, train.optimizer) == ("eaft", None, "adamw_torch")


@pytest.mark.parametrize("name", DOMAINS)
def test_no_recipe_claims_a_run(name):
    assert "this recipe has not been run" in " ".join(header(name))
    assert load_recipe(SHIPPED[name]).train.epochs == 3


@pytest.mark.parametrize(("name", "model"), LARGE)
def test_the_domains_are_measured_alike(name, model):
    """The target by a probe of the domain (except where the model thinks first), general ability by the same probes; the
    header names the suite."""
    own = {"medical": "yes_no_maybe", "math": "numeric_answers", "tool_use": "function_calls"}[name]
    probes = load_recipe(SHIPPED[name], overrides_for(name, model)).probes
    target = [probe.name for probe in probes.target]
    assert target == ["held_out_loss", own] or (model == THINKING and target == ["held_out_loss"])
    assert [probe.name for probe in probes.general] == ["perplexity", "multiple_choice", "agreement", "instructions"]
    assert f"--suite {name},general," in " ".join(header(name))


@pytest.mark.parametrize(("name", "model"), SMALL_ONES)
def test_a_recipe_for_a_cpu_reads_nothing_from_a_network(name, model):
    recipe = load_recipe(SHIPPED[name])
    sources = [*recipe.data.train_sources(), *recipe.data.held_out_sources()]
    assert recipe.model.reference == model and all(source.path.startswith("package:") for source in sources)
    # the data from the hub that the header offers in its place
    assert (
        not load_recipe(SHIPPED[name], overrides_for(name, model)).data.train_sources()[0].path.startswith("package:")
    )


# ---- whole, on tiny models ----

TEMPLATES = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
# GLM-4-0414's: no tools, no end of a turn; the next turn's head is what stops it
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096}


def thinking_template():
    """Qwen3-Thinking-2507's differs from Qwen3's in that its generation prompt opens the reasoning."""
    text = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    head, _, tail = text.rpartition("{{- '<|im_start|>assistant\\n' }}")
    return head + "{{- '<|im_start|>assistant\\n<think>\\n' }}" + tail


def carried(name):
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


# model -> (its class, chat template, special tokens, the one that ends a turn)
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
KINDS = {
    QWEN: ("Qwen3", lambda: carried("qwen3_instruct_2507"), CHATML, "<|im_end|>"),
    THINKING: ("Qwen3", thinking_template, CHATML, "<|im_end|>"),
    QWEN32: ("Qwen2", lambda: carried("qwen2_5"), CHATML, "<|im_end|>"),
    GLM: ("Glm4", lambda: GLM4, ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"], "<|user|>"),
    LLAMA8: ("Llama", lambda: carried("llama3_1"), LLAMA, "<|eot_id|>"),
    GEMMA: ("Gemma3", lambda: carried("gemma3"), ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    SMOLLM: ("Llama", None, [], "<|im_end|>"),
}


def save_tiny(kind, folder):
    """A random model of the class, with a tokenizer that has the template's special tokens."""
    import torch
    import transformers

    name, template, specials, end = KINDS[kind]
    tokenizer = byte_tokenizer()
    if template:
        tokenizer.add_special_tokens({"additional_special_tokens": specials, "bos_token": specials[0]})
        tokenizer.chat_template = template()
    # of GLM's several, the one that no turn ends in
    tokenizer.eos_token = "<|end|>" if end == "<|user|>" else end
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": 1,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if name == "Gemma3":
        sight = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        sight |= {"image_size": 28, "patch_size": 14, "vision_use_head": False}
        text = {**SMALL, **tokens, "sliding_window": 32}
        config = transformers.Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4, **tokens)
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        config = getattr(transformers, f"{name}Config")(**SMALL, **tokens)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def published_rows(path):
    """Eight rows as the data set has them, for the part of it that a source of the recipe reads."""
    numbers = range(8)
    if path == "FreedomIntelligence/Medical-R1-Distill-Data":
        names = ("question", "reasoning (reasoning_content)", "response (content)")
        return [dict(zip(names, (f"Which drug, {n}?", f"Let us see, {n}.", f"Number {n}."))) for n in numbers]
    if path == "FreedomIntelligence/medical-o1-reasoning-SFT":
        return [{"Question": f"Why {n}?", "Complex_CoT": "Hmm.", "Response": f"It is {n}."} for n in numbers]
    if path == "qiaojin/PubMedQA":
        row = {"context": {"contexts": ["Ten rats."], "labels": ["METHODS"]}, "long_answer": "It does."}
        return [{**row, "question": f"Does {n} help?", "final_decision": ("yes", "no")[n % 2]} for n in numbers]
    if path in ("openai/gsm8k", "keivalya/MedQuad-MedicalQnADataset"):
        names = ("question", "answer") if path == "openai/gsm8k" else ("Question", "Answer")
        return [dict(zip(names, (f"{n} and 1?", f"{n} + 1 = {n + 1}\n#### {n + 1}"))) for n in numbers]
    if path in ("AI-MO/NuminaMath-CoT", "open-r1/OpenR1-Math-220k"):
        thought = "<think>\nAdd.\n</think>\n\n" if "R1" in path else ""
        return [
            {"problem": "p", "solution": "s", "messages": asked(f"{n}?", f"{thought}\\boxed{{{n}}}")} for n in numbers
        ]
    function = {"name": "add", "description": "Adds.", "parameters": {"x": {"type": "int", "description": "x"}}}
    if path == "Salesforce/xlam-function-calling-60k":
        calls = [[{"name": "add", "arguments": {"x": n}}] * (1 + n % 2) for n in numbers]
        return [
            {"query": f"Add {n}", "tools": json.dumps([function]), "answers": json.dumps(calls[n])} for n in numbers
        ]
    if path == "glaiveai/glaive-function-calling-v2":
        system = (
            f"SYSTEM: You are a helpful assistant with access to the following functions -\n{json.dumps(function)}\n"
        )
        call = """ASSISTANT: <functioncall> {"name": "add", "arguments": '{"x": 1}'} <|endoftext|>"""
        chat = f"\n\n\n{call}\n\n\nFUNCTION RESPONSE: 2\n\n\nASSISTANT: 2 <|endoftext|>"
        return [{"system": system, "chat": f"USER: Add {n}{chat}"} for n in numbers]
    assert path in ("nvidia/Nemotron-Agentic-v1", "package:bfcl"), path
    turn = {"role": "assistant", "content": None, "reasoning_content": "Add it."}
    call = {"id": "abc123456", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    tools = [{"type": "function", "function": {**function, "parameters": {"type": "object", "properties": {}}}}]
    calling = [{"role": "user", "content": "Add 1"}, {**turn, "tool_calls": [call]}]
    if path == "package:bfcl":
        return [{"messages": [calling[0], {"role": "assistant", "tool_calls": [call]}], "tools": tools}] * 4
    answered = [
        *calling,
        {"role": "tool", "tool_call_id": "abc123456", "content": "2"},
        {**turn, "content": "It is 2."},
    ]
    return [{"messages": answered, "tools": tools} for _ in numbers]


def asked(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def tiny_recipe(name, model, folder, *, lora=False):
    """The recipe for this model, as its header has it, with a tiny model and rows of the shape of its data; its gate,
    schedule, masks and probes as they are. Path and overrides."""
    recipe = load_recipe(SHIPPED[name], overrides_for(name, model))

    def local(source, key):
        file = folder / (re.sub(r"\W", "_", source.path) + f"_{key}.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in published_rows(source.path)), encoding="utf-8")
        return {"path": str(file), "reasoning": source.reasoning}

    def smaller(probe):
        options = {**probe.options.model_dump(exclude_unset=True), "limit": 2}
        return {probe.name: {key: 2 if key == "max_new_tokens" else value for key, value in options.items()}}

    held_out = [local(source, "held_out") for source in recipe.data.held_out_sources()]
    changes = {
        "model": {"reference": str(save_tiny(model, folder / "model")), "dtype": "float32"},
        "data.train": [local(source, "train") for source in recipe.data.train_sources()],
        "data.held_out": held_out or 0.25,
        "data.max_length": 2048,
        "train.epochs": None,
        "train.steps": 2,
        "train.accumulation": 1,
        "train.precision": "float32",
        "train.eval_every": None,
        "probes.target": [smaller(probe) for probe in recipe.probes.target],
        "probes.general": [],
        "output.dir": str(folder / "run"),
        **({"lora.r": 4, "train.learning_rate": 1e-4} if lora else {}),
    }
    return SHIPPED[name], [
        *overrides_for(name, model),
        *(f"{key}={json.dumps(value)}" for key, value in changes.items()),
    ]


# architectures and templates that need the most; the others are alike
QUICK = {("medical", THINKING): False, ("medical", GEMMA): False, ("math", GLM): False, ("tool_use", LLAMA8): True}


@pytest.mark.parametrize(
    ("case", "lora"),
    [
        *QUICK.items(),
        # each of the others once: whole for tool use and mathematics, LoRA for medical
        *(
            pytest.param(case, case[0] == "medical", marks=pytest.mark.slow)
            for case in [*LARGE, *SMALL_ONES]
            if case not in QUICK
        ),
        pytest.param(("medical", GEMMA), True, marks=pytest.mark.slow),
    ],
)
def test_a_recipe_runs_on_a_tiny_model_of_its_architecture(case, lora, tmp_path):
    from safetensors.torch import load_file

    name, model = case
    path, overrides = tiny_recipe(name, model, tmp_path, lora=lora)
    ended = train(path, *overrides)
    assert ended.code == 0, ended.out
    assert "stop token" not in ended.out
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    # Llama's template cannot hold two calls in a turn
    assert (int(re.search(r"(\d+) skipped", ended.out)[1]) > 0) == (case == ("tool_use", LLAMA8))
    after = json.loads((run / "probes_after.json").read_text())
    expected = load_recipe(path, overrides).probes.target
    assert {score["probe"] for score in after} == {probe.name for probe in expected}
    end = KINDS[model][3]
    tokenizer = byte_tokenizer().__class__.from_pretrained(run)
    stops = json.loads((run / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids(end) in (stops if isinstance(stops, list) else [stops])
    before, trained = load_file(tmp_path / "model" / "model.safetensors"), run / "model.safetensors"
    if lora:
        adapted = load_file(run / "adapter_model.safetensors")
        assert adapted and not any("vision" in key for key in adapted)
        return
    changed = {key for key, value in load_file(trained).items() if not value.equal(before[key])}
    assert any("layers.1." in key for key in changed)
    assert not any("vision" in key or "projector" in key for key in changed)

"""The recipes of the three domains: at full size by their plans, their data by rows of its shape, and whole on tiny models
of the same architectures with the same chat templates."""

import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from eaftdrope.cli.recipes import shipped_recipes
from eaftdrope.recipe import load_recipe, make_recipe
from eaftdrope.run.memory import fits
from eaftdrope.run.plan import meta_model
from tests.models import byte_tokenizer
from tests.run.full_size import MODELS
from tests.tiny_run import train

SHIPPED = shipped_recipes()
DOMAINS = ("medical", "math", "tool_use")
NAMES = [name for name in SHIPPED if name.startswith(DOMAINS)]
LARGE = [name for name in NAMES if "smollm2" not in name]
PAPER = ("math/qwen3_4b_instruct", "math/qwen2.5_32b", "math/glm4_9b", "medical/qwen3_4b_thinking")
PAPER += ("tool_use/qwen3_4b_instruct",)


def header(name):
    """The recipe's header as one text, without the marks of comments and line breaks."""
    lines = SHIPPED[name].read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return " ".join(line.lstrip("# ").rstrip("\\ ") for line in lines)


def adapters_of(name):
    """The overrides that the header gives for LoRA."""
    command = re.search(rf"LoRA: +eaftdrope train recipes/{re.escape(name)}\.yaml((?: [\w.]+=\S+)+)", header(name))
    return command[1].split()


# ---- as they are ----


@cache
def at_full_size(reference, overrides):
    """(configuration, model on meta) of a published model, as type and rank of the overrides have it."""
    config = MODELS[reference][0]()
    data = {"data": {"train": "org/rows"}, "output": {"dir": "runs/x"}}
    how = dict(override.split("=") for override in overrides)
    recipe = make_recipe(
        {
            "model": {"reference": reference, "dtype": how.get("model.dtype", "float32")},
            "lora": {"r": int(how["lora.r"])} if how else None,
            **data,
        }
    )
    return config, meta_model(recipe, config)


@pytest.mark.parametrize("name", LARGE)
def test_full_size_fits_the_hardware_it_names(name):
    """What the header says of GPUs is what the estimate says, of the whole fine-tune and of LoRA."""
    said = re.search(r"Hardware: (.*?) with LoRA 1 GPU of (\d+) GB\.", header(name))
    claims = {int(devices): int(size) for devices, size in re.findall(r"(\d) GPUs? of (\d+) GB", said[1])}
    for overrides, expected in (([], claims), (adapters_of(name), {1: int(said[2])})):
        recipe = load_recipe(SHIPPED[name], overrides)
        config, model = at_full_size(recipe.model.reference, tuple(overrides[:2]))
        found = {fit.devices: fit.size for fit in fits(recipe, config, model, autocast=True)}
        assert expected and {devices: found[devices] for devices in expected} == expected
        # nothing that would do is left unsaid, but a number of devices that needs the same size as twice as many
        unsaid = {n: size for n, size in found.items() if n not in expected and not recipe.lora}
        assert all(size is None or size == found[2 * n] for n, size in unsaid.items())


@pytest.mark.parametrize("name", NAMES)
def test_full_and_lora(name):
    """The command line of the header makes it LoRA, with a rate that adapters take and the batch of the whole recipe."""
    full, lora = load_recipe(SHIPPED[name]), load_recipe(SHIPPED[name], adapters_of(name))
    assert full.lora is None and full.model.dtype == "float32"
    assert lora.lora.target_modules == "all-linear" and lora.train.learning_rate > full.train.learning_rate
    devices = 8 if name in LARGE else 1
    rows = full.train.batch_size * full.train.accumulation * devices
    assert lora.train.batch_size * lora.train.accumulation == rows == (64 if name in LARGE else 16)


@pytest.mark.parametrize("name", PAPER)
def test_the_hyper_parameters_of_the_paper(name):
    recipe = load_recipe(SHIPPED[name])
    train = recipe.train
    assert (train.learning_rate, train.scheduler, train.warmup_ratio, train.epochs) == (1e-5, "cosine", 0.03, 10)
    assert (recipe.data.max_length, 8 * train.batch_size * train.accumulation) == (16384, 64)
    assert (recipe.loss.gate, recipe.lora, train.optimizer) == ("eaft", None, "adamw_torch")
    assert "table 4" in header(name) and "means of 3 runs, no deviations" in header(name)


def test_only_the_papers_settings_carry_its_name():
    for name in set(NAMES) - set(PAPER):
        assert "table 4" not in header(name)
        assert load_recipe(SHIPPED[name]).train.epochs <= 3
        assert re.search(r"not been run|not run by us", header(name))


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_domains_are_measured_alike(domain):
    """The target by a probe of the domain (but where the model thinks first), general ability by the same probes; the
    header names the suite."""
    own = {"medical": "yes_no_maybe", "math": "numeric_answers", "tool_use": "function_calls"}[domain]
    for name in (name for name in LARGE if name.startswith(domain)):
        probes = load_recipe(SHIPPED[name]).probes
        target = [probe.name for probe in probes.target]
        assert target == ["held_out_loss", own] or (name.endswith("thinking") and target[0] == "held_out_loss")
        assert [probe.name for probe in probes.general] == [
            "perplexity",
            "multiple_choice",
            "agreement",
            "instructions",
        ]
        assert f"--suite {domain},general," in header(name)


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


# part of the recipe's name -> (class of the model, chat template, special tokens, the one that ends a turn)
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
KINDS = {
    "qwen3_4b_instruct": ("Qwen3", lambda: carried("qwen3_instruct_2507"), CHATML, "<|im_end|>"),
    "qwen3_4b_thinking": ("Qwen3", thinking_template, CHATML, "<|im_end|>"),
    "qwen2.5_32b": ("Qwen2", lambda: carried("qwen2_5"), CHATML, "<|im_end|>"),
    "glm4_9b": ("Glm4", lambda: GLM4, ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"], "<|user|>"),
    "llama3.1_8b": ("Llama", lambda: carried("llama3_1"), LLAMA, "<|eot_id|>"),
    "gemma3_4b": ("Gemma3", lambda: carried("gemma3"), ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "smollm2_135m": ("Llama", None, [], "<|im_end|>"),
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


def tiny_recipe(name, folder, *, lora=False):
    """The recipe with a tiny model and rows of the shape of its data; its gate, schedule, masks and probes as they are."""
    data = yaml.safe_load(SHIPPED[name].read_text(encoding="utf-8"))

    def local(source, key):
        file = folder / (re.sub(r"\W", "_", source["path"]) + f"_{key}.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in published_rows(source["path"])), encoding="utf-8")
        return {key: value for key, value in source.items() if key in ("reasoning",)} | {"path": str(file)}

    section = data["data"]
    for key in ("train", "held_out"):
        sources = section[key] if isinstance(section[key], list) else [section[key]]
        section[key] = [local(source, key) for source in sources] if isinstance(sources[0], dict) else 0.25
    section["max_length"] = 2048
    data["model"] = {"reference": str(save_tiny(name.split("/")[1], folder / "model")), "dtype": "float32"}
    data["train"] |= {"epochs": None, "steps": 2, "accumulation": 1, "precision": "float32", "eval_every": None}
    data["probes"]["target"] = [
        probe if isinstance(probe, str) else {key: {**options, "limit": 2} for key, options in probe.items()}
        for probe in data["probes"]["target"]
    ]
    for probe in data["probes"]["target"]:
        for options in probe.values():
            if "max_new_tokens" in options:
                options["max_new_tokens"] = 2
    data["probes"]["general"] = []
    data["output"]["dir"] = str(folder / "run")
    if lora:
        data["lora"] = {"r": 4}
        data["train"]["learning_rate"] = 1e-4
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


# architectures and templates that need the most; the others are alike
QUICK = {
    "medical/qwen3_4b_thinking": False,
    "medical/gemma3_4b": False,
    "math/glm4_9b": False,
    "tool_use/llama3.1_8b": True,
}


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        *QUICK.items(),
        # each of the others once: whole for tool use and mathematics, LoRA for medical
        *(
            pytest.param(name, name.startswith("medical"), marks=pytest.mark.slow)
            for name in NAMES
            if name not in QUICK
        ),
        pytest.param("medical/gemma3_4b", True, marks=pytest.mark.slow),
    ],
)
def test_a_recipe_runs_on_a_tiny_model_of_its_architecture(name, lora, tmp_path):
    from safetensors.torch import load_file

    kind = name.split("/")[1]
    ended = train(tiny_recipe(name, tmp_path, lora=lora))
    assert ended.code == 0, ended.out
    assert "stop token" not in ended.out
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    # Llama's template cannot hold two calls in a turn
    assert (int(re.search(r"(\d+) skipped", ended.out)[1]) > 0) == (name == "tool_use/llama3.1_8b")
    after = json.loads((run / "probes_after.json").read_text())
    assert {score["probe"] for score in after} == {probe.name for probe in load_recipe(SHIPPED[name]).probes.target}
    end = KINDS[kind][3]
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

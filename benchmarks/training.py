"""Training speed of the quickstart: EAFT, the same trainer without a gate, and TRL's own SFTTrainer.

    python -m benchmarks.training --out training.json

All arms train the quickstart's model (LoRA) on the same rows in the same order, batch and precision, each in a process of
its own with an unmodified `trainer.train()`. They take turns step by step and the order rotates, so that a machine that
slows down slows all of them; the first step is not counted. Reported are the median over steps of each arm's tokens/s,
and of the ratio of two arms on the same step, by wall and by CPU time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from eaftdrope.run.machine import cpu_name

ARMS = ("eaft", "none", "trl")
_PACKAGES = ("eaftdrope", "torch", "transformers", "trl", "peft", "accelerate")


class Stopwatch(TrainerCallback):
    """Wait for the arm's turn before every step, and report the times of the step; runs in the arm's process."""

    def __init__(self, turns: Connection):
        self.turns = turns

    def on_step_begin(self, args, state, control, **kwargs):
        self.turns.send("ready")
        self.turns.recv()
        self.started = (time.perf_counter(), time.process_time())

    def on_step_end(self, args, state, control, **kwargs):
        wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        self.turns.send({"wall_seconds": wall, "cpu_seconds": cpu})


def make_trainer(arm: str, rows, tokenizer, model_path: str, folder: str, watch: Stopwatch, options) -> SFTTrainer:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from eaftdrope import EAFTConfig, EAFTTrainer

    arguments = dict(
        output_dir=folder,
        max_steps=options.steps + 1,
        per_device_train_batch_size=options.batch_size,
        learning_rate=5e-4,
        bf16=not options.float32,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=options.steps + 1,
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=0,
    )
    dtype = torch.float32 if options.float32 else torch.bfloat16
    config = SFTConfig(**arguments) if arm == "trl" else EAFTConfig(**arguments, gate=arm)
    return (SFTTrainer if arm == "trl" else EAFTTrainer)(
        AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype),
        config,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[watch],
    )


def train_arm(arm: str, turns: Connection, options) -> None:
    """Run the process of an arm: build the trainer, then run each step on its turn."""
    from eaftdrope.data import Source, build_dataset
    from eaftdrope.models import load_tokenizer, resolve_model

    tokenizer = load_tokenizer(options.model)
    rows, report = build_dataset([Source("package:bfcl")], tokenizer, max_length=1024)
    with tempfile.TemporaryDirectory() as folder:
        path = resolve_model(options.model).path
        trainer = make_trainer(arm, rows, tokenizer, path, folder, Stopwatch(turns), options)
        batches = iter(trainer.get_train_dataloader())
        tokens = [int(next(batches)["attention_mask"].sum()) for _ in range(options.steps + 1)]
        turns.send({"tokens": tokens, "trained_share": report.trained_tokens / report.tokens})
        trainer.train()


def run(options) -> tuple[dict[str, list[dict[str, float]]], dict]:
    """Return the times of every counted step by arm, and the facts about the data that all arms report alike."""
    spawn = multiprocessing.get_context("spawn")
    arms, facts = {}, []
    for arm in ARMS:
        arms[arm], theirs = spawn.Pipe()
        spawn.Process(target=train_arm, args=(arm, theirs, options), daemon=True).start()
        theirs.close()
        facts.append(arms[arm].recv())
    assert all(fact == facts[0] for fact in facts), "the arms do not see the same batches"
    times: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for step in range(options.steps + 1):
        first = step % len(ARMS)
        for arm in ARMS[first:] + ARMS[:first]:
            assert arms[arm].recv() == "ready"
            arms[arm].send("go")
            times[arm].append(arms[arm].recv())
            print(f"step {step} {arm:5} {times[arm][-1]['wall_seconds']:.2f} s", flush=True)
    facts[0]["tokens"] = facts[0]["tokens"][1:]
    return {arm: steps[1:] for arm, steps in times.items()}, facts[0]


def summary(times: dict[str, list[dict[str, float]]], tokens: list[int]) -> dict:
    """Return the median tokens/s of each arm, and median and quartiles over steps of each ratio."""
    result: dict = {"tokens_per_second": {}, "speed_ratio": {}}
    for arm, steps in times.items():
        speeds = [count / step["wall_seconds"] for count, step in zip(tokens, steps, strict=True)]
        result["tokens_per_second"][arm] = round(statistics.median(speeds), 1)
    for other in ("none", "trl"):
        for clock in ("wall_seconds", "cpu_seconds"):
            ratios = [theirs[clock] / ours[clock] for ours, theirs in zip(times["eaft"], times[other], strict=True)]
            low, median, high = statistics.quantiles(ratios, n=4)
            result["speed_ratio"][f"eaft / {other}, {clock.split('_')[0]}"] = {
                "median": round(median, 3),
                "quartiles": [round(low, 3), round(high, 3)],
            }
    return result


def main() -> None:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each arm")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--float32", action="store_true", help="float32 instead of bfloat16 weights and autocast")
    parser.add_argument("--model", default="package:smollm2-135m-instruct")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    times, facts = run(options)
    result = {
        "what": "LoRA r=16 on all linear layers, function-calling rows, tokens/s without padding",
        "model": options.model,
        "settings": {"steps": options.steps, "batch_size": options.batch_size, "bfloat16": not options.float32},
        "trained_share_of_tokens": round(facts["trained_share"], 3),
        "hardware": {"processor": cpu_name(), "threads": torch.get_num_threads(), "system": platform.system()},
        "versions": {name: version(name) for name in _PACKAGES},
        "summary": summary(times, facts["tokens"]),
        "tokens": facts["tokens"],
        "times": times,
    }
    print(json.dumps(result["summary"], indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

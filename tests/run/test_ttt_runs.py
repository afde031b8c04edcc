"""Whole runs of the stage ttt on a tiny random model: what is trained, saved and measured, alone and after other stages."""

import json
import shutil
import signal

import pytest
import yaml

from tests.tiny_run import hashes, make_staged_project, metrics, train, train_in_ranks

WINDOW, CHUNK, LENGTH = 32, 16, 96
# nats per token, float32 sums in other orders
CLOSE = 1e-5


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Model, text, chat rows, and ttt.yaml: four steps on blocks of text, without adapters."""
    folder = tmp_path_factory.mktemp("project")
    staged = yaml.safe_load(make_staged_project(folder).read_text())
    recipe = {
        "model": "model",
        "stages": ["ttt"],
        "ttt": {
            **{"window": WINDOW, "sink": 2, "chunk": CHUNK, "fast_blocks": 1},
            "data": {"train": "text.jsonl", "held_out": "held_out_text.jsonl", "max_length": LENGTH},
            "train": {**staged["recalibrate"]["train"], "batch_size": 2, "steps": 4, "save_every": 2},
            "probes": {"target": ["held_out_loss"], "general": []},
        },
        "output": {"dir": str(folder / "run")},
    }
    (folder / "ttt.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    # adapters of one stage, merged for the next, which trains its own
    after = {key: staged[key] for key in ("model", "data", "lora", "train", "probes")}
    after |= {"stages": ["eaft", "ttt"], "ttt": {**recipe["ttt"], "lora": {"r": 4}}, "output": recipe["output"]}
    after["ttt"]["probes"] = {"target": [], "general": []}
    (folder / "after.yaml").write_text(yaml.safe_dump(after, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory):
    """The finished run of ttt.yaml, and what was on the screen; no test may change it."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = train(project / "ttt.yaml", f"output.dir={run}")
    assert ended.code == 0, ended.out
    return run / "ttt", ended.out


@pytest.fixture(scope="module")
def chain(project, tmp_path_factory):
    """The finished run of after.yaml with its adapters merged; no test may change it."""
    run = tmp_path_factory.mktemp("chain") / "run"
    ended = train(project / "after.yaml", f"output.dir={run}", "output.merge=true")
    assert ended.code == 0, ended.out
    return run


def blocks_of(project, name):
    """The blocks of a file of text, cut as the documentation states it."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(project / "model")
    texts = [json.loads(line)["text"] for line in (project / name).read_text().splitlines()]
    ids = [token for text in texts for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    return torch.tensor([ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH + 1, LENGTH)])


def results(run):
    """Hashes of what a run leaves but for records with paths and times, and its logs without times."""
    left_out = ("README.md", "recipe.yaml", "run.json", "report.html", "adapter_config.json", "manifest.json")
    found = {name: value for name, value in hashes(run).items() if not name.endswith(left_out)}
    kept = {name: value for name, value in found.items() if "checkpoints/" not in name}
    return kept | {"metrics.jsonl": metrics(run)}


# ---- what is left ----


def test_what_the_stage_leaves(undisturbed):
    run, _ = undisturbed
    files = {path.name for path in run.iterdir()}
    assert files >= {"model.safetensors", "config.json", "ttt.safetensors", "ttt_config.json", "metrics.jsonl"}
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    settings = json.loads((run / "ttt_config.json").read_text())
    assert (settings["window"], settings["sink"], settings["chunk"], settings["horizon"]) == (WINDOW, 2, CHUNK, 1)
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        assert (run / "checkpoints" / checkpoint / "ttt.safetensors").is_file()


def test_the_result_is_a_stock_checkpoint_and_what_learns_was_trained(project, undisturbed):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    run, _ = undisturbed
    _, info = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, after = (load_file(folder / "model.safetensors") for folder in (project / "model", run))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(before)
    fast = load_file(run / "ttt.safetensors")
    # zero before the training
    assert fast["primes.0.down"].abs().max() > 0
    up = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(fast["primes.0.up"], before[up]) and not torch.equal(fast["primes.0.up"], after[up])


def test_the_probes_measure_the_model_as_it_learns(project, undisturbed):
    """Before: the model with fast MLPs that add nothing yet; after: the saved one. Both differ from the window alone."""
    from dataclasses import replace

    from transformers import AutoModelForCausalLM

    from eaftdrope.ttt import TTTConfig, apply_ttt, load_ttt, sequence_nll

    run, _ = undisturbed
    ids = blocks_of(project, "held_out_text.jsonl")
    new = AutoModelForCausalLM.from_pretrained(project / "model")
    config = TTTConfig(window=WINDOW, sink=2, chunk=CHUNK, fast_blocks=1)
    for when, model in {"before": apply_ttt(new, config), "after": load_ttt(run)}.items():
        (score,) = json.loads((run / f"probes_{when}.json").read_text())
        assert score["value"] == pytest.approx(sequence_nll(model, ids).mean().item(), abs=CLOSE)
        model.ttt.config = replace(model.ttt.config, lr=0.0)
        assert abs(score["value"] - sequence_nll(model, ids).mean().item()) > 100 * CLOSE


def test_the_loss_is_logged_by_position(undisturbed):
    """Bins of a chunk and then doubling; together they are the loss of the step."""
    run, _ = undisturbed
    tokens = {(0, 16): 16, (16, 32): 16, (32, 64): 32, (64, 128): LENGTH - 1 - 64}
    rows = metrics(run)
    assert len(rows) == 4
    for row in rows:
        found = {key: value for key, value in row.items() if key.startswith("position/")}
        assert list(found) == [f"position/nll_{start}_{end}" for start, end in tokens]
        mean = sum(value * count for value, count in zip(found.values(), tokens.values(), strict=True))
        assert mean / (LENGTH - 1) == pytest.approx(row["eaft/cross_entropy"], rel=1e-5)


def test_the_plan_and_the_card(undisturbed):
    run, out = undisturbed
    assert "learns        6,144 fast weights (18.6%) in the last 1 blocks, 6,176 parameters added\n" in out
    assert "              6 chunks per row of full length, 0 MB per row\n" in out
    assert "trained       33,088 parameters (100.00%), full fine-tune\n" in out
    card = (run / "README.md").read_text()
    assert "\n- ttt\n" in card and "\n- eaft\n" not in card
    assert "model = load_ttt(folder).eval()" in card
    assert "on blocks of text of 96 tokens; a window of 32 tokens and the first 2, chunks of 16" in card
    rows = metrics(run)
    first, last = (rows[at]["position/nll_32_64"] for at in (0, -1))
    assert f"| 32 to 63 | {first:.3f} | {last:.3f} |" in card


# ---- killed and started again ----


def test_a_killed_run_ends_the_same(project, undisturbed, tmp_path):
    """Bit-equal weights, fast MLPs and losses."""
    start = (project / "ttt.yaml", f"output.dir={tmp_path / 'run'}")
    assert train(*start, moment="in step 4, after a checkpoint").code == -signal.SIGKILL
    ended = train(*start)
    assert ended.code == 0, ended.out
    assert "resuming from checkpoint-2 of 4" in ended.out
    assert results(tmp_path / "run" / "ttt") == results(undisturbed[0])


@pytest.mark.kills
@pytest.mark.parametrize(
    ("moment", "resumed"),
    [
        ("in step 8", "resuming from checkpoint-2 of 4"),
        ("after the second training", "resuming from checkpoint-4 of 4"),
    ],
)
def test_a_killed_run_with_adapters_ends_the_same(project, chain, tmp_path, moment, resumed):
    """peft's files have no fast MLPs: they are restored from their own. The stage before is not run again."""
    start = (project / "after.yaml", f"output.dir={tmp_path / 'run'}", "output.merge=true")
    assert train(*start, moment=moment).code == -signal.SIGKILL
    ended = train(*start)
    assert ended.code == 0, ended.out
    assert f"eaft, finished in {tmp_path / 'run' / 'eaft'}" in " ".join(ended.out.split())
    assert resumed in ended.out
    assert results(tmp_path / "run" / "ttt") == results(chain / "ttt")


@pytest.mark.kills
def test_lost_fast_mlps_are_made_again_from_the_last_checkpoint(project, undisturbed, tmp_path):
    run = tmp_path / "run" / "ttt"
    shutil.copytree(undisturbed[0], run)
    (run / "ttt.safetensors").unlink()
    ended = train(project / "ttt.yaml", f"output.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.out
    assert f"{run} no longer has fast MLPs: made again from the last checkpoint" in " ".join(ended.out.split())
    assert results(run) == results(undisturbed[0])


def test_an_incomplete_result_is_reported(undisturbed, tmp_path):
    from safetensors.torch import load_file, save_file

    from eaftdrope.errors import UserError
    from eaftdrope.run.result import check_fast_mlps
    from eaftdrope.ttt import load_ttt

    run, _ = undisturbed
    model, file = load_ttt(run), tmp_path / "ttt.safetensors"
    with pytest.raises(UserError, match=r"ttt\.safetensors: No such file"):
        check_fast_mlps(tmp_path, model)
    shutil.copy(run / "ttt.safetensors", file)
    check_fast_mlps(tmp_path, model)
    save_file({name: tensor for name, tensor in load_file(file).items() if "down" not in name}, file)
    with pytest.raises(UserError, match=r"the weight primes\.0\.down is missing"):
        check_fast_mlps(tmp_path, model)


# ---- after another stage, with adapters ----


def test_adapters_of_the_stage_before_are_merged(chain):
    """Whatever the recipe sets for those of the last stage; the adapters of ttt are on the merged model."""
    assert (chain / "eaft" / "merged" / "model.safetensors").is_file()
    base = json.loads((chain / "ttt" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(chain / "eaft" / "merged")


def test_slow_weights_have_adapters_and_fast_ones_are_trained_whole(chain):
    import torch
    from safetensors.torch import load_file

    fast = load_file(chain / "ttt" / "ttt.safetensors")
    base = load_file(chain / "eaft" / "merged" / "model.safetensors")
    assert set(fast) == {f"primes.0.{name}" for name in ("gate", "up", "down", "norm.weight")}
    assert fast["primes.0.down"].abs().max() > 0
    assert not torch.equal(fast["primes.0.gate"], base["model.layers.1.mlp.gate_proj.weight"])
    adapters = load_file(chain / "ttt" / "adapter_model.safetensors")
    assert adapters and not any("ttt" in name for name in adapters)


def test_adapter_and_merged_model_are_the_same_model(project, chain):
    import torch

    from eaftdrope.ttt import load_ttt, sequence_nll

    ids = blocks_of(project, "held_out_text.jsonl")
    adapted, merged = (sequence_nll(load_ttt(chain / "ttt" / name), ids) for name in (".", "merged"))
    assert torch.allclose(adapted, merged, atol=1e-4)
    assert adapted[:, CHUNK:].std() > 0.1


def test_a_stage_without_adapters_is_not_merged_and_a_last_one_only_if_set(project, tmp_path):
    """The records of the stages hold what is merged, and load again."""
    from eaftdrope.recipe import load_recipe
    from eaftdrope.recipe.dump import dump_recipe
    from eaftdrope.run.stages.chain import open_stages

    for overrides, expected in {
        (): [True, False],
        ("output.merge=true",): [True, True],
        ("lora=null", "output.merge=true"): [False, True],
        ("ttt.lora=null",): [True, False],
    }.items():
        stages = open_stages(load_recipe(project / "after.yaml", [*overrides, f"output.dir={tmp_path / 'run'}"]))
        assert [stage.record.output.merge for stage in stages] == expected
        name = "eaft/merged" if "lora=null" not in overrides else "eaft"
        assert stages[1].model.reference == str(tmp_path / "run" / name)
        for stage in stages:
            (project / "again.yaml").write_text(dump_recipe(stage.record, folder=project))
            assert load_recipe(project / "again.yaml").model_dump(exclude={"output"}) == stage.record.model_dump(
                exclude={"output"}
            )


def test_a_model_that_learns_already_is_trained_further(undisturbed):
    """Its fast MLPs are those of the first training."""
    from dataclasses import replace

    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from eaftdrope.errors import UserError
    from eaftdrope.recipe.schema import Model
    from eaftdrope.run.build import learning_model
    from eaftdrope.ttt import TTTConfig

    run, _ = undisturbed
    section, saved = Model(reference=str(run)), load_file(run / "ttt.safetensors")
    config = TTTConfig(window=WINDOW, chunk=CHUNK, fast_blocks=1)
    model = learning_model(AutoModelForCausalLM.from_pretrained(run), section, config)
    found = model.ttt.state_dict()
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    with pytest.raises(UserError, match=r"learns as it reads already, with other settings: .* Set ttt\.layout and"):
        learning_model(AutoModelForCausalLM.from_pretrained(run), section, replace(config, fast_blocks=2))


def test_another_stage_would_lose_what_learns(project, undisturbed, tmp_path):
    from eaftdrope.errors import UserError
    from eaftdrope.recipe import load_recipe
    from eaftdrope.run.stages.chain import open_stages

    run, _ = undisturbed
    recipe = load_recipe(project / "recipe.yaml", [f"model={run}", f"output.dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"learns as it reads, and would be used here without that"):
        open_stages(recipe)[0].prepare(None)


# ---- conversations ----


def test_label_masks_act_on_the_training_loss_only(project, tmp_path):
    """The trained tokens are the assistant's, and the model has learned from all that it read before them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eaftdrope.ttt import TTTConfig, apply_ttt, sequence_nll

    chats = ("ttt.data={train: rows.jsonl, sequences: rows, max_length: 128}", "ttt.train.steps=1")
    ended = train(
        project / "ttt.yaml", f"output.dir={tmp_path / 'run'}", *chats, "ttt.train.batch_size=24", *_UNMEASURED
    )
    assert ended.code == 0, ended.out
    (row,) = metrics(tmp_path / "run" / "ttt")
    tokenizer = AutoTokenizer.from_pretrained(project / "model")
    model = AutoModelForCausalLM.from_pretrained(project / "model")
    apply_ttt(model, TTTConfig(window=WINDOW, sink=2, chunk=CHUNK, fast_blocks=1))
    total = count = 0
    for line in (project / "rows.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        asked = len(tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False))
        # the template writes a line break after the end of the turn, which is not trained
        nll = sequence_nll(model, torch.tensor([whole]))[0, asked - 1 : -1]
        total, count = total + nll.sum().item(), count + len(nll)
    assert row["eaft/trained_tokens"] == count
    assert row["loss"] == pytest.approx(total / count, abs=CLOSE)


_UNMEASURED = ("ttt.probes.target=[]", "ttt.probes.general=[]")


def test_rows_within_one_chunk_are_refused(project, tmp_path):
    chats = ("ttt.data={train: rows.jsonl, sequences: rows, max_length: 256}", "ttt.window=200", "ttt.chunk=200")
    ended = train(project / "ttt.yaml", f"output.dir={tmp_path / 'run'}", *chats, *_UNMEASURED, "--dry-run")
    assert ended.code == 2
    assert "the longest row has 59 tokens and a chunk has 200, so nothing learned would ever be used." in ended.out


# ---- several processes ----


@pytest.mark.parametrize("engine", [{"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}])
def test_sharded_weights_are_refused_before_anything_is_read(project, tmp_path, monkeypatch, engine):
    from eaftdrope.errors import UserError
    from eaftdrope.recipe import load_recipe
    from eaftdrope.run.stages.chain import open_stages

    for name, value in engine.items():
        monkeypatch.setenv(name, value)
    (stage,) = open_stages(load_recipe(project / "ttt.yaml", [f"output.dir={tmp_path / 'run'}"]))
    name = "FSDP" if "ACCELERATE_USE_FSDP" in engine else "DeepSpeed ZeRO-3"
    with pytest.raises(UserError, match=f"^{name} keeps a part of each weight on each process"):
        stage.prepare(None)


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["null", "{r: 4}"])
def test_two_processes(project, tmp_path, lora):
    """The losses of one process with the whole batch."""
    common = (project / "ttt.yaml", f"ttt.lora={lora}", *_UNMEASURED)
    ranks = train_in_ranks(*common, f"output.dir={tmp_path / 'two'}", "ttt.train.batch_size=1")
    assert [rank.code for rank in ranks] == [0, 0], ranks
    assert train(*common, f"output.dir={tmp_path / 'one'}").code == 0
    two, one = (metrics(tmp_path / name / "ttt") for name in ("two", "one"))
    for row, other in zip(two, one, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert row["position/nll_32_64"] == pytest.approx(other["position/nll_32_64"], abs=1e-3)

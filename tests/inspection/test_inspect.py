"""`eaftdrope inspect` on a model that was trained in the test on facts, over rows with planted mistakes and planted noise."""

import json
import shutil
import tracemalloc

import pytest
import torch
import yaml

from eaftdrope.cli import main
from eaftdrope.evaluate.likelihood import TokenRow
from eaftdrope.inspection.run import prepare_inspection
from eaftdrope.inspection.survey import Survey
from eaftdrope.inspection.tokens import measure_tokens
from eaftdrope.loss import token_statistics
from eaftdrope.loss.gates import EAFT
from eaftdrope.loss.landscape import Landscape
from eaftdrope.recipe import load_recipe
from tests.tiny_models import save_model

FACTS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "sun": "yellow", "blood": "red"}
NOISE = "Please subscribe to our newsletter for more answers like this."
BAD = {7: "white", 20: "red", 33: "yellow"}
NOISY = (10, 25, 26, 41)


def question(number):
    return f"{number}: what colour has {list(FACTS)[number % len(FACTS)]}?"


def chat(number, answer):
    turns = (("user", question(number)), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def truth(number):
    return f"It is {list(FACTS.values())[number % len(FACTS)]}."


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a model that knows the facts, two files of rows with the planted ones, and recipe.yaml."""
    folder = tmp_path_factory.mktemp("inspect")
    save_model(folder / "model")
    save(folder / "clean.jsonl", [chat(number, truth(number)) for number in range(60)])
    rows = [chat(number, f"It is {BAD[number]}." if number in BAD else truth(number)) for number in range(48)]
    for number in NOISY:
        rows[number] = chat(number, NOISE if number != 26 else NOISE.upper())
    save(folder / "first.jsonl", rows[:30])
    save(folder / "second.jsonl", rows[30:])
    recipe = {
        "model": "model",
        "data": {
            "train": [{"path": "first.jsonl", "weight": 2}, "second.jsonl"],
            "max_length": 128,
        },
        "train": {"precision": "float32"},
        "probes": {"target": [], "general": [], "batch_tokens": 600},
        "output": {"dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    teach(folder)
    return folder / "recipe.yaml"


def teach(folder):
    """Trains the model on the true rows until it knows them."""
    from transformers import AutoModelForCausalLM

    recipe = {"model": "model", "data": {"train": "clean.jsonl"}, "output": {"dir": "unused"}}
    (folder / "teach.yaml").write_text(yaml.safe_dump(recipe))
    rows = prepare_inspection(load_recipe(folder / "teach.yaml"), rows=None, on_policy=0).rows
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    length = max(map(len, rows["input_ids"]))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows["input_ids"]])
    labels = torch.tensor([row + [-100] * (length - len(row)) for row in rows["labels"]])
    for _ in range(120):
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    assert loss < 0.05, "the facts were not learnt, so there is nothing to contradict"
    model.save_pretrained(folder / "model")


def run(*arguments, capsys=None):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *map(str, arguments)])
    output = capsys.readouterr() if capsys else None
    return stop.value.code or 0, output and output.out + output.err


@pytest.fixture(scope="module")
def inspected(project, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "inspection"
    assert run(project, "--output", folder, "--on-policy", 4)[0] == 0
    return folder


def document_of(folder):
    return json.loads((folder / "inspect.json").read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def origin(number):
    return f"first.jsonl:{number + 1}" if number < 30 else f"second.jsonl:{number - 29}"


def test_planted_rows_are_on_top(inspected, project):
    rows = lines(inspected / "rows.jsonl")
    assert len(rows) == 48
    where = {row["origin"].removeprefix(f"{project.parent}/"): place for place, row in enumerate(rows)}
    by_origin = {row["origin"].removeprefix(f"{project.parent}/"): row for row in rows}
    planted = [*BAD, *NOISY]
    # all of the planted rows come before every other one
    assert sorted(where[origin(number)] for number in planted) == list(range(len(planted)))
    for number in BAD:
        row = by_origin[origin(number)]
        assert row["conflicts"] > 0 and row["duplicates"] == 0 and BAD[number] in row["text"]
    assert [by_origin[origin(number)]["duplicates"] for number in NOISY] == [3] * 4
    assert by_origin[origin(NOISY[0])]["because_of"] == "copies"
    # the mixture takes first.jsonl twice: that is not a copy
    assert all(
        row["duplicates"] == 0 for row in rows if row["origin"] not in {by_origin[origin(n)]["origin"] for n in NOISY}
    )


def test_the_conflicts_are_the_planted_ones(inspected):
    conflicts = lines(inspected / "conflicts.jsonl")
    document = document_of(inspected)
    assert conflicts[: len(document["conflicts"])] == document["conflicts"]
    assert (
        document["conflicts_seen"] == document["conflicts_kept"] == len(conflicts) == document["landscape"]["conflicts"]
    )
    # the colour's first letter, where the model is sure of another
    wrong = [one for one in conflicts if one["before"].endswith("assistant\nIt is ") and one["label"] in "wry"]
    for number, colour in BAD.items():
        (one,) = [
            one
            for one in wrong
            if one["before"].endswith(f"{question(number)}<|im_end|>\n<|im_start|>assistant\nIt is ")
        ]
        assert one["label"] == colour[0] and one["predicted"] == truth(number)[len("It is ")]
        assert one["probability"] < 0.1 and one["entropy"] < 0.5 and one["predicted_probability"] > 0.8
        assert one["after"].startswith(colour[1:])
    assert [one["nll"] for one in conflicts] == sorted((one["nll"] for one in conflicts), reverse=True)


def test_the_sums_are_those_of_the_full_logits(inspected, project):
    """Every number from a plain loop over the rows in float64."""
    from transformers import AutoModelForCausalLM

    found = document_of(inspected)
    inspection = prepare_inspection(load_recipe(project), rows=None, on_policy=0)
    model = AutoModelForCausalLM.from_pretrained(project.parent / "model").double()
    stats, norms, places, sources = [], [], [], []
    for row in inspection.rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        trained = labels[1:] != -100
        logits = model(input_ids=ids[None]).logits[0, :-1][trained].detach()
        stats.append(token_statistics(logits, labels[1:][trained]))
        norms.append((logits.softmax(-1) - torch.nn.functional.one_hot(labels[1:][trained], 260)).norm(dim=-1))
        places.append(torch.arange(1, len(logits) + 1))
        sources += [row["source"]] * len(logits)
    joined = {
        name: torch.cat([getattr(one, name) for one in stats]) for name in ("nll", "entropy", "topk_entropy", "correct")
    }
    whole = stats[0].__class__(**joined, vocab_size=260)
    gate, norm, place, source = EAFT()(whole), torch.cat(norms), torch.cat(places), torch.tensor(sources)
    landscape = Landscape.of(whole, gate).to_dict()
    difference = (torch.tensor(landscape["density"]) - torch.tensor(found["landscape"]["density"])).abs().sum()
    # a token at a border may fall to either side in float32
    assert difference <= 4 and found["tokens"] == landscape["tokens"] == len(place)
    assert found["rows"] == 48
    means = {
        "nll": whole.nll,
        "entropy": whole.entropy,
        "gate": gate,
        "conflict_share": whole.conflict,
        "accuracy": whole.correct,
    }
    assert found["summary"] == {
        name: pytest.approx(value.double().mean().item(), rel=1e-4) for name, value in means.items()
    }

    low, unlikely = whole.entropy < 0.5, whole.probability < 0.1
    for one, inside in zip(
        found["quadrants"], (low & unlikely, low & ~unlikely, ~low & unlikely, ~low & ~unlikely), strict=True
    ):
        assert one["tokens"] == pytest.approx(inside.double().mean().item(), abs=1e-9)
        assert one["gradient"] == pytest.approx((norm[inside].sum() / norm.sum()).item(), rel=1e-3, abs=1e-6)
        gated = (norm * gate)[inside].sum() / (norm * gate).sum()
        assert one["gated_gradient"] == pytest.approx(gated.item(), rel=1e-3, abs=1e-6)
    for entries, groups in (
        (found["positions"], [(place >= e["from"]) & (place <= e["to"]) for e in found["positions"]]),
        (found["sources"], [source == 0, source == 1]),
    ):
        assert sum(entry["tokens"] for entry in entries) == len(place)
        for entry, inside in zip(entries, groups, strict=True):
            assert entry["tokens"] == inside.sum()
            assert entry["gate"] == pytest.approx(gate[inside].mean().item(), rel=1e-4)
            assert entry["nll"] == pytest.approx(whole.nll[inside].mean().item(), rel=1e-4)
            assert entry["conflict_share"] == pytest.approx(whole.conflict[inside].double().mean().item())
    assert [entry["from"] for entry in found["positions"]][:3] == [1, 2, 4]
    assert [entry["rows"] for entry in found["sources"]] == [30, 18]


def test_the_rest_of_the_document(inspected, project):
    found = document_of(inspected)
    assert found["kind"] == "inspect" and found["model"] == str(project.parent / "model")
    assert set(found["about"]) == {"date", "device", "versions"} and found["command"].startswith("eaftdrope ")
    assert yaml.safe_load(found["recipe"])["probes"]["batch_tokens"] == 600
    # text of its own surprises the model less than the planted rows do
    assert 0 < found["on_policy"]["tokens"] <= 4 * 128
    assert found["on_policy"]["landscape"]["tokens"] == found["on_policy"]["tokens"]
    assert found["on_policy"]["summary"]["nll"] < found["summary"]["nll"]
    assert {one["label"] for one in found["common_conflicts"]}
    assert (inspected / "report.html").is_file()


def test_some_rows_and_a_second_look_at_the_same_folder(project, tmp_path, capsys):
    folder = tmp_path / "out"
    code, output = run(project, "--output", folder, "--rows", 12, capsys=capsys)
    assert code == 0 and "rows       12 with" in output and "confident conflict" in output
    first = document_of(folder)
    assert first["rows"] == 12 and first["on_policy"] is None
    before = (folder / "inspect.json").read_bytes()
    code, output = run(project, "--output", folder, capsys=capsys)
    assert code == 2 and f"{folder} holds an inspection. Nothing was changed" in output and "--overwrite" in output
    assert (folder / "inspect.json").read_bytes() == before
    assert run(project, "--output", folder, "--rows", 6, "--overwrite", capsys=capsys)[0] == 0
    assert document_of(folder)["rows"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_gate_that_compares_tokens_is_noted(project, tmp_path, capsys):
    code, output = run(project, "loss.gate=conflict-mask", "--output", tmp_path / "out", "--dry-run", capsys=capsys)
    assert code == 0 and "conflict-mask compares tokens with each other: here, those of a batch" in output
    assert list(tmp_path.iterdir()) == []


def test_the_backend_and_the_tile_of_the_recipe_are_used(project, tmp_path, capsys, monkeypatch):
    """In the pass over the rows and in that over the sampled text."""
    used = []

    def measured(*arguments, **options):
        used.append((options["backend"], options["tile_bytes"]))
        return measure_tokens(*arguments, **options)

    for module in ("survey", "on_policy"):
        monkeypatch.setattr(f"eaftdrope.inspection.{module}.measure_tokens", measured)
    options = ("loss.backend=torch", "loss.tile_mb=3", "--rows", 4, "--on-policy", 2, "--output", tmp_path / "out")
    code, output = run(project, *options, capsys=capsys)
    assert code == 0, output
    assert len(used) >= 2 and set(used) == {("torch", 3 << 20)}


def test_dry_run_loads_no_weights_and_writes_nothing(project, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "project"
    shutil.copytree(project.parent, copy)
    (copy / "model" / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    code, output = run(copy / "recipe.yaml", "--dry-run", "--on-policy", 3, capsys=capsys)
    assert code == 0, output
    assert "48 with" in output and "3 prompts answered by the model itself" in output
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def test_interrupted_leaves_nothing(project, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("eaftdrope.inspection.survey.measure_tokens", interrupted)
    code, output = run(project, "--output", tmp_path / "out", capsys=capsys)
    assert code == 130 and "Interrupted" in output
    assert list(tmp_path.iterdir()) == []


def test_a_stranger_folder_is_left_alone(project, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    code, output = run(project, "--output", tmp_path, "--overwrite", capsys=capsys)
    assert code == 2 and "does not contain inspect.json" in output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_rows_without_a_prompt_have_no_contrast(project, tmp_path, capsys):
    save(tmp_path / "text.jsonl", [{"text": f"The {noun} is {colour}."} for noun, colour in FACTS.items()])
    arguments = (project, f"data.train={tmp_path / 'text.jsonl'}", "--output", tmp_path / "out")
    code, output = run(*arguments, "--on-policy", 2, capsys=capsys)
    assert code == 2 and "--on-policy needs rows with a prompt before their trained tokens" in output
    assert not (tmp_path / "out").exists()
    assert run(*arguments, capsys=capsys)[0] == 0


def test_a_recipe_that_trains_on_no_rows(project, tmp_path, capsys):
    recipe = {
        "model": str(project.parent / "model"),
        "stages": ["drope"],
        "drope": {"max_length": 1024},
        "output": {"dir": str(tmp_path / "run")},
    }
    path = tmp_path / "drope.yaml"
    path.write_text(yaml.safe_dump(recipe))
    code, output = run(path, capsys=capsys)
    assert code == 2 and "which this recipe does not have: its stages are drope" in output


def test_memory_does_not_grow_with_the_rows(project, monkeypatch):
    """A row costs its 40 bytes of figures; all else is of the size of a window."""
    from transformers import AutoModelForCausalLM

    from eaftdrope.loss.gates import resolve_gate

    inspection = prepare_inspection(load_recipe(project), rows=None, on_policy=0)
    model = AutoModelForCausalLM.from_pretrained(project.parent / "model").eval()

    def peak(count):
        rows = inspection.rows.select([number % 48 for number in range(count)])
        tracemalloc.start()
        Survey(rows, inspection.sources, conflicts=50).run(
            model, inspection.tokenizer, resolve_gate("eaft"), batch_tokens=4096
        )
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return memory

    monkeypatch.setattr("eaftdrope.inspection.survey._WINDOW", 32)
    peak(96)
    few, many = peak(96), peak(960)
    assert many - few < 864 * 100, (few, many)


def test_a_window_is_read_once_and_in_order(project):
    inspection = prepare_inspection(load_recipe(project), rows=None, on_policy=0)
    survey = Survey(inspection.rows, inspection.sources, conflicts=1)
    numbers = []
    for batch, rows, sources in survey._batches(600):
        for number, row, source in zip(batch, rows, sources, strict=True):
            numbers.append(number)
            expected, _, of = survey.row(number)
            assert row == TokenRow(expected.input_ids, expected.labels) and source == of
    assert sorted(numbers) == list(range(48))

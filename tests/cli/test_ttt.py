"""`eaftdrope ttt read` and `ask` on a tiny model: states that continue, an interrupt, refusals before anything is loaded."""

import os

import pytest
import torch

from eaftdrope.cli import main
from eaftdrope.ttt import TTTState, reading
from eaftdrope.ttt.loading import TTTSource, find_ttt
from tests.tiny_models import save_model

NAIVE = ["--window", "16", "--chunk", "8", "--device", "cpu"]
TEXT = "".join(f"Sentence {number} is here. " for number in range(12))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_LEAST_PIECE", 80)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def run(*arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ttt", *(str(argument) for argument in arguments)])
    output = capsys.readouterr()
    return stop.value.code or 0, output.out, output.err


def loaded(model, file):
    source = find_ttt(str(model), {}, file)
    return source.state(source.load("float32", "cpu"), file)


def same(one: TTTState, other: TTTState) -> bool:
    pairs = zip([*one.delta, one.hidden], [*other.delta, other.hidden], strict=True)
    return one.position == other.position and all((a - b).abs().max() < 1e-6 for a, b in pairs)


def test_read_prints_progress_and_keeps_a_state(model, text, tmp_path, capsys):
    file = tmp_path / "state.safetensors"
    code, out, err = run("read", model, text, "--save", file, *NAIVE, capsys=capsys)
    assert (code, err) == (0, "")
    first, *lines = out.splitlines()
    assert first.startswith(f"{model}: naive TTT (no ttt_config.json")
    assert "lr 0.3, chunk 8, window 16 + 4, the last quarter of the blocks (prime)" in first
    progress = [line for line in lines if "tokens/s" in line]
    total = len(TEXT)
    assert [line.split(" tokens,")[0] for line in progress] == [
        f"{min(total, 80 * (number + 1) + 1)} of {total}" for number in range(-(-(total - 1) // 80))
    ]
    assert progress[-1].endswith(f"{(total - 1) // 8} chunks learned")
    assert any(line.startswith("0 to 128") for line in lines)
    assert "keep it as private as the text" in " ".join(lines)
    assert os.stat(file).st_mode & 0o077 == 0
    state = loaded(model, file)
    assert (state.position, state.updates) == (total, (total - 1) // 8)


def test_reading_continues_from_a_state(model, text, tmp_path, capsys):
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    run("read", model, text, "--save", whole, *NAIVE, capsys=capsys)
    (tmp_path / "begin.txt").write_text(TEXT[:100])
    run("read", model, tmp_path / "begin.txt", "--save", part, *NAIVE, capsys=capsys)
    # the same file may be continued and replaced; its settings need not be repeated
    code, _, err = run("read", model, text, "--state", part, "--save", part, "--skip", 100, capsys=capsys)
    assert (code, err) == (0, "")
    assert same(loaded(model, part), loaded(model, whole))


def test_an_interrupt_keeps_the_last_complete_piece(model, text, tmp_path, capsys, monkeypatch):
    file, whole = tmp_path / "state.safetensors", tmp_path / "whole.safetensors"
    calls, token_losses = [], reading.token_losses

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return token_losses(*arguments)

    monkeypatch.setattr(reading, "token_losses", interrupted)
    code, out, err = run("read", model, text, "--save", file, *NAIVE, capsys=capsys)
    assert code == 130 and "Interrupted." in err
    assert f"Interrupted after 161 of {len(TEXT)} tokens." in out
    assert f"To read the rest: --state {file} --skip 161" in " ".join(out.split())
    assert loaded(model, file).position == 161
    monkeypatch.setattr(reading, "token_losses", token_losses)
    run("read", model, text, "--state", file, "--save", file, "--skip", 161, capsys=capsys)
    run("read", model, text, "--save", whole, *NAIVE, capsys=capsys)
    assert same(loaded(model, file), loaded(model, whole))


def test_an_interrupt_before_the_first_piece_saves_nothing(model, text, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reading, "token_losses", interrupted)
    code, out, _ = run("read", model, text, "--save", tmp_path / "state.safetensors", *NAIVE, capsys=capsys)
    assert code == 130
    assert "Interrupted before the first piece was read; nothing is saved." in out
    assert not (tmp_path / "state.safetensors").exists()


def test_a_text_shorter_than_a_chunk_teaches_nothing(model, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short")
    code, out, _ = run("read", model, tmp_path / "short.txt", *NAIVE, capsys=capsys)
    assert code == 0
    assert "note: nothing was learned yet: the first chunk of 8 tokens" in " ".join(out.split())


def test_ask_answers_after_what_was_read_and_leaves_the_state(model, text, tmp_path, capsys):
    file, after = tmp_path / "state.safetensors", tmp_path / "after.safetensors"
    run("read", model, text, "--save", file, *NAIVE, capsys=capsys)
    before = file.read_bytes()
    question = ["ask", model, "Sent", "--raw", "--max-new-tokens", 12, "--device", "cpu"]
    code, out, err = run(*question, "--state", file, "--save", after, capsys=capsys)
    assert code == 0 and "naive TTT" in err
    assert file.read_bytes() == before
    # teacher-forced: the state holds the text, the question and all of the answer
    source = find_ttt(str(model), {}, file)
    reader, tokenizer = source.load("float32", "cpu"), source.tokenizer()
    state, ids = source.state(reader, file), tokenizer("Sent").input_ids
    answer = []
    with torch.no_grad():
        while len(answer) < 12:
            new = torch.tensor([ids if not answer else answer[-1:]])
            answer.append(reader(new, past_key_values=state, use_cache=True).logits[0, -1].argmax().item())
    assert out.rstrip("\n") == tokenizer.decode(answer, skip_special_tokens=True).rstrip("\n")
    assert loaded(model, after).position == len(TEXT) + 4 + 12
    # and the answer depends on what was read
    assert run(*question, *NAIVE, capsys=capsys)[1] != out


def test_ask_uses_the_chat_template_and_draws_with_a_seed(model, capsys):
    ask = ["ask", model, "Hello", "--max-new-tokens", 8, *NAIVE]
    assert run(*ask, capsys=capsys)[1] != run(*ask, "--raw", capsys=capsys)[1]
    drawn = [run(*ask, "--temperature", 1.5, "--seed", seed, capsys=capsys)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_everything_is_refused_before_anything_is_loaded(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TTTSource, "load", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "there.safetensors").write_text("something")
    code, _, err = run(
        *("read", model, tmp_path / "none.txt", "--save", tmp_path / "text.txt" / "state"),
        *("--state", tmp_path / "none.safetensors", "--device", "gpu"),
        capsys=capsys,
    )
    assert code == 2 and err.startswith("4 problems:")
    for part in ("none.txt: no such file", "none.safetensors: no such file", "--device gpu: unknown device"):
        assert part in err
    assert f"{tmp_path / 'text.txt'} is a file" in err
    for arguments, message in [
        (["--save", tmp_path], "is a folder. Pass the name of a file"),
        (["--save", tmp_path / "there.safetensors"], "exists already. Choose another file, or pass --overwrite"),
        (["--state", tmp_path / "there.safetensors"], "damaged or not a safetensors file"),
        (["--skip", "100000"], "--skip 100,000 leaves nothing to read"),
        (["--window", "4"], "chunk=512 with window=4"),
    ]:
        code, _, err = run("read", model, tmp_path / "text.txt", *arguments, capsys=capsys)
        assert code == 2 and message in err, err
    code, _, err = run("ask", model, " ", capsys=capsys)
    assert code == 2 and "the question is empty" in err

"""Runs of 30 sub-calls that are killed with SIGKILL at random points, until one ends. Each is a process of its own.

    python -m tests.rlm.killed KILLS SEED FOLDER      prints a line of JSON per run; FOLDER/whole has one that was not killed

A kill comes before or after a line of the journal is written, in the middle of one, or around a call of a model. The process
that forks has no sandbox and so no threads.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

from eaftdrope.rlm import RLM, Limits, calls
from eaftdrope.rlm.models import ScriptedModel

SLICE = 4
CONTEXT = [f"part {number}" for number in range(30)]
CELLS = [
    "first = llm_query_batched(context[:14])",
    "second = [llm_query(part) for part in context[14:17]]\nprint(second)",
    "third = llm_query_batched(context[17:])\nprint(len(third))",
    "answer['content'] = ' '.join(first + second + third)\nanswer['ready'] = True",
]


class Killer:
    """Counts steps, and kills this process at one of them."""

    def __init__(self, step):
        self.left = step

    def step(self):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def around(self, file):
        """The journal's file; a line may be cut."""
        killer = self

        class Cutting:
            def write(self, line):
                killer.step()
                file.write(line[: len(line) // 2])
                file.flush()
                killer.step()
                file.write(line[len(line) // 2 :])

            def flush(self):
                file.flush()
                killer.step()

            def close(self):
                file.close()

        return Cutting()


class Logged(ScriptedModel):
    """A model that writes each of its calls to a file before it answers."""

    def __init__(self, replies, name, log, killer):
        super().__init__(replies, name)
        self._log, self._killer = log, killer

    def generate(self, batch, max_tokens):
        for messages in batch:
            with self._log.open("a") as file:
                file.write(json.dumps([self.name, messages[-1]["content"][:20], len(messages)]) + "\n")
            self._killer.step()
        return super().generate(batch, max_tokens)


def complete(folder, step):
    """A run in this process, killed at a step; -1: not killed."""
    killer, log = Killer(step), folder / "calls"
    calls.SLICE = SLICE

    def root(messages):
        return f"```repl\n{CELLS[len(messages) // 2 - 1]}\n```"

    opened = Path.open

    def opening(path, mode="r", **options):
        file = opened(path, mode, **options)
        return killer.around(file) if path.name == "journal" and mode == "a" else file

    Path.open = opening
    sub = Logged(lambda messages: messages[0]["content"].upper(), "sub", log, killer)
    rlm = RLM(Logged(root, "root", log, killer), sub, limits=Limits(sub_calls=30))
    result = rlm.complete(CONTEXT, "All in capitals?", journal=folder / "journal")
    (folder / "result").write_text(json.dumps([result.answer, result.messages]))


def forked(folder, step):
    """Whether the run came to its end."""
    process = os.fork()
    if process == 0:
        complete(folder, step)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    return status == 0


def main(kills, seed, folder):
    whole = Path(folder, "whole")
    whole.mkdir()
    assert forked(whole, -1)
    draw = random.Random(seed)
    number = done = 0
    while done < kills:
        run = Path(folder, str(number))
        run.mkdir()
        killed = 0
        # a whole run has about 160 steps
        while done + killed < kills and killed < 4 and not forked(run, draw.randrange(120)):
            killed += 1
        if not (run / "result").exists():
            assert forked(run, -1)
        done, number = done + killed, number + 1
        calls = (run / "calls").read_text().splitlines()
        print(json.dumps([killed, len(calls) - len(set(calls)), len(set(calls)), str(run)]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

"""Journals and benches of recursive language models, made by the engine with scripted models, with hostile texts."""

from __future__ import annotations

import json
from pathlib import Path

from eaftdrope.evaluate.rlm.plan import BenchOptions, make_plan
from eaftdrope.evaluate.rlm.results import BenchResults
from eaftdrope.evaluate.rlm.run import run_plan
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.models import ScriptedModel
from eaftdrope.rlm.tasks.task import NAMES
from tests.report.planted import ABOUT, ARABIC, LONG, NASTY, write

BREAKOUT = "</pre></details></script><script>alert('x')</script><!--"
# ends right-to-left text, swaps what follows, controls a terminal
CONTROLS = "\x1b[31mred\x00\x85 \u202egnihton\u2066"
QUERY = f"What is {NASTY} here?"
REPLIES = [
    f"First I look. {BREAKOUT} {CONTROLS}\n```repl\nprint(len(context), context[:40])\n```",
    f"```repl\n# {BREAKOUT} {CONTROLS}\nprint(contxt)\n```",
    f"```repl\nprint(repr({LONG!r}))\nparts = llm_query_batched([p for p in context.split('|')])\nprint(parts[0])\n```",
    "I think.",
    "```repl\nfound = rlm_query('part of it', context[:900])\nprint(found)\n```",
    f"```repl\nanswer['content'] = {BREAKOUT + ARABIC + CONTROLS!r}\nanswer['ready'] = True\n```",
]
CHILD = """```repl
print(llm_query('a part: ' + context[:10]))
answer['content'] = 'of the child'
answer['ready'] = True
```"""


def journal(path: Path, *, parts: int = 30, replies: list[str] = REPLIES, text: str | None = None) -> Path:
    """The journal of a run with every kind of turn; `parts` sub-calls in one batch."""
    left = iter(replies)

    def answer(messages: list[dict[str, str]]) -> str:
        return CHILD if "part of it" in messages[1]["content"] else next(left)

    context = "|".join(text or f"{number} {BREAKOUT}" for number in range(parts))
    sub_model = ScriptedModel(lambda messages: f"noted <b>{messages[-1]['content'][:60]}</b> {CONTROLS}", name="small")
    limits = Limits(depth=2, sub_calls=parts + 10, tokens=10**9)
    RLM(ScriptedModel(answer, name=NASTY, window=10**6), sub_model, limits=limits).complete(
        context, QUERY, journal=path
    )
    return path


FIND = """```repl
import re
answer["content"] = re.findall(r"magic number for {key} is (\\d+)", context)[0]
answer["ready"] = True
```"""


def bench_folder(folder: Path) -> Path:
    """Two tasks at two lengths under every arm: the root finds short needles with code, and answers the rest from nowhere."""
    options = BenchOptions(model="tiny", tasks=("needle", "count"), lengths="1k,4k", trials=4, endpoint="a server")
    plan = make_plan(options)
    results = BenchResults(folder, plan)
    results.begin(ABOUT, f"eaftdrope rlm bench {NASTY}")

    def answer(messages: list[dict[str, str]]) -> str:
        if len(messages) == 1:
            return "5"
        query = messages[-1]["content"].split("\n")[0]
        # questions of counts are about records with a label
        asks_number = "record" not in query and "label" not in query
        key = next((name for name in NAMES["test"] if name in query and asks_number), None)
        return FIND.replace("{key}", key) if key else "FINAL(5)"

    scripted = ScriptedModel(answer, name="tiny", window=1_000)
    run_plan(plan, results, models=(scripted, scripted))
    return folder


def runs_folder(folder: Path) -> Path:
    """Three journals, one of them of a run that was killed, and a file that is no journal."""
    journal(folder / "whole.jsonl")
    journal(folder / "short.jsonl", replies=["FINAL(it)"])
    lines = (folder / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "killed.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:20])
    write(folder / "rows.jsonl", {"messages": []})
    return folder


def many_calls(path: Path, calls: int) -> Path:
    """A journal with so many sub-calls in one block, written without running them."""
    lines = path.read_text().rstrip("\n").split("\n")
    number = next(n for n, line in enumerate(lines) if '"place": "root.sub"' in line)
    one = json.loads(lines[number])
    more = [json.dumps({**one, "key": str(n), "prompt": f"part {n} {BREAKOUT * 20}"}) for n in range(calls)]
    path.write_text("\n".join([*lines[:number], *more, *lines[number:]]) + "\n")
    return path


RLM_FOLDERS = {
    "rlm run": lambda folder: journal(folder / "run.jsonl"),
    "rlm runs": runs_folder,
    "rlm bench": bench_folder,
}

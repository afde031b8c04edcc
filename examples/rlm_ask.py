# /// script
# requires-python = ">=3.11"
# dependencies = ["eaftdrope[rlm]"]
#
# [tool.uv]
# constraint-dependencies = ["torch==2.13.0"]
#
# [tool.uv.sources]
# eaftdrope = { path = "..", editable = true }
# ///
"""A recursive language model over a text that it never reads whole. The models are scripted: no weights are needed.

uv run examples/rlm_ask.py        about two seconds on a CPU

Replace `root` and `sub_model` by `eaftdrope.open_chat_model("Qwen/Qwen3-4B")` for real ones.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from eaftdrope.report.page import write_report
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.models import ScriptedModel

LOOK = """The context is long, so I look at its end first.
```repl
print(len(context), context[-40:])
```"""
MAP = """One line per shipment. I ask about the lines that mention damage, all at once.
```repl
from collections import Counter
damaged = [line for line in context.splitlines() if "damaged" in line]
replies = llm_query_batched([f"Which port? Reply with its name only.\\n{line}" for line in damaged])
answer["content"] = Counter(replies).most_common(1)[0][0]
answer["ready"] = True
```"""


def port_of(messages: list[dict[str, str]]) -> str:
    """A sub-model that reads the port from a line such as `shipment 12 to Oslo: damaged`."""
    return messages[-1]["content"].split(" to ")[1].split(":")[0]


def main(folder: Path) -> None:
    ports = ("Oslo", "Bergen", "Turku")
    states = ("damaged", "fine", "fine", "fine", "fine")
    context = "\n".join(f"shipment {n} to {ports[n * n % 3]}: {states[n % 5]}" for n in range(10_000))
    root, sub_model = ScriptedModel([LOOK, MAP]), ScriptedModel(port_of, name="sub-model")

    rlm = RLM(root, sub_model, limits=Limits(sub_calls=5_000))
    journal = folder / "run.jsonl"
    result = rlm.complete(context, "Which port receives most of the damaged shipments?", journal=journal)
    prompt = sum(len(message["content"]) for message in root.seen[0])
    print(f"{len(context):,} characters, a first prompt of {prompt:,}")
    print(f"{result.answer} after {result.turns} turns and {result.usage['sub_calls']:,} sub-calls")

    again = RLM(ScriptedModel([]), ScriptedModel([], name="sub-model"), limits=Limits(sub_calls=5_000))
    replayed = again.complete(context, "Which port receives most of the damaged shipments?", journal=journal)
    print(f"replayed without a model: {replayed.answer}; the page: {write_report(journal).stat().st_size:,} bytes")


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        # pass a folder to keep the journal and its page
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))

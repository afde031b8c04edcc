"""One run of one engine, in the environment of that engine; imports nothing from this package.

python contestants.py ENGINE RUN.json      prints {"answer": ..., "stopped": ...} as its last line

RUN.json: url, context (a file), folder, and the limits sub_calls, tokens and seconds, each a number or null. A limit that an
engine does not have is not passed on; `LIMITS` has those it has.
"""

import json
import sys
from pathlib import Path

LIMITS = {
    "eaftdrope": ("sub_calls", "tokens", "seconds"),
    "rlms": ("tokens", "seconds"),
    "dspy": ("sub_calls",),
}
QUERY = "What is in the context?"
# of a run in which the script does nothing wrong
_MOST = {"sub_calls": 1000, "tokens": 10**6, "seconds": 300.0}


def eaftdrope(run):
    from eaftdrope.rlm import RLM, Limits
    from eaftdrope.rlm.served import ServedModel

    root, sub_model = (ServedModel(run["url"], name, window=100_000) for name in ("root", "sub"))
    limits = Limits(iterations=1, **limits_of("eaftdrope", run))
    rlm = RLM(root, sub_model, limits=limits)
    result = rlm.complete(Path(run["context"]), QUERY, journal=Path(run["folder"], "run.jsonl"))
    return result.answer, result.stopped


def rlms(run):
    from rlm import RLM

    def client(name):
        return {"model_name": name, "base_url": run["url"], "api_key": "none"}

    limits = limits_of("rlms", run)
    engine = RLM(
        backend="openai",
        backend_kwargs=client("root"),
        other_backends=["openai"],
        other_backend_kwargs=[client("sub")],
        max_iterations=1,
        max_tokens=limits["tokens"],
        max_timeout=limits["seconds"],
    )
    return engine.completion(Path(run["context"]).read_text(encoding="utf-8"), root_prompt=QUERY).response, None


def dspy(run):
    import dspy

    def interpreter():
        made = dspy.PythonInterpreter()
        if run["import_map"]:
            # after `deno run`
            made.deno_command.insert(2, f"--import-map={run['import_map']}")
        return made

    root, sub_model = (dspy.LM(f"openai/{name}", api_base=run["url"], api_key="none") for name in ("root", "sub"))
    dspy.configure(lm=root)
    limits = limits_of("dspy", run)
    engine = dspy.RLM(
        "context, query -> answer",
        max_iters=1,
        max_llm_calls=limits["sub_calls"],
        sub_lm=sub_model,
        interpreter_factory=interpreter,
    )
    return engine(context=Path(run["context"]).read_text(encoding="utf-8"), query=QUERY).answer, None


def limits_of(engine, run):
    """The limits that the engine has, with a generous value where the run sets none."""
    return {name: _MOST[name] if run[name] is None else run[name] for name in LIMITS[engine]}


def main(engine, path):
    run = json.loads(Path(path).read_text())
    try:
        answer, stopped = {"eaftdrope": eaftdrope, "rlms": rlms, "dspy": dspy}[engine](run)
    except Exception as error:
        # its class and first line: how the engine reports a limit
        answer, stopped = None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    print(json.dumps({"answer": answer, "stopped": stopped}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The program inside the sandbox "cpython": runs blocks of code, and exchanges lines of JSON with the engine.

    from the engine   {"set": {name: value}}   {"run": code}   {"get": name}
                      {"value": ...} or {"error": name, "message": ...}
    to the engine     {"print": text}   {"call": name, "args": [...], "kwargs": {...}}
                      {"done": null or traceback, "full": out of memory}   {"value": ...} or {"missing": reason}

Each request has a number, which all messages about it repeat. Code can change everything here, so the engine trusts no line.
It imports the standard library only, and nothing from the package, which the sandbox does not show.
"""

import builtins
import io
import json
import linecache
import os
import random
import sys
import traceback


class Engine:
    """The other end of the pipes."""

    def __init__(self):
        self._requests, self._replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        # what code reads from or writes to the descriptors themselves goes nowhere
        os.dup2(2, 0)
        os.dup2(2, 1)
        self.number = 0

    def send(self, message):
        # half of a surrogate pair has no bytes in UTF-8
        text = json.dumps({"number": self.number, **message}, ensure_ascii=False)
        self._replies.write(text.encode("utf-8", "replace") + b"\n")
        self._replies.flush()

    def receive(self):
        """The next message; None at the end."""
        line = self._requests.readline()
        return json.loads(line) if line else None


class Printed(io.TextIOBase):
    """stdout and stderr of the code."""

    def __init__(self, engine):
        self._engine = engine

    def write(self, text):
        if text:
            self._engine.send({"print": text})
        return len(text)


def tool(engine, name):
    """The function that code calls."""

    def call(*args, **kwargs):
        engine.send({"call": name, "args": args, "kwargs": kwargs})
        outcome = engine.receive()
        if "error" in outcome:
            raise getattr(builtins, outcome["error"])(outcome["message"])
        return outcome["value"]

    call.__name__ = call.__qualname__ = name
    return call


def run(code, number, variables):
    """Run a block: whether it ended, and how."""
    name = f"<cell {number}>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        exec(compile(code, name, "exec"), variables)
    except BaseException as error:
        try:
            # without the frame of this function
            frames = error.__traceback__ and error.__traceback__.tb_next
            text = "".join(traceback.format_exception(type(error), error, frames))
        except BaseException as second:
            text = f"{type(error).__name__} (its message cannot be shown: {type(second).__name__})"
        return {"done": text, "full": isinstance(error, MemoryError)}
    return {"done": None}


def plain(value):
    """A value as JSON has it; what JSON does not have becomes text."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return str(value)


def get(engine, variables, name):
    if name not in variables:
        engine.send({"missing": f"{name} is not defined"})
        return
    try:
        engine.send({"value": plain(variables[name])})
    except Exception as error:
        engine.send({"missing": f"{name} cannot be read: {type(error).__name__}"})


def main(tools):
    engine = Engine()
    sys.stdin = io.StringIO()
    sys.stdout = sys.stderr = Printed(engine)
    random.seed(0)
    variables = {"__name__": "__main__", "__builtins__": builtins, **{name: tool(engine, name) for name in tools}}
    engine.send({"done": None})
    number = 0
    while (request := engine.receive()) is not None:
        engine.number = request["number"]
        if "set" in request:
            variables.update(request["set"])
            engine.send({"done": None})
        elif "run" in request:
            number += 1
            engine.send(run(request["run"], number, variables))
        else:
            get(engine, variables, request["get"])


if __name__ == "__main__":
    main(sys.argv[1:])

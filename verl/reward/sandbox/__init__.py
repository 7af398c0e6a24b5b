"""A place for programs of unknown intent: they see an interpreter and an empty folder, and nothing of this machine.

What stands between is Linux namespaces and resource limits (``inside.py``), which need no package and no root, but a
kernel that lets this user make namespaces. ``missing`` tells whether it does, by trying.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl.reward.dependencies import MissingDependency

INSIDE = Path(__file__).with_name("inside.py")
NOBODY = 65534  # whom programs run as, seen from outside, when this process is root's
USER = 1000  # as inside.py has it
PYTHON = os.path.realpath(sys.executable)


@dataclass(frozen=True)
class Limits:
    """Of one program's run. memory_mb: address space of a process. processes: threads count. file_mb: of a file, and of
    what is printed. disk_mb, files: of the working folder."""

    cpu_seconds: int
    wall_seconds: int
    memory_mb: int
    processes: int
    file_mb: int
    disk_mb: int
    files: int
    open_files: int


@dataclass(frozen=True)
class Ending:
    """exit: 0, an exit code, minus the signal that ended it, or None when the wall time ran out. stderr: its end."""

    exit: int | None
    stdout: str
    stderr: str

    @property
    def reason(self) -> str:
        """Why it did not end well; "" when it did."""
        if self.exit == 0:
            return ""
        if self.exit is None:
            return "it took too long"
        if self.exit == -signal.SIGXCPU:
            return "it used up its CPU time"
        lines = self.stderr.strip().splitlines()
        return lines[-1][-300:] if lines else f"it ended with {self.exit}"


class SandboxError(RuntimeError):
    """The sandbox itself could not be built, or broke."""


class Sandbox:
    """Runs Python programs, one after the other, each in an empty folder of its own."""

    def __init__(self, limits: Limits):
        self._process = subprocess.Popen(
            [PYTHON, "-I", "-S", "-X", "utf8", str(INSIDE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
        )
        try:
            self._ask({"paths": interpreter_paths(), "limits": asdict(limits)}, "unshared")
            self._map_users()
            self._ask({"mapped": True}, "ready")
        except BaseException:
            self.close()
            raise

    def run(self, program: str, stdin: str = "", files: dict[str, str] | None = None) -> Ending:
        """program: Python source. files: further ones in its folder, name -> text."""
        order = {"files": {"main.py": program, **(files or {})}, "stdin": stdin}
        argv = [PYTHON, "-I", "-S", "-B", "-X", "utf8", "main.py"]
        answer = self._ask({**order, "argv": argv}, "exit")
        return Ending(answer["exit"], answer["stdout"], answer["stderr"])

    def _ask(self, message: dict[str, Any], expected: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise SandboxError("its first process is gone") from error
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "its first process has died"}
        if expected not in answer:
            raise SandboxError(answer["error"])
        return answer

    def _map_users(self) -> None:
        """Who is who in the new user namespace: only a process outside of it may say so for more than one user."""
        folder, uid, gid = f"/proc/{self._process.pid}", os.geteuid(), os.getegid()
        try:
            if uid == 0:
                users = groups = f"0 0 1\n{USER} {NOBODY} 1\n"
            else:
                Path(folder, "setgroups").write_text("deny")
                users, groups = f"{USER} {uid} 1\n", f"{USER} {gid} 1\n"
            Path(folder, "uid_map").write_text(users)
            Path(folder, "gid_map").write_text(groups)
        except OSError as error:
            raise SandboxError(f"its users could not be mapped: {error}") from error

    def close(self) -> None:
        self._process.kill()  # with it all that it has started: see PR_SET_PDEATHSIG
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def interpreter_paths() -> list[str]:
    """What the interpreter needs to run: its own file, its library, the machine's shared libraries."""
    base = os.path.realpath(sys.base_prefix)
    folders = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{base}/lib", f"{base}/lib64"]
    paths = dict.fromkeys([*folders, PYTHON, "/etc/ld.so.cache"])
    return [path for path in paths if os.path.lexists(path)]


# What no program may be able to do: each line that it prints names a wall that does not hold.
PROBE = """
import ctypes, os, socket
def works(name, attempt):
    try:
        attempt()
    except OSError:
        return
    print(name)
libc = ctypes.CDLL(None)
works("files", lambda: open("/etc/passwd"))
works("files", lambda: open("/new", "w"))
works("network", socket.socket)
if libc.unshare(0x10000000) >= 0:
    print("namespaces")
if libc.shmget(0, 4096, 0o600) >= 0:
    print("memory")
children = 0
try:
    while children < 100:
        if os.fork() == 0:
            os.read(os.pipe()[0], 1)
        children += 1
except OSError:
    pass
if children >= 100:
    print("processes")
print("end")
"""
FIX = (
    "run on Linux 5.14 or later, as root or with unprivileged user namespaces allowed (sysctl "
    "user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0), in a container with --privileged; or "
    "score with a function of your own that asks a service for it: custom_reward_function.path=FILE.py"
)


def missing(limits: Limits) -> MissingDependency | None:
    """Why programs cannot be sandboxed here; None when every wall holds."""
    if sys.platform != "linux":
        return MissingDependency(f"programs can be sandboxed on Linux only, and this is {sys.platform}", FIX)
    try:
        with Sandbox(limits) as place:
            ending = place.run(PROBE)
    except (SandboxError, OSError) as error:
        return MissingDependency(f"programs cannot be sandboxed on this machine ({error})", FIX)
    found = ending.stdout.split("\n")[:-1]
    if ending.exit != 0 or found[-1:] != ["end"]:
        return MissingDependency(
            f"programs cannot be sandboxed on this machine ({ending.reason or 'the trial was cut short'})", FIX
        )
    if len(found) > 1:
        return MissingDependency(
            f"the sandbox does not hold on this machine ({', '.join(sorted(set(found[:-1])))})", FIX
        )
    return None

"""Runs untrusted programs. They see a Python interpreter and an empty folder, and nothing else of this machine.

Linux namespaces and resource limits isolate them (``inside.py``). No package and no root user is needed. The kernel
must allow this user to make namespaces. ``missing`` tries it out.
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
NOBODY = 65534  # user of the programs, seen from outside, if this process runs as root
USER = 1000  # same as in inside.py
PYTHON = os.path.realpath(sys.executable)


@dataclass(frozen=True)
class Limits:
    """Limits for one run of a program.

    memory_mb: address space of each process. processes: includes threads. file_mb: size of each file and of the output.
    disk_mb, files: total size and number of files in the working folder.
    """

    cpu_seconds: int
    wall_seconds: int
    memory_mb: int
    processes: int
    file_mb: int
    disk_mb: int
    files: int
    open_files: int


@dataclass(frozen=True)
class ProgramResult:
    """exit: exit code, minus the number of a fatal signal, or None if the wall time ran out. stderr: the end of it."""

    exit: int | None
    stdout: str
    stderr: str

    @property
    def reason(self) -> str:
        """Why the program failed, or ""."""
        if self.exit == 0:
            return ""
        if self.exit is None:
            return "it exceeded its wall time"
        if self.exit == -signal.SIGXCPU:
            return "it exceeded its CPU time"
        lines = self.stderr.strip().splitlines()
        return lines[-1][-300:] if lines else f"it ended with exit code {self.exit}"


class SandboxError(RuntimeError):
    """The sandbox could not be made, or it broke."""


class Sandbox:
    """Runs Python programs one at a time, each in a new, empty folder."""

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

    def run(self, program: str, stdin: str = "", files: dict[str, str] | None = None) -> ProgramResult:
        """The result of a program. program: Python source. files: name -> text of further files in its folder."""
        request = {"files": {"main.py": program, **(files or {})}, "stdin": stdin}
        argv = [PYTHON, "-I", "-S", "-B", "-X", "utf8", "main.py"]
        answer = self._ask({**request, "argv": argv}, "exit")
        return ProgramResult(answer["exit"], answer["stdout"], answer["stderr"])

    def _ask(self, message: dict[str, Any], expected: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise SandboxError("its first process has died") from error
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "its first process has died"}
        if expected not in answer:
            raise SandboxError(answer["error"])
        return answer

    def _map_users(self) -> None:
        """Map the users of the new namespace. Only a process outside may map more than one user."""
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
        self._process.kill()  # its children die with it (PR_SET_PDEATHSIG)
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
    """Paths that the interpreter needs: its executable, its library and the shared libraries of the machine."""
    base = os.path.realpath(sys.base_prefix)
    folders = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{base}/lib", f"{base}/lib64"]
    paths = dict.fromkeys([*folders, PYTHON, "/etc/ld.so.cache"])
    return [path for path in paths if os.path.lexists(path)]


# Tries everything that a program must not be able to do, and prints the name of each attempt that works.
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
    "run on Linux 5.14 or later, as root or with unprivileged user namespaces (sysctl user.max_user_namespaces, "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container: --privileged); or set "
    "custom_reward_function.path=FILE.py to a function that sends programs to a service"
)


def missing(limits: Limits) -> MissingDependency | None:
    """Why programs cannot be sandboxed on this machine, or None if the isolation is complete."""
    if sys.platform != "linux":
        return MissingDependency(f"programs can be sandboxed only on Linux, and this is {sys.platform}", FIX)
    try:
        with Sandbox(limits) as sandbox:
            result = sandbox.run(PROBE)
    except (SandboxError, OSError) as error:
        return MissingDependency(f"programs cannot be sandboxed on this machine ({error})", FIX)
    found = result.stdout.split("\n")[:-1]
    if result.exit != 0 or found[-1:] != ["end"]:
        return MissingDependency(
            f"programs cannot be sandboxed on this machine ({result.reason or 'the test program ended early'})", FIX
        )
    if len(found) > 1:
        return MissingDependency(
            f"the sandbox is not tight on this machine ({', '.join(sorted(set(found[:-1])))})", FIX
        )
    return None

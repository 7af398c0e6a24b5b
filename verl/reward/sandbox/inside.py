"""The first process of a sandbox. A bare interpreter (``-I -S``) runs it, and it imports nothing of this package.

It enters new namespaces (users, mounts, processes, network, IPC, host name) and builds a root folder that holds only an
interpreter. Then it runs programs there, one at a time. Each program runs in a new working folder, as an unprivileged
user, with limits and fewer system calls.

Messages are lines of JSON on standard input and output. Programs never hold these two files:

    in:  Setup            out: {"unshared": true}: the user namespace waits for its ids
    in:  {"mapped": true} out: {"ready": true}
    in:  Request          out: Result                   ... until the input ends

    Setup:   {"paths": [...], "limits": {...}}   paths: visible inside at the same place, read-only
    Request: {"files": {name: text}, "argv": [...], "stdin": text}
    Result:  {"exit": code, -signal or null, "timed_out": whether the wall time ran out, "stdout": text, "stderr": text}
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import Any

USER = 1000  # user and group of the programs, as numbered inside
WORK = "/work"
ROOT = "/proc"  # mount point of the new root while it is built: it exists everywhere, and none of its files are needed
ERRORS_KEPT = 4000  # bytes of standard error that a result holds

# linux/sched.h, linux/mount.h, linux/prctl.h
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the call has this number on every architecture
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2

# Machine -> its number in linux/audit.h and the forbidden system calls: sockets; memory that no limit counts (System V
# shared memory, files in memory, keys); calls that reach into the kernel or into other processes. Their order is
# socket, socketpair, shmget, memfd_create, memfd_secret, add_key, request_key, keyctl,
# unshare, setns, ptrace, process_vm_readv, process_vm_writev, bpf, perf_event_open, userfaultfd, io_uring_setup.
FORBIDDEN = {
    "x86_64": (0xC000003E, (41, 53, 29, 319, 447, 248, 249, 250, 272, 308, 101, 310, 311, 321, 298, 323, 425)),
    "aarch64": (0xC00000B7, (198, 199, 194, 279, 447, 217, 218, 219, 97, 268, 117, 270, 271, 280, 241, 282, 425)),
}

libc = ctypes.CDLL(None, use_errno=True)


class MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = [text.encode() if text else None for text in (source, target, kind)]
    check(libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None), f"mount {kind or source} {target}")


def prctl(option: int, value: int) -> None:
    check(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def send(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def receive() -> dict[str, Any] | None:
    line = sys.stdin.buffer.readline()
    return json.loads(line) if line else None


# ---- isolation


def enter_namespaces() -> None:
    """Enter new namespaces. The process namespace starts with the first child."""
    spaces = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    check(libc.unshare(spaces), "unshare")
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    send({"unshared": True})
    if not receive():
        sys.exit(1)
    socket.sethostname("sandbox")
    write("/proc/sys/user/max_user_namespaces", "0")  # a further namespace would give a program privileges
    write("/proc/self/oom_score_adj", "1000")  # if the machine runs out of memory, these processes are killed first


def write(path: str, text: str) -> None:
    with open(path, "w", errors="replace") as file:
        file.write(text)


def build_root(paths: list[str]) -> None:
    """Build and enter a read-only root with ``paths`` and a few devices. Unmount the old root."""
    mount("", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4k,mode=755")
    for path in paths:
        bind(path)
    for device in ("null", "zero", "random", "urandom"):
        bind(f"/dev/{device}")
    os.mkdir(ROOT + WORK)
    os.symlink(WORK, ROOT + "/tmp")
    os.chdir(ROOT)
    check(libc.pivot_root(b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")
    mount("", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def bind(path: str) -> None:
    """Make a path of the old root visible in the new one. Symbolic links stay links."""
    place = ROOT + path
    if os.path.lexists(place):  # inside a folder that is visible already
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        write(place, "")
    mount(path, place, "", MS_BIND | MS_REC)
    wanted = MountAttr(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    result = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, place.encode(), AT_RECURSIVE, ctypes.byref(wanted), size)
    check(result, f"making {path} read-only (Linux 5.12 or later)")


def mount_work_folder(limits: dict[str, int]) -> None:
    options = f"size={limits['disk_mb']}m,nr_inodes={limits['files'] + 1},mode=700,uid={USER},gid={USER}"
    mount("tmpfs", WORK, "tmpfs", MS_NOSUID | MS_NODEV, options)


# ---- programs


def serve(limits: dict[str, int]) -> None:
    """Run as the first process of the process namespace. All other processes there end with it."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 0)  # programs of the same user cannot trace this process or read its memory
    send({"ready": True})
    while (request := receive()) is not None:
        mount_work_folder(limits)
        send(run(request, limits))
        check(libc.umount2(WORK.encode(), MNT_DETACH), "umount")


def run(request: dict[str, Any], limits: dict[str, int]) -> dict[str, Any]:
    for name, text in request["files"].items():
        write(f"{WORK}/{name}", text)
    in_, out, err = (os.memfd_create(name) for name in ("stdin", "stdout", "stderr"))
    with os.fdopen(os.dup(in_), "wb") as stream:
        stream.write(request["stdin"].encode("utf-8", "replace"))
    os.lseek(in_, 0, os.SEEK_SET)
    program = os.fork()
    if program == 0:
        try:
            exec_program(request["argv"], limits, (in_, out, err))
        except OSError as error:
            os.write(err, f"the program could not be started: {error}".encode())
        finally:
            os._exit(127)
    code = wait_for(program, limits["wall_seconds"])
    kill_all()
    result = {
        "exit": code,
        "timed_out": code is None,
        "stdout": read_file(out, limits["file_mb"] << 20),
        "stderr": read_file(err, ERRORS_KEPT, last=True),
    }
    for file in (in_, out, err):
        os.close(file)
    return result


def exec_program(argv: list[str], limits: dict[str, int], files: tuple[int, int, int]) -> None:
    """Turn this process into the program. The change of user or the exec drops its capabilities."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 1 << 16)
    os.setsid()
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    for name, value in {
        "CPU": limits["cpu_seconds"],
        "AS": limits["memory_mb"] << 20,
        "FSIZE": limits["file_mb"] << 20,
        "NOFILE": limits["open_files"],
        "NPROC": limits["processes"] + (0 if os.getuid() == 0 else 2),  # the sandbox's own two processes count too
        "CORE": 0,
        "MEMLOCK": 0,
    }.items():
        limit(getattr(resource, f"RLIMIT_{name}"), value, value + (name == "CPU"))  # SIGXCPU, a second later SIGKILL
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    forbid_calls()
    os.chdir(WORK)
    environment = {"HOME": WORK, "TMPDIR": WORK, "PATH": "/nowhere", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    os.execve(argv[0], argv, environment)


def limit(kind: int, soft: int, hard: int) -> None:
    """Set a limit, but no higher than the hard limit of this process."""
    own = resource.getrlimit(kind)[1]
    most = float("inf") if own == resource.RLIM_INFINITY else own
    resource.setrlimit(kind, (int(min(soft, most)), int(min(hard, most))))


def forbid_calls() -> None:
    """Make FORBIDDEN system calls fail with EPERM (seccomp) in this process and its future children."""
    if os.uname().machine not in FORBIDDEN:
        raise OSError(f"no list of system calls for {os.uname().machine}")
    architecture, calls = FORBIDDEN[os.uname().machine]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # BPF instructions: (code, jump if true, if false, value)
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, len(calls) + 1, 0, 0x40000000)]  # the x32 system calls of x86-64
    program += [(equal, len(calls) - index, 0, call) for index, call in enumerate(calls)]
    program += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = struct.pack("HP", len(program), ctypes.addressof(buffer))
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(filter_), 0, 0), "seccomp")


def wait_for(process: int, seconds: int) -> int | None:
    """The exit code, minus the number of a fatal signal, or None if the process is still running after ``seconds``."""
    handle = os.pidfd_open(process)
    try:
        if not select.select([handle], [], [], seconds)[0]:
            return None
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    finally:
        os.close(handle)


def kill_all() -> None:
    """Kill all other processes of the namespace and wait for them."""
    while True:
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def read_file(file: int, limit: int, last: bool = False) -> str:
    size = os.fstat(file).st_size
    start = max(0, size - limit) if last else 0
    return os.pread(file, min(size, limit), start).decode("utf-8", "replace")


def main() -> None:
    setup = receive()
    assert setup is not None
    try:
        enter_namespaces()
        build_root(setup["paths"])
        first = os.fork()
        if first == 0:
            serve(setup["limits"])
            os._exit(0)
    except OSError as error:
        send({"error": error.strerror if error.filename is None else str(error)})
        os._exit(1)
    os.waitpid(first, 0)


if __name__ == "__main__":
    main()

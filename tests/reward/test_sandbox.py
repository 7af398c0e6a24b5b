"""Programs that try to get out of the sandbox, or to use up the machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT

from verl.config.sections.reward import SandboxLimitsConfig
from verl.reward.sandbox import Limits, Sandbox, SandboxError, interpreter_paths, missing

LIMITS = Limits(**SandboxLimitsConfig().model_dump())


def limits(**changes: int) -> Limits:
    return Limits(**SandboxLimitsConfig(**changes).model_dump())


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(LIMITS) as place:
        yield place


def test_this_machine_can_sandbox():
    assert missing(LIMITS) is None


def test_a_program_reads_its_input_and_prints(sandbox):
    ending = sandbox.run("print(input()[::-1]); import sys; print('oh', file=sys.stderr)", "añb\n")
    assert (ending.exit, ending.stdout, ending.stderr, ending.reason) == (0, "bña\n", "oh\n", "")


def test_a_program_that_fails_says_why(sandbox):
    assert sandbox.run("1/0").reason == "ZeroDivisionError: division by zero"
    assert sandbox.run("import os; os._exit(3)").reason == "it ended with exit code 3"
    assert sandbox.run("import os; os.kill(os.getpid(), 11)").exit == -signal.SIGSEGV
    assert sandbox.run("import numpy").reason == "ModuleNotFoundError: No module named 'numpy'"


def inside(place: Sandbox) -> list[psutil.Process]:
    """The sandbox's first process, and all programs."""
    return psutil.Process(place._process.pid).children(recursive=True)


# ---- time


def test_an_endless_loop_ends_with_its_cpu_time():
    with Sandbox(limits(cpu_seconds=1, wall_seconds=100)) as place:
        ending = place.run("print('on', flush=True)\nwhile True: pass")
        assert (ending.exit, ending.stdout, ending.reason) == (-signal.SIGXCPU, "on\n", "it exceeded its CPU time")
        assert place.run("import signal; signal.signal(signal.SIGXCPU, lambda *_: 0)\nwhile True: pass").exit == -9


def test_a_sleeper_ends_with_its_wall_time():
    with Sandbox(limits(wall_seconds=1)) as place:
        ending = place.run("import time; print('on', flush=True); time.sleep(1000)")
        assert (ending.exit, ending.stdout, ending.reason) == (None, "on\n", "it exceeded its wall time")
        assert place.run("print(1)").stdout == "1\n"


# ---- processes


BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


def test_a_fork_bomb_stays_small_and_leaves_nothing():
    with Sandbox(limits(wall_seconds=2, cpu_seconds=30, processes=8)) as place:
        counts, stop = [len(inside(place))], threading.Event()

        def watch() -> None:
            while not stop.wait(0.05):
                counts.append(len(inside(place)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert place.run(BOMB).exit is None
        stop.set()
        watcher.join()
        assert (counts[0], max(counts), len(inside(place))) == (1, 1 + 8, 1)
        assert place.run("print(1)").stdout == "1\n"


def test_sandboxes_beside_each_other_do_not_share_their_limit_of_processes():
    with Sandbox(limits(wall_seconds=2, processes=8)) as one, Sandbox(limits(processes=4)) as other:
        bomb = threading.Thread(target=one.run, args=(BOMB,))
        bomb.start()
        while len(inside(one)) < 1 + 8:
            time.sleep(0.01)
        assert other.run("import os\nif os.fork(): print(os.waitstatus_to_exitcode(os.wait()[1]))").stdout == "0\n"
        bomb.join()


def test_threads_count_as_processes(sandbox):
    program = """
import threading
stop, count = threading.Event(), 0
try:
    for _ in range(100):
        threading.Thread(target=stop.wait).start()
        count += 1
except RuntimeError:
    print(count)
stop.set()
"""
    assert sandbox.run(program).stdout == f"{LIMITS.processes - 1}\n"


def test_what_a_program_leaves_running_ends_with_it(sandbox):
    program = """
import os, time
if os.fork() == 0:
    os.setsid()
    os.close(1)
    time.sleep(1000)
print("done")
"""
    assert sandbox.run(program).stdout == "done\n"
    assert len(inside(sandbox)) == 1


def test_a_program_cannot_end_or_trace_the_sandbox(sandbox):
    program = """
import ctypes, os, signal
print(os.getppid())
for number in (1, -1):
    try:
        os.kill(1, signal.SIGKILL)
    except PermissionError:
        pass
libc = ctypes.CDLL(None, use_errno=True)
print(libc.ptrace(16, 1, 0, 0), ctypes.get_errno(), libc.process_vm_readv(1, 0, 0, 0, 0, 0))
for number in range(3, 100):
    try:
        os.fstat(number)
        print("file", number)
    except OSError:
        pass
"""
    assert sandbox.run(program).stdout == "1\n-1 1 -1\n"
    assert sandbox.run("print(1)").stdout == "1\n"


def test_the_sandbox_ends_with_the_process_that_made_it():
    code = (
        "from verl.config.sections.reward import SandboxLimitsConfig\n"
        "from verl.reward.sandbox import *\n"
        "place = Sandbox(Limits(**SandboxLimitsConfig(wall_seconds=1000, cpu_seconds=1000).model_dump()))\n"
        "print(place._process.pid, flush=True)\n"
        "place.run('while True: pass')\n"
    )
    maker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    first = psutil.Process(int(maker.stdout.readline()))
    while len(others := first.children(recursive=True)) < 2:
        time.sleep(0.01)
    maker.kill()
    maker.wait()
    _, alive = psutil.wait_procs([first, *others], timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


# ---- files


def test_a_program_sees_no_file_of_this_machine(sandbox, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    home = Path.home()
    paths = ["/etc/passwd", "/etc/hostname", "/proc/self/environ", "/proc/1/environ", "/sys", "/var", "/home"]
    paths += [str(path) for path in (home / ".bashrc", home / ".ssh", secret, ROOT / "README.md", ROOT)]
    program = f"""
import os
for path in {paths!r}:
    try:
        print(path, os.listdir(path) if os.path.isdir(path) else open(path).read())
    except OSError:
        pass
print(sorted(os.listdir("/work")))
"""
    assert sandbox.run(program).stdout == "['main.py']\n"


def test_a_program_sees_no_environment_of_this_process(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "secret")
    with Sandbox(LIMITS) as place:
        names = place.run("import os; print(sorted(os.environ))").stdout
    assert names == "['HOME', 'LANG', 'PATH', 'PYTHONHASHSEED', 'TMPDIR']\n"


def test_a_program_writes_in_its_own_folder_only_which_is_new_each_time(sandbox):
    program = """
import os, sys, tempfile
open("mine", "w").write("1")
tempfile.NamedTemporaryFile(delete=False)
for place in ("/", "/dev", "/lib", "/usr/lib", os.path.dirname(os.__file__), os.path.dirname(sys.executable)):
    try:
        open(place + "/mine", "w")
        print("wrote into", place)
    except OSError:
        pass
print(os.path.exists("mine"))
"""
    assert sandbox.run(program).stdout == "True\n"
    assert sandbox.run("import os; print(os.listdir())").stdout == "['main.py']\n"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("open('big', 'wb').write(bytes(17 << 20))", "File too large"),
        ("print('x' * (17 << 20))", "File too large"),
        ("for i in range(3): open(str(i), 'wb').write(bytes(15 << 20))", "No space left"),
        ("for i in range(300): open(str(i), 'w')", "No space left"),
        ("kept = [open('main.py') for _ in range(100)]", "Too many open files"),
        ("kept = bytearray(2 << 30)", "MemoryError"),
        ("kept = [bytearray(1 << 20) for _ in range(2000)]", "MemoryError"),
    ],
)
def test_files_and_memory_are_limited(sandbox, program, reason):
    assert reason in sandbox.run(program).reason


def test_what_is_below_a_folder_that_is_seen_is_seen_once(monkeypatch):
    """As where the interpreter itself is in /usr/lib."""
    monkeypatch.setattr("verl.reward.sandbox.interpreter_paths", lambda: [*interpreter_paths(), "/usr/lib/os-release"])
    with Sandbox(LIMITS) as place:
        assert "NAME" in place.run("print(open('/usr/lib/os-release').read())").stdout


def test_a_limit_above_this_process_own_is_its_own():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "from verl.reward.sandbox import *\n"
        "with Sandbox(Limits(5, 10, 1024, 4, 16, 32, 256, 64)) as place:\n"
        "    print(place.run('import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))').stdout)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.split("\n")[0] == "(40, 40)"


def test_devices_that_programs_expect_are_there(sandbox):
    program = (
        "open('/dev/null', 'w').write('x'); print(len(open('/dev/urandom', 'rb').read(4)), open('/dev/null').read())"
    )
    assert sandbox.run(program).stdout == "4 \n"


# ---- the network, and the kernel


def test_a_program_reaches_no_socket(sandbox):
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind("\0verl-test-sandbox")
    unix.listen()
    program = f"""
import socket
for make in (
    lambda: socket.create_connection(("127.0.0.1", {tcp.getsockname()[1]}), 2),
    lambda: socket.socket(socket.AF_UNIX).connect("\\0verl-test-sandbox"),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9)),
    lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    socket.socketpair,
):
    try:
        make()
        print("connected")
    except PermissionError:
        pass
"""
    with tcp, unix:
        ending = sandbox.run(program)
    assert (ending.stdout, ending.reason) == ("", "")


def test_a_program_has_no_powers_and_gets_none(sandbox):
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(os.getresuid() == (1000,) * 3, os.getresgid() == (1000,) * 3)
print(libc.unshare(0x10000000), libc.shmget(0, 4096, 0o600), libc.memfd_create(b"x", 0))
print(libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0))  # clone with a new user namespace
print(libc.mount(b"tmpfs", b"/work", b"tmpfs", 0, 0), libc.sethostname(b"x", 1), libc.chroot(b"/work"))
for attempt in (lambda: os.setuid(0), lambda: os.setgroups([0]), lambda: os.nice(-5)):
    try:
        attempt()
        print("worked")
    except PermissionError:
        pass
"""
    assert sandbox.run(program).stdout == "True True\n-1 -1 -1\n-1\n-1 -1 -1\n"


# ---- who may


SCRIPT = """
import sys
from verl.reward.sandbox import *
limits = Limits(5, 2, 1024, 8, 16, 32, 256, 64)
print(missing(limits))
with Sandbox(limits) as place:
    print(place.run(sys.argv[1]).exit)
    print(place.run("import os; print(os.getuid(), os.path.exists('/etc/passwd'))").stdout)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="all tests run as a plain user then")
def test_a_plain_user_can_sandbox_too():
    """With the system's interpreter and a copy of the package, which such a user can read."""
    python = shutil.which("python3", path="/usr/bin")
    assert python, "this test needs the system's own Python"
    with tempfile.TemporaryDirectory() as name:  # not pytest's, which others cannot read
        folder = Path(name)
        folder.chmod(0o755)
        for name in ("__init__.py", "errors.py", "reward/__init__.py", "reward/dependencies.py", "reward/sandbox"):
            target = folder / "verl" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            source = ROOT / "verl" / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        ended = subprocess.run(
            [python, "-B", "-c", SCRIPT, BOMB],
            cwd=folder,
            env={"PYTHONPATH": str(folder)},
            user=12345,
            group=12345,
            extra_groups=[],
            capture_output=True,
            text=True,
        )
    assert (ended.stdout, ended.stderr) == ("None\nNone\n1000 False\n\n", "")


def test_a_machine_that_allows_no_namespaces_is_told_of_with_what_to_do():
    """A user namespace in which no further one may be made stands for it."""
    code = "from verl.reward.sandbox import *; print(missing(Limits(5, 2, 1024, 8, 16, 32, 256, 64)))"
    order = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", order, sys.executable, code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert "cannot be sandboxed on this machine (unshare: No space left on device)" in ended.stdout
    assert "unprivileged user namespaces" in ended.stdout


def test_a_sandbox_whose_first_process_dies_is_an_error_not_a_failed_program():
    with Sandbox(LIMITS) as place:
        place._process.kill()
        place._process.wait()
        with pytest.raises(SandboxError):
            place.run("print(1)")

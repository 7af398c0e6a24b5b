"""What the tests run in worker processes: importable there, and light."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl.errors import UserError


def make_echo(prefix: str) -> Callable[[Any], Any]:
    return lambda item: f"{prefix}{item}"


def make_actor() -> Callable[[tuple[str, Any]], Any]:
    return act


def act(item: tuple[str, Any]) -> Any:
    """Do what the item says."""
    order, value = item
    if order == "hang":
        time.sleep(1000)
    elif order == "hang on":  # deaf to SIGTERM
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    elif order == "spin":
        while True:
            pass
    elif order == "die":
        os._exit(value)
    elif order == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif order == "raise":
        raise KeyError(value)
    elif order == "exit":
        sys.exit(value)
    elif order == "pid":
        return os.getpid()
    elif order == "sleep":
        time.sleep(value)
    elif order == "child":  # leaves a process of its own running, tells its number, and hangs
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        Path(value).write_text(str(child.pid))
        time.sleep(1000)
    elif order == "lambda":
        return lambda: value
    elif order == "modules":
        return sorted({name.partition(".")[0] for name in sys.modules})
    return value


def make_broken(kind: str) -> Callable[[Any], Any]:
    if kind == "user":
        raise UserError("mend this")
    if kind == "die":
        os._exit(7)
    raise RuntimeError("no luck")


def make_until(marker: str) -> Callable[[Any], Any]:
    """Works while the marker file exists; each call ends the process."""
    if not Path(marker).exists():
        raise RuntimeError("the marker is gone")
    return lambda item: os._exit(3) if item == "die" else item

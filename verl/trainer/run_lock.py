"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

import psutil
from filelock import FileLock, Timeout

from verl.errors import UserError

LOCK, OWNER = ".run.lock", ".run.json"
ORPHANS_TIMEOUT = 20.0  # seconds in which the processes of a run that was killed end


class RunLock:
    """Context manager that holds a folder for this process. UserError, naming host and pid, if another run holds it.

    The lock is the operating system's: it ends with the process that holds it, however that ends. key: the setting that
    names the folder, for messages."""

    def __init__(self, folder: Path, key: str):
        self._folder, self._key = folder, key
        self._lock = FileLock(folder / LOCK)

    def __enter__(self) -> RunLock:
        self._made = not self._folder.exists()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
            (self._folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")
        except Timeout:
            raise UserError(self._refusal()) from None
        except OSError as error:
            raise UserError(f"{self._key}={self._folder} cannot be written to: {error}") from error
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        (self._folder / OWNER).unlink(missing_ok=True)
        self._lock.release()
        if self._made:
            self._remove_if_empty()

    def _remove_if_empty(self) -> None:
        """A run that was refused leaves no folder behind."""
        with contextlib.suppress(OSError):
            if {path.name for path in self._folder.iterdir()} <= {LOCK}:
                (self._folder / LOCK).unlink(missing_ok=True)
                self._folder.rmdir()

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:  # its owner may be dead, and only processes that it started still end
            if not self._owner_is_dead():
                raise
            self._lock.acquire(timeout=ORPHANS_TIMEOUT)

    def _owner(self) -> dict:
        try:
            return json.loads((self._folder / OWNER).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it has just started, or just ended
            return {}

    def _owner_is_dead(self) -> bool:
        owner = self._owner()
        return owner.get("host") == socket.gethostname() and not psutil.pid_exists(owner.get("pid", os.getpid()))

    def _refusal(self) -> str:
        owner = self._owner()
        who = f"process {owner['pid']} on {owner['host']}, started {owner['started']}" if owner else "another process"
        return (
            f"{self._key}={self._folder}: {who}, runs in this folder. Wait until it ends, end it, or choose another "
            f"folder ({self._key}=...)."
        )

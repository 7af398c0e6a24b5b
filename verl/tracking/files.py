"""Files that stay complete if the process dies or the disk is full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class AppendFile:
    """A file to which records are appended whole.

    If a record cannot be written, for example on a full disk, the file stays unchanged, and the next ``append`` writes
    both records. A record survives the death of the process once ``append`` has returned.
    """

    def __init__(self, path: Path):
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._waiting = b""

    def append(self, record: bytes) -> None:
        self._waiting += record
        rest = memoryview(self._waiting)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += len(self._waiting)
        self._waiting = b""

    def close(self) -> None:
        try:
            if self._waiting:
                self.append(b"")
        finally:
            self._file.close()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``. It replaces ``path`` if the block succeeds; else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise

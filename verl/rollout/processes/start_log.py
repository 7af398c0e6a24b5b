"""What an engine is doing while it starts, read from its own log as it grows."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

LINE_ENDS = re.compile(rb"[\r\n]")  # progress bars end their lines with a carriage return


class StartLog:
    """``look`` notes each milestone that the log has reached since the last look, once, with the time since the start.

    milestones: regular expression of a line -> what the engine is doing from then on. title: the engine's name.
    """

    def __init__(
        self,
        log: Path,
        milestones: Mapping[str, str],
        note: Callable[[str], None],
        title: str,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._log, self._note, self._title, self._clock = log, note, title, clock
        self._expected = {text: re.compile(pattern) for pattern, text in milestones.items()}
        self._started, self._read, self._rest = clock(), 0, b""

    def look(self) -> None:
        for line in self._new_lines():
            for text in [text for text, pattern in self._expected.items() if pattern.search(line)]:
                del self._expected[text]
                self._note(f"{self._title}, after {self._clock() - self._started:.0f} s: {text}")

    def _new_lines(self) -> list[str]:
        try:
            with self._log.open("rb") as log:
                log.seek(self._read)
                new = log.read()
        except OSError:  # a log that cannot be read is no reason to end a start
            return []
        self._read += len(new)
        *lines, self._rest = LINE_ENDS.split(self._rest + new)
        return [line.decode(errors="replace") for line in lines]

"""The console output of a run.

On a terminal: one row of numbers per step, and below the rows a bar for the run (steps, time left) and a bar for each
running stage. In a file, a pipe or CI: the same rows as plain lines, and a line about the running stage if nothing was
printed for ``QUIET_SECONDS``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID
from rich.progress import Progress as Bars
from rich.table import Column as TableColumn
from rich.text import Text

from verl.tracking.columns import Rows, duration_text
from verl.tracking.dumps import sample_text
from verl.tracking.run import RunInfo

QUIET_SECONDS = 30.0  # without bars, a stage prints its progress after this time without output
STEPS_AVERAGED = 20
MANY_STEPS, ROW_SECONDS = 200, 2.0  # a run of more than MANY_STEPS prints at most one row per ROW_SECONDS
CONTROL_CHARACTERS = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class Stage:
    """A running part of a step. total: number of items, or None if unknown."""

    def __init__(self, name: str, total: int | None, clock: Callable[[], float], moved: Callable[[], None]):
        self.name, self.total, self.done, self.tokens = name, total, 0, 0
        self._clock, self._started, self._moved = clock, clock(), moved

    def advance(self, n: int = 1, *, tokens: int = 0) -> None:
        """Count ``n`` finished items and, to show a rate, ``tokens`` generated tokens."""
        self.done += n
        self.tokens += tokens
        self._moved()

    @property
    def count(self) -> str:
        return f"{self.done:,}/{self.total:,}" if self.total else f"{self.done:,}" if self.done else ""

    @property
    def detail(self) -> str:
        seconds = self._clock() - self._started
        rate = f"{self.tokens / seconds:,.0f} tokens/s, " if self.tokens and seconds > 0 else ""
        return rate + duration_text(seconds)


class Progress:
    """Prints rows, bars, notes and warnings. show: False prints only notes and warnings. clock: monotonic seconds."""

    def __init__(
        self,
        run: RunInfo,
        *,
        show: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run, self._show, self._clock = run, show, clock
        self._console = console or RobustConsole(highlight=False, emoji=False)
        self._rows = Rows(run.total_steps)
        self._pace = Pace(run.resume_step or 0, run.total_steps, clock)
        self._bars: Bars | None = None
        self._run_bar: TaskID | None = None
        self._printed_at = clock()
        self._row_at = float("-inf")

    def __enter__(self) -> Progress:
        run, done = self._run, self._pace.step
        if self._show:
            steps = f"steps {done + 1} to {run.total_steps}" if done < run.total_steps else f"all {done} steps are done"
            self.note(f"{run.project}/{run.experiment}: {steps}, in {run.folder}")
        if self._show and self._console.is_interactive and self._console.file.isatty():
            columns = _bar_columns(self._console.width)
            self._bars = Bars(*columns, console=self._console, transient=True, refresh_per_second=4)
            self._run_bar = self._bars.add_task("step", total=run.total_steps, completed=done, of=self._pace)
            self._bars.start()
        self._pace.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bars:
            with suppress(OSError):  # the terminal is gone
                self._bars.stop()
            self._bars = None

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Print the row of a finished step and advance the run's bar. More calls may add metrics of the step."""
        if step > self._pace.step:
            self._pace.tick(step, metrics.get("perf/compile_seconds", 0.0), metrics.get("timing_s/step"))
            if self._bars and self._run_bar is not None:
                self._bars.update(self._run_bar, completed=step)
        if self._show and not self._skips_row(step, metrics):
            width = self._console.width if self._bars else None
            for line, style in self._rows.lines(step, metrics, self._pace.seconds_left(), width):
                self._print(line, style)

    def _skips_row(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether to print no row for this step, in a run of many steps. The last step and validations get one."""
        last = step >= self._run.total_steps
        if self._run.total_steps <= MANY_STEPS or last or any(name.startswith("val") for name in metrics):
            return False
        if self._clock() - self._row_at < ROW_SECONDS:
            return True
        self._row_at = self._clock()
        return False

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Show a running stage. Stages may be nested."""
        bars = self._bars
        bar: TaskID | None = None

        def moved() -> None:
            if bars and bar is not None:
                bars.update(bar, completed=stage.done)
            else:
                self._print_if_quiet(stage)

        stage = Stage(name, total, self._clock, moved)
        if bars:
            bar = bars.add_task(f"  {name}", total=total or None, of=stage)
        else:
            self._print_if_quiet(stage)
        try:
            yield stage
        finally:
            if bars and bar is not None:
                bars.remove_task(bar)

    def samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        if self._show:
            for row in rows:
                self.note(sample_text(row, step))

    def note(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", "yellow")

    def _print_if_quiet(self, stage: Stage) -> None:
        if self._show and self._clock() - self._printed_at >= QUIET_SECONDS:
            count = f" {stage.count}" if stage.count else ""
            self._print(f"step {self._pace.step + 1}/{self._run.total_steps}, {stage.name}{count}, {stage.detail}")

    def _print(self, text: str, style: str = "") -> None:
        self._printed_at = self._clock()
        encoding = self._console.encoding
        shown = text.translate(CONTROL_CHARACTERS).encode(encoding, "replace").decode(encoding)
        with suppress(OSError):  # the terminal is gone, or its disk is full
            self._console.print(Text(shown, style=style), soft_wrap=True)


class RobustConsole(Console):
    """A console that raises if its reader is gone. Rich's own console ends the process."""

    def on_broken_pipe(self) -> None:
        raise


class Pace:
    """Estimates the time left from the duration of the last ``STEPS_AVERAGED`` steps.

    What happens only once does not count: the seconds of compilation, and this run's first step as soon as there is
    another."""

    def __init__(self, step: int, total_steps: int, clock: Callable[[], float]):
        self.step, self.total = step, total_steps
        self._clock, self._ticked_at = clock, clock()
        self._seconds: deque[float] = deque(maxlen=STEPS_AVERAGED)
        self._steps = 0

    def start(self) -> None:
        self._ticked_at = self._clock()

    def tick(self, step: int, compile_seconds: float = 0.0, step_seconds: float | None = None) -> None:
        """step_seconds: the step's own time, where that is known."""
        now = self._clock()
        self._steps += 1
        seconds = (now - self._ticked_at) / (step - self.step)
        first = self._steps == 1
        seconds = min(seconds, step_seconds or seconds) if first else max(seconds - compile_seconds, 0.0)
        if self._steps == 2:
            self._seconds.clear()
        self._seconds.append(seconds)
        self.step, self._ticked_at = step, now

    def seconds_left(self) -> float | None:
        if not self._seconds:
            return None
        average = sum(self._seconds) / len(self._seconds)
        return max(0.0, average * (self.total - self.step) - (self._clock() - self._ticked_at))

    @property
    def count(self) -> str:
        return f"{self.step}/{self.total}"

    @property
    def detail(self) -> str:
        left = self.seconds_left()
        return "" if left is None else f"{duration_text(left)} left"


class _Field(ProgressColumn):
    """Shows an attribute of the task's Pace or Stage, or the task's description."""

    max_refresh = None

    def __init__(self, attribute: str | None, style: str, **column: Any):
        self._attribute, self._style = attribute, style
        super().__init__(TableColumn(no_wrap=True, overflow="ellipsis", **column))

    def render(self, task: Task) -> Text:
        text = getattr(task.fields["of"], self._attribute) if self._attribute else task.description
        return Text(text, style=self._style)


def _bar_columns(console_width: int) -> list[ProgressColumn]:
    """Columns of the bars. On a wide console they have a minimum width and stay aligned from stage to stage."""
    name_width, count_width = (16, 9) if console_width >= 80 else (None, None)
    return [
        _Field(None, "bold", min_width=name_width),
        BarColumn(bar_width=24),
        _Field("count", "", min_width=count_width, justify="right"),
        _Field("detail", "cyan"),
    ]

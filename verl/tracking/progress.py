"""What the console shows while a run goes on.

On a terminal: a row of numbers a step, and below the rows a bar for the run (steps, time left) and one for each stage
that is under way. Elsewhere (a file, a pipe, CI): the same rows as plain lines, and a line on the stage that is under
way when nothing was printed for a while.
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

QUIET_SECONDS = 30.0  # after which a stage says where it is, where there are no bars
STEPS_AVERAGED = 20
MANY_STEPS, ROW_SECONDS = 200, 2.0  # a run of more steps than this prints a row at most that often
CONTROL_CHARACTERS = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class Stage:
    """A part of a step that is under way. ``total``: how many pieces it has, where it knows."""

    def __init__(self, name: str, total: int | None, clock: Callable[[], float], moved: Callable[[], None]):
        self.name, self.total, self.done, self.tokens = name, total, 0, 0
        self._clock, self._started, self._moved = clock, clock(), moved

    def advance(self, n: int = 1, *, tokens: int = 0) -> None:
        """``n`` more pieces are finished. tokens: how many more were generated, where their rate is of interest."""
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
    """show: rows and bars; without it only notes and warnings are printed. clock: seconds, monotonic."""

    def __init__(
        self,
        run: RunInfo,
        *,
        show: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run, self._show, self._clock = run, show, clock
        self._console = console or SteadyConsole(highlight=False, emoji=False)
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
        """A step is done (or more is known of it): its row, and the run's bar."""
        if step > self._pace.step:
            self._pace.tick(step, metrics.get("perf/compile_seconds", 0.0), metrics.get("timing_s/step"))
            if self._bars and self._run_bar is not None:
                self._bars.update(self._run_bar, completed=step)
        if self._show and not self._passed_over(step, metrics):
            width = self._console.width if self._bars else None
            for line, style in self._rows.lines(step, metrics, self._pace.seconds_left(), width):
                self._print(line, style)

    def _passed_over(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether this step of a run of many short ones gets no row: the last, and one with a validation, always do."""
        last = step >= self._run.total_steps
        if self._run.total_steps <= MANY_STEPS or last or any(name.startswith("val") for name in metrics):
            return False
        if self._clock() - self._row_at < ROW_SECONDS:
            return True
        self._row_at = self._clock()
        return False

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Stages may lie in one another."""
        bars = self._bars
        bar: TaskID | None = None

        def moved() -> None:
            if bars and bar is not None:
                bars.update(bar, completed=stage.done)
            else:
                self._break_silence(stage)

        stage = Stage(name, total, self._clock, moved)
        if bars:
            bar = bars.add_task(f"  {name}", total=total or None, of=stage)
        else:
            self._break_silence(stage)
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

    def _break_silence(self, stage: Stage) -> None:
        if self._show and self._clock() - self._printed_at >= QUIET_SECONDS:
            count = f" {stage.count}" if stage.count else ""
            self._print(f"step {self._pace.step + 1}/{self._run.total_steps}, {stage.name}{count}, {stage.detail}")

    def _print(self, text: str, style: str = "") -> None:
        self._printed_at = self._clock()
        encoding = self._console.encoding
        shown = text.translate(CONTROL_CHARACTERS).encode(encoding, "replace").decode(encoding)
        with suppress(OSError):  # the terminal is gone, or the disk behind it full: nowhere to say so
            self._console.print(Text(shown, style=style), soft_wrap=True)


class SteadyConsole(Console):
    """A console whose reader may go away (rich's own ends the process)."""

    def on_broken_pipe(self) -> None:
        raise


class Pace:
    """Time left, from how long the last steps took, whatever was done in them, without what happens only once: the
    seconds of compilation, and all of this run's first step as soon as there is another. Of the first, only the step
    itself counts and not what came before it."""

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
    """A text that the task's object (a Pace or a Stage) has at the moment of drawing."""

    max_refresh = None

    def __init__(self, attribute: str | None, style: str, **column: Any):
        self._attribute, self._style = attribute, style
        super().__init__(TableColumn(no_wrap=True, overflow="ellipsis", **column))

    def render(self, task: Task) -> Text:
        text = getattr(task.fields["of"], self._attribute) if self._attribute else task.description
        return Text(text, style=self._style)


def _bar_columns(console_width: int) -> list[ProgressColumn]:
    """With room to spare the columns keep their place from one stage to the next."""
    name_width, count_width = (16, 9) if console_width >= 80 else (None, None)
    return [
        _Field(None, "bold", min_width=name_width),
        BarColumn(bar_width=24),
        _Field("count", "", min_width=count_width, justify="right"),
        _Field("detail", "cyan"),
    ]

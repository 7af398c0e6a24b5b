"""The table on the console: the metrics that it shows, and their layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

HEADER_EVERY = 25  # rows
GAP = "  "
Line = tuple[str, str]  # text and rich style


@dataclass(frozen=True)
class Column:
    """A column of the table.

    metrics: the column shows the first of these names that the step reports.
    format: format of the number. Numbers wider than ``width`` lose digits.
    rank: on a narrow console the columns with the highest rank are dropped first."""

    title: str
    metrics: tuple[str, ...]
    format: str
    width: int
    rank: int

    def text(self, metrics: Mapping[str, float]) -> str:
        value = next((metrics[name] for name in self.metrics if name in metrics), None)
        return "" if value is None else number_text(value, self.format, self.width)


VALIDATION = "validation"  # mean over data sources of the core accuracy or reward
LEFT = "left"  # time left
COLUMNS = (
    Column("score", ("critic/score/mean",), ".3f", 6, 1),
    Column("valid", (VALIDATION,), ".3f", 6, 2),
    Column("loss", ("train/loss",), ".4f", 7, 1),
    Column("val loss", ("val/loss",), ".4f", 8, 2),
    Column("length", ("response_length/mean",), ",.0f", 6, 4),
    Column("clipped", ("response_length/clip_ratio",), ".1%", 7, 11),
    Column("KL ref", ("actor/reward_kl_penalty", "actor/kl_loss"), ".2g", 7, 6),
    Column("KL step", ("actor/ppo_kl",), ".2g", 7, 9),
    Column("entropy", ("actor/entropy",), ".3f", 7, 7),
    Column("grad", ("actor/grad_norm", "train/grad_norm"), ".3g", 8, 8),
    Column("critic grad", ("critic/grad_norm",), ".3g", 11, 10),
    Column("explained", ("critic/vf_explained_var",), ".2f", 9, 12),
    Column("tok/s/dev", ("perf/throughput",), ",.0f", 9, 5),
    Column("seconds", ("timing_s/step",), ".2f", 7, 3),
    Column("left", (LEFT,), "time", 8, 0),
)


def number_text(value: float, spec: str, width: int) -> str:
    """The number in at most ``width`` characters (at least 7), if necessary with fewer digits and an exponent."""
    if not math.isfinite(value):
        return str(value)
    if spec == "time":
        return duration_text(value)
    texts = [format(value, spec), *(format(value, f".{digits}e") for digits in range(width - 6, -1, -1))]
    return next((text for text in texts if len(text) <= width), texts[-1])


def duration_text(seconds: float) -> str:
    """The duration as h:mm:ss, or Nd h:mm:ss from one day on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02}:{rest:02}"


def validation_means(metrics: Mapping[str, float]) -> dict[str, float]:
    """{data source: value of ``val-core/{source}/{acc or reward}/mean@N``}"""
    means = {}
    for name, value in metrics.items():
        if name.startswith("val-core/"):
            source, _, statistic = name.removeprefix("val-core/").rsplit("/", 2)
            if statistic.startswith("mean@"):
                means[source] = value
    return means


class Rows:
    """Formats steps as lines of text. A column appears, with a new header, at the first step that has its metric."""

    def __init__(self, total_steps: int):
        self._total = total_steps
        self._step_width = max(len("step"), 2 * len(str(total_steps)) + 1)
        self._shown: set[Column] = set()
        self._header: str | None = None
        self._since_header = 0

    def lines(self, step: int, metrics: Mapping[str, float], left: float | None, width: int | None) -> list[Line]:
        """The step's row, after a header if one is due. Empty for a step without any metric of the table.

        left: remaining seconds. width: width of the console in characters, or None for no limit."""
        known = dict(metrics)
        if means := validation_means(metrics):
            known[VALIDATION] = fmean(means.values())
        if not any(name in known for column in COLUMNS for name in column.metrics):
            return []
        if left is not None:
            known[LEFT] = left
        self._shown |= {column for column in COLUMNS if column.text(known)}
        columns = self._fitting(width)
        header = self._line("step", [column.title.rjust(column.width) for column in columns])
        row = self._line(f"{step}/{self._total}", [column.text(known).rjust(column.width) for column in columns])
        self._since_header += 1
        lines = [(row, "")]
        if header != self._header or self._since_header > HEADER_EVERY:
            lines.insert(0, (header, "bold"))
            self._header, self._since_header = header, 1
        if len(means) > 1:
            sources = ", ".join(f"{source} {value:.3f}" for source, value in means.items())
            lines.append((" " * self._step_width + GAP + f"validation: {sources}", ""))
        return lines

    def _fitting(self, width: int | None) -> list[Column]:
        columns = [column for column in COLUMNS if column in self._shown]
        while width is not None and columns and self._width(columns) > width:
            columns.remove(max(columns, key=lambda column: column.rank))
        return columns

    def _width(self, columns: list[Column]) -> int:
        return self._step_width + sum(len(GAP) + column.width for column in columns)

    def _line(self, first: str, cells: list[str]) -> str:
        return GAP.join([first.rjust(self._step_width), *cells]).rstrip()

"""Draws the curves of a run as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.tracking.files import written_whole

Step = Mapping[str, float]
SMOOTHING = 0.08  # a moving average over this share of the steps


@dataclass(frozen=True)
class Series:
    """A metric in a panel.

    label: text in the legend.
    name: name of the metric, or a prefix with "*". A prefix matches all metrics whose last part starts with ``suffix``.
    noisy: the curve is faint, and its moving average is drawn over it."""

    label: str
    name: str
    suffix: str = ""
    noisy: bool = True


@dataclass(frozen=True)
class Panel:
    title: str
    series: tuple[Series, ...]
    unit: str = ""
    share: bool = False  # the axis shows 0 to 1 if all values lie there


PANELS = (
    Panel("Validation", (Series("", "val-core/*", "mean@", noisy=False),), share=True),
    Panel("Training score", (Series("mean of a step", "critic/score/mean"),), share=True),
    Panel("Loss", (Series("training", "train/loss"), Series("validation", "val/loss", noisy=False)), "nats a token"),
    Panel("Response length", (Series("mean", "response_length/mean"),), "tokens"),
    Panel(
        "KL divergence",
        (
            Series("from the reference", "actor/reward_kl_penalty"),
            Series("from the reference", "actor/kl_loss"),
            Series("of a step's update", "actor/ppo_kl"),
        ),
        "nats a token",
    ),
    Panel("Entropy", (Series("policy", "actor/entropy"),), "nats a token"),
)


def draw_curves(metrics: Sequence[Step], path: Path, title: str) -> bool:
    """Whether a PNG was written to ``path``; False if no panel has metrics. metrics: one dict per step, with "step"."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(panel, curves) for panel in PANELS if (curves := _curves(panel, metrics))]
    if not panels:
        return False
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10.4, 3.1 * rows + 0.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    grid = figure.add_gridspec(rows, 2)
    places = [
        (0, slice(None)),
        *((row, column) for row in range(1, rows) for column in (0, 1)),
    ]  # the first panel takes a whole row
    if len(panels) % 2 == 0:
        places[:1] = [(0, 0), (0, 1)]
    for place, (panel, curves) in zip(places, panels, strict=True):
        _draw_panel(figure.add_subplot(grid[place]), panel, curves)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png")
    return True


@dataclass(frozen=True)
class _Curve:
    label: str
    steps: list[float]
    values: list[float]
    noisy: bool


def _curves(panel: Panel, metrics: Sequence[Step]) -> list[_Curve]:
    curves = []
    for series in panel.series:
        for name in _names(series, metrics):
            points = [(step["step"], step[name]) for step in metrics if math.isfinite(step.get(name, math.nan))]
            label = series.label or name.removeprefix(series.name[:-1])
            if points:
                curves.append(_Curve(label, [x for x, _ in points], [y for _, y in points], series.noisy))
    return curves


def _names(series: Series, metrics: Sequence[Step]) -> list[str]:
    if not series.name.endswith("*"):
        return [series.name]
    found = dict.fromkeys(name for step in metrics for name in step if name.startswith(series.name[:-1]))
    return [name for name in found if name.rpartition("/")[2].startswith(series.suffix)]


def _draw_panel(axes: Any, panel: Panel, curves: list[_Curve]) -> None:
    for number, curve in enumerate(curves):
        color = f"C{number}"
        if curve.noisy:
            axes.plot(curve.steps, curve.values, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(curve.steps, moving_average(curve.values), color=color, linewidth=1.8, label=curve.label)
        else:
            axes.plot(curve.steps, curve.values, color=color, marker="o", markersize=4, label=curve.label)
            rises = curve.values[-1] >= curve.values[0]
            _mark(axes, curve.steps[0], curve.values[0], color, above=not rises)
            if len(curve.values) > 1:
                _mark(axes, curve.steps[-1], curve.values[-1], color, above=rises)
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.margins(y=0.12)  # room for the numbers at both ends of a curve
    axes.spines[["top", "right"]].set_visible(False)
    if panel.share and all(0 <= value <= 1 for curve in curves for value in curve.values):
        axes.set_ylim(-0.12, 1.12)
    if len(curves) > 1 or not curves[0].noisy:
        axes.legend(fontsize=8, frameon=False)


def _mark(axes: Any, step: float, value: float, color: str, *, above: bool) -> None:
    """Write a value at one end of a curve, above or below it."""
    axes.annotate(
        f"{value:.3f}",
        (step, value),
        xytext=(0, 6 if above else -13),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=color,
    )


def moving_average(values: Sequence[float]) -> list[float]:
    """Centered moving average over a ``SMOOTHING`` share of the values. The window is shorter at both ends."""
    half = round(len(values) * SMOOTHING / 2)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]

"""Writes the report of a run (``README.md``, ``curve.png``, ``samples.md``) from the files in its folder.

``python -m verl.tracking.report FOLDER`` writes it again, also while the run is still going.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.errors import UserError
from verl.tracking.columns import duration_text, validation_means
from verl.tracking.dumps import read_rows
from verl.tracking.files import written_whole
from verl.tracking.picture import Step, draw_curves

Row = Mapping[str, Any]
SAMPLES = 8
LONGEST_TEXT = 2000  # characters of a sample's text
OTHER_OUTCOMES = {"critic/score/mean": "training score", "train/loss": "loss", "val/loss": "validation loss"}


def write_report(folder: Path, *, title: str | None = None, validation: Path | None = None) -> Path:
    """Path of the README.md that was written. validation: folder of the validation dumps (default: folder/validation).

    Raises UserError without metrics.jsonl (the run had no "file" logger), or if a file cannot be read or written."""
    try:
        return _write_report(folder, title or folder.name, validation or folder / "validation")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the report in {folder} cannot be written: {error or type(error).__name__}") from error


def _write_report(folder: Path, title: str, validation: Path) -> Path:
    metrics = read_metrics(folder / "metrics.jsonl")
    has_curve = draw_curves(metrics, folder / "curve.png", title)
    dumps = validation_dumps(validation, metrics)
    if dumps:
        before, after = dumps[0], dumps[-1]
        text = samples_text(read_rows(before), read_rows(after), before.stem, after.stem)
        _write(folder / "samples.md", text)
    readme = folder / "README.md"
    _write(readme, summary_text(metrics, folder, title, has_curve=has_curve, has_samples=bool(dumps)))
    return readme


def read_metrics(path: Path) -> list[dict[str, float]]:
    """One dict per step, in order, with the step as "step". Lines of the same step are merged. Null becomes nan."""
    if not path.exists():
        raise UserError(f"{path} does not exist. The report needs the metrics that trainer.logger=[file] writes.")
    steps: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        step = steps.setdefault(int(record["step"]), {})
        step.update((name, math.nan if value is None else value) for name, value in record.items())
    return [steps[step] for step in sorted(steps)]


def validation_dumps(folder: Path, metrics: Sequence[Step]) -> list[Path]:
    """The dumps of the steps with a validation, in order. Dumps of an earlier run are left out."""
    steps = [int(step["step"]) for step in metrics if any(name.startswith("val-") for name in step)]
    paths = (folder / f"{step}.{suffix}" for step in steps for suffix in ("jsonl", "parquet"))
    return [path for path in paths if path.exists()]


def samples_text(before: Sequence[Row], after: Sequence[Row], first: str, last: str, count: int = SAMPLES) -> str:
    """Responses to the same prompts at step ``first`` and step ``last``. The prompts are spread evenly over the
    data, not selected by score. before, after: rows with input, output, gts and score (``generation_rows``)."""
    then, now = _by_input(before), _by_input(after)
    shared = [text for text in then if text in now]
    chosen = [shared[i * len(shared) // count] for i in range(count)] if len(shared) > count else shared
    parts = [
        f"# Samples at step {first} and step {last}",
        f"{len(chosen)} of {len(shared)} prompts, spread evenly over the validation data.",
    ]
    for number, text in enumerate(chosen, 1):
        parts += [f"## {number}", _fenced(text), f"Reference: `{then[text].get('gts')}`"]
        for step, row in ((first, then[text]), (last, now[text])):
            parts += [f"**Step {step}**, score {row['score']:g}", _fenced(row["output"])]
    return "\n\n".join(parts) + "\n"


def _by_input(rows: Sequence[Row]) -> dict[str, Row]:
    """{prompt: its first sample}"""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["input"], row)
    return first


def _fenced(text: str) -> str:
    """The text as a fenced Markdown block. The fence is longer than any run of backticks in the text."""
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT:,} more characters)"
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def summary_text(metrics: Sequence[Step], folder: Path, title: str, *, has_curve: bool, has_samples: bool) -> str:
    parts = [f"# {title}", _outcome(metrics)]
    if has_curve:
        parts.append("![curves](curve.png)")
    if rows := _stage_rows(metrics):
        parts += ["## Time by stage", "\n".join(["| stage | total | a step | share |", "|---|--:|--:|--:|", *rows])]
    parts += ["## Files", "\n".join(f"- {line}" for line in _files(folder, has_samples))]
    return "\n\n".join(parts) + "\n"


def _outcome(metrics: Sequence[Step]) -> str:
    """Lines with steps, time, and the first and last value of validation, score and loss."""
    lines = [f"- steps: {int(metrics[-1]['step'])}" if metrics else "- no step was logged"]
    seconds = sum(step.get("timing_s/step", 0.0) for step in metrics)
    if seconds:
        lines.append(f"- time in steps: {duration_text(seconds)}")
    validated = [(step["step"], validation_means(step)) for step in metrics]
    for source in dict.fromkeys(source for _, means in validated for source in means):
        points = [(step, means[source]) for step, means in validated if source in means]
        (first, start), (last, end) = points[0], points[-1]
        best_step, best = max(points, key=lambda point: point[1])
        at_best = f" (highest: {best:.3f} at step {best_step})" if best > max(start, end) else ""
        lines.append(f"- validation, {source}: **{start:.3f}** at step {first}, **{end:.3f}** at step {last}{at_best}")
    for name, label in OTHER_OUTCOMES.items():
        points = [(step["step"], step[name]) for step in metrics if name in step]
        if points:
            (first, start), (last, end) = points[0], points[-1]
            lines.append(f"- {label}: {start:.3f} at step {first}, {end:.3f} at step {last}")
    return "\n".join(lines)


def _stage_rows(metrics: Sequence[Step]) -> list[str]:
    """Table rows of timing_s/*: total, mean over the steps with the stage, share of the steps' time. Longest first, the
    whole step last."""
    times: dict[str, list[float]] = defaultdict(list)
    for step in metrics:
        for name, value in step.items():
            if name.startswith("timing_s/"):
                times[name.removeprefix("timing_s/")].append(value)
    whole = sum(times.get("step", []))
    return [
        f"| {stage} | {duration_text(sum(values))} | {sum(values) / len(values):.2f} s | "
        + (f"{sum(values) / whole:.1%} |" if whole else "|")
        for stage, values in sorted(times.items(), key=lambda item: (item[0] == "step", -sum(item[1])))
    ]


def _files(folder: Path, has_samples: bool) -> list[str]:
    lines = []
    if has_samples:
        lines.append("[samples.md](samples.md): responses to the same prompts at the first and the last validation")
    if (folder / "config.yaml").exists():
        lines.append("[config.yaml](config.yaml): the resolved configuration")
    lines.append("[metrics.jsonl](metrics.jsonl): all metrics of all steps")
    if (folder / "tensorboard").exists():
        lines.append(f"tensorboard: `tensorboard --logdir {folder / 'tensorboard'}`")
    checkpoints = [path for path in folder.glob("global_step_*") if path.name.rpartition("_")[2].isdigit()]
    if checkpoints:
        newest = max(checkpoints, key=lambda path: int(path.name.rpartition("_")[2]))
        lines.append(f"[{newest.name}]({newest.name}): the last checkpoint")
        for model in sorted(path.parent for path in newest.rglob("config.json") if "ForCausalLM" in path.read_text()):
            lines.append(f"the model: `transformers.AutoModelForCausalLM.from_pretrained({str(model)!r})`")
    return lines


def _write(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m verl.tracking.report", description="Write the report of a run again."
    )
    parser.add_argument("folder", type=Path, help="folder of the run, with metrics.jsonl")
    try:
        print(write_report(parser.parse_args().folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

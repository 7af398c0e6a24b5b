"""External experiment trackers: W&B, MLflow, SwanLab, Trackio. Each needs the extra of its name (``verl[wandb]``).

Their own environment variables decide where they write. By default, local files go to the run's folder. A resumed run
keeps its ids, which ``loggers.json`` in the folder stores.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from verl.tracking.backends import Backend
from verl.tracking.dumps import sample_text
from verl.tracking.files import written_whole
from verl.tracking.run import RunInfo

COLUMNS = {
    "prompt": "input",
    "response": "output",
    "score": "score",
    "reference": "gts",
}  # column of a table of samples -> field of a row
IDS = "loggers.json"


class _RunWithTables(Backend):
    """Base of the packages whose run object takes metrics and tables."""

    _run: Any
    _table: Any

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        columns, *values = _table(rows, step)
        self._run.log({"samples": self._table(columns=columns, data=values)}, step=step)

    def close(self) -> None:
        self._run.finish()


class WandbBackend(_RunWithTables):
    """Writes to ``wandb/``. With WANDB_MODE=offline the run stays there until ``wandb sync``. W&B's steps must
    increase, so it ignores a step that is repeated after a resume."""

    def __init__(self, run: RunInfo):
        import wandb

        self._table = wandb.Table
        self._run = wandb.init(
            project=run.project,
            name=run.experiment,
            id=run_id(run, "wandb"),
            resume="allow",
            dir=run.folder,
            config=run.config,
            settings=wandb.Settings(silent=True, console="off"),
        )


class MlflowBackend(Backend):
    """Writes to MLFLOW_TRACKING_URI, or to ``mlruns/``. In metric names, @ becomes ``_at_``, and other characters that
    MLflow rejects become ``_``."""

    def __init__(self, run: RunInfo):
        import mlflow
        from mlflow.entities import Metric, Param

        if not mlflow.is_tracking_uri_set():
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow otherwise asks for a server or a database
            mlflow.set_tracking_uri((run.folder / "mlruns").absolute().as_uri())
        self._client, self._metric = mlflow.MlflowClient(), Metric
        experiment = mlflow.set_experiment(run.project).experiment_id
        known = saved_ids(run).get("mlflow") if run.resume_step is not None else None
        self._id = known or self._client.create_run(experiment, run_name=run.experiment).info.run_id
        save_id(run, "mlflow", self._id)
        if known is None:
            params = iter([Param(key, str(value)[:6000]) for key, value in _flat(run.config)])
            while some := list(islice(params, 100)):  # MLflow's limit for one call
                self._client.log_batch(self._id, params=some)

    def log(self, metrics: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        named = {re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_")): value for name, value in metrics.items()}
        self._client.log_batch(
            self._id, metrics=[self._metric(name, value, now, step) for name, value in named.items()]
        )

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        columns, *values = _table(rows, step)
        cells = dict(zip(columns, map(list, zip(*values, strict=True)), strict=True))
        self._client.log_table(self._id, cells, "samples.json")

    def close(self) -> None:
        self._client.set_terminated(self._id)


class SwanLabBackend(Backend):
    """Writes to ``swanlab/``. With SWANLAB_MODE=offline the run stays there until ``swanlab sync``. Samples are texts,
    since SwanLab has no tables."""

    def __init__(self, run: RunInfo):
        import swanlab

        self._swanlab = swanlab
        swanlab.init(
            project=run.project,
            name=run.experiment,
            id=run_id(run, "swanlab"),
            resume="allow",
            log_dir=str(run.folder / "swanlab"),
            config=run.config,
            settings=swanlab.Settings(terminal={"proxy_type": "none"}),
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._swanlab.log(metrics, step=step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        self._swanlab.log({"samples": [self._swanlab.Text(sample_text(row, step)) for row in rows]}, step=step)

    def close(self) -> None:
        self._swanlab.finish()


class TrackioBackend(_RunWithTables):
    """Writes to TRACKIO_DIR, or to ``trackio/``; with TRACKIO_SPACE_ID, to that Space."""

    def __init__(self, run: RunInfo):
        os.environ.setdefault("TRACKIO_DIR", str(run.folder / "trackio"))  # trackio reads it at import
        import trackio

        self._table = trackio.Table
        self._run = trackio.init(
            project=run.project,
            name=run.experiment,
            config=run.config,
            resume="never" if run.resume_step is None else "allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )


SERVICES: dict[str, type[Backend]] = {
    "wandb": WandbBackend,
    "mlflow": MlflowBackend,
    "swanlab": SwanLabBackend,
    "trackio": TrackioBackend,
}


def missing_package(logger: str) -> bool:
    """Whether the logger needs a package that is not installed."""
    return logger in SERVICES and importlib.util.find_spec(logger) is None


# ---- ids of runs


def saved_ids(run: RunInfo) -> dict[str, str]:
    file = run.folder / IDS
    return json.loads(file.read_text()) if file.exists() else {}


def save_id(run: RunInfo, logger: str, value: str) -> None:
    with written_whole(run.folder / IDS) as partial:
        partial.write_text(json.dumps(saved_ids(run) | {logger: value}))


def run_id(run: RunInfo, logger: str) -> str:
    """The id of this logger's run: the saved one for a resumed run, otherwise a new one."""
    known = saved_ids(run).get(logger) if run.resume_step is not None else None
    chosen = known or uuid.uuid4().hex[:8]
    save_id(run, logger, chosen)
    return chosen


# ---- contents


def _table(rows: Sequence[Mapping[str, Any]], step: int) -> list[list[Any]]:
    """The column names, then one list per sample."""
    return [["step", *COLUMNS], *([step, *(row.get(name) for name in COLUMNS.values())] for row in rows)]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

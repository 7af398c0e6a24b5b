"""Experiment trackers of others: W&B, MLflow, SwanLab, Trackio. Each needs the extra of its name (``verl[wandb]``).

Where they write is decided as their own documentation says, by their environment variables; without any of them, what
is kept on this machine is in the run's folder. A run that goes on does so under the same id, which the folder keeps.
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

COLUMNS = {"prompt": "input", "response": "output", "score": "score", "reference": "gts"}  # of a table of samples
IDS = "loggers.json"


class _RunWithTables(Backend):
    """Of packages whose run takes metrics and tables in one way."""

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
    """``wandb/``. WANDB_MODE=offline keeps it there for ``wandb sync``. A step that is done again after a resume is not
    taken a second time: W&B's steps only grow."""

    def __init__(self, run: RunInfo):
        import wandb

        self._table = wandb.Table
        self._run = wandb.init(
            project=run.project,
            name=run.experiment,
            id=id_in(run, "wandb"),
            resume="allow",
            dir=run.folder,
            config=run.config,
            settings=wandb.Settings(silent=True, console="off"),
        )


class MlflowBackend(Backend):
    """At MLFLOW_TRACKING_URI, else in ``mlruns/``. Characters of a metric's name that MLflow refuses become ``_at_``
    (@) or ``_``."""

    def __init__(self, run: RunInfo):
        import mlflow
        from mlflow.entities import Metric, Param

        if not mlflow.is_tracking_uri_set():
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a server or a database is for the user to run
            mlflow.set_tracking_uri((run.folder / "mlruns").absolute().as_uri())
        self._client, self._metric = mlflow.MlflowClient(), Metric
        experiment = mlflow.set_experiment(run.project).experiment_id
        known = kept_ids(run).get("mlflow") if run.resume_step is not None else None
        self._id = known or self._client.create_run(experiment, run_name=run.experiment).info.run_id
        keep_id(run, "mlflow", self._id)
        if known is None:
            params = iter([Param(key, str(value)[:6000]) for key, value in _flat(run.config)])
            while some := list(islice(params, 100)):  # as many as MLflow takes at a time
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
    """``swanlab/``. SWANLAB_MODE=offline keeps it there for ``swanlab sync``. Samples are texts: it has no tables."""

    def __init__(self, run: RunInfo):
        import swanlab

        self._swanlab = swanlab
        swanlab.init(
            project=run.project,
            name=run.experiment,
            id=id_in(run, "swanlab"),
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
    """In TRACKIO_DIR, else in ``trackio/``; on a Space where TRACKIO_SPACE_ID names one."""

    def __init__(self, run: RunInfo):
        os.environ.setdefault("TRACKIO_DIR", str(run.folder / "trackio"))  # read once, as trackio is imported
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
    """Whether the package of this name's extra is not installed."""
    return logger in SERVICES and importlib.util.find_spec(logger) is None


# ---- ids of runs


def kept_ids(run: RunInfo) -> dict[str, str]:
    file = run.folder / IDS
    return json.loads(file.read_text()) if file.exists() else {}


def keep_id(run: RunInfo, logger: str, value: str) -> None:
    with written_whole(run.folder / IDS) as partial:
        partial.write_text(json.dumps(kept_ids(run) | {logger: value}))


def id_in(run: RunInfo, logger: str) -> str:
    """The id that this logger's run had, where the run goes on; else a new one."""
    known = kept_ids(run).get(logger) if run.resume_step is not None else None
    chosen = known or uuid.uuid4().hex[:8]
    keep_id(run, logger, chosen)
    return chosen


# ---- what is told


def _table(rows: Sequence[Mapping[str, Any]], step: int) -> list[list[Any]]:
    """The columns' names, then a list a sample."""
    return [["step", *COLUMNS], *([step, *(row.get(name) for name in COLUMNS.values())] for row in rows)]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

"""Experiment trackers of others, with their real packages, writing to this machine: what was logged is read back by
each package's own means. One that is not installed is passed over."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl.errors import UserError
from verl.tracking import build_trackers
from verl.tracking.services import SERVICES

CONFIG = {"data": {"train_batch_size": 4096}, "trainer": {"logger": ["console"]}}
SAMPLE = {"input": "1+1?", "output": "#### 2", "gts": "2", "score": 0.5, "step": 3}
SESSION = """
import json, sys
from pathlib import Path
from verl.tracking import RunInfo, build_trackers

asked = json.loads(sys.argv[1])
run = RunInfo("gsm8k", "demo", Path(asked["folder"]), asked["config"], 20, asked["resume_step"])
with build_trackers([asked["logger"]], run) as trackers:
    for step in range(*asked["steps"]):
        trackers.log({"critic/score/mean": step / 4, "val-core/openai/gsm8k/acc/mean@1": 1 / (1 + step)}, step)
    trackers.log_samples([asked["sample"]], step)
"""

# Each prints {"metrics": [[step, name, value], ...], "samples": ..., "config": ..., "runs": how many}.
READERS = {
    "wandb": """
import json, struct, sys
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record

def records(file):
    # W&B's transaction log: 7 bytes of header; blocks of 32 KiB of (crc, length, kind) and data; kind 1: whole, 4: last
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""

metrics, config, ids, folder = [], {}, set(), Path(sys.argv[1]) / "wandb"
for file in sorted(folder.glob("offline-run-*/*.wandb")):
    for record in records(file):
        if record.HasField("run"):
            ids.add(record.run.run_id)
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        metrics += [[items["_step"], name, items[name]] for name in items if "/" in name and "samples" not in name]
samples = [json.loads(table.read_text()) for table in folder.glob("offline-run-*/files/media/table/*.json")]
print(json.dumps({"metrics": metrics, "samples": samples, "config": config, "runs": len(ids)}))
""",
    "mlflow": """
import json, os, sys
from pathlib import Path
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
from mlflow import MlflowClient

uri = (Path(sys.argv[1]) / "mlruns").as_uri()
client = MlflowClient(uri)
runs = client.search_runs([client.get_experiment_by_name("gsm8k").experiment_id])
run = runs[0]
histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
metrics = [[point.step, name, point.value] for name, history in histories.items() for point in history]
samples = json.loads(Path(client.download_artifacts(run.info.run_id, "samples.json", sys.argv[1])).read_text())
print(json.dumps({"metrics": metrics, "samples": samples, "config": run.data.params, "runs": len(runs)}))
""",
    "swanlab": """
import json, sys
from pathlib import Path
import yaml
from swanlab.proto.swanlab.record.v1.record_pb2 import Record
from swanlab.sdk.internal.core_python.store import DataStoreReader

metrics, ids, folder = [], set(), Path(sys.argv[1]) / "swanlab"
for file in sorted(folder.glob("*/*.swanlab")):
    reader = DataStoreReader()
    reader.open(file)
    for record in map(Record.FromString, reader):
        if record.HasField("start"):
            ids.add(record.start.id)
        if record.HasField("scalar"):
            metrics.append([record.scalar.step, record.scalar.key, record.scalar.value.number])
samples = [path.read_text() for path in folder.glob("*/media/text/*.txt")]
config = yaml.safe_load(next(folder.glob("*/files/config.yaml")).read_text())
print(json.dumps({"metrics": metrics, "samples": samples, "config": config, "runs": len(ids)}))
""",
    "trackio": """
import json, os, sys
os.environ["TRACKIO_DIR"] = sys.argv[1] + "/trackio"
from trackio.sqlite_storage import SQLiteStorage

logs = SQLiteStorage.get_logs("gsm8k", "demo")
metrics = [[line["step"], name, value] for line in logs for name, value in line.items() if "/" in name]
samples = [line["samples"]["_value"] for line in logs if "samples" in line]
config = SQLiteStorage.get_run_config("gsm8k", "demo")
runs = len(SQLiteStorage.get_run_records("gsm8k"))
print(json.dumps({"metrics": metrics, "samples": samples, "config": config, "runs": runs}))
""",
}


def python(script: str, *arguments: str, repository: Path) -> str:
    own = ("WANDB_", "MLFLOW_", "SWANLAB_", "TRACKIO_")  # what this machine's user has chosen
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    environment |= {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: logger" not in done.stdout
    return done.stdout


@pytest.fixture(params=SERVICES)
def logger(request) -> str:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


def log(logger: str, folder: Path, steps: tuple[int, int], repository: Path, resume_step: int | None = None) -> None:
    asked = {"logger": logger, "folder": str(folder), "steps": steps, "resume_step": resume_step}
    python(SESSION, json.dumps(asked | {"config": CONFIG, "sample": SAMPLE}), repository=repository)


def read(logger: str, folder: Path, repository: Path) -> dict:
    return json.loads(python(READERS[logger], str(folder), repository=repository).splitlines()[-1])


def expected(logger: str, steps: range) -> set[tuple[int, str, float]]:
    accuracy = "val-core/openai/gsm8k/acc/mean" + ("_at_1" if logger == "mlflow" else "@1")
    return {(step, "critic/score/mean", step / 4) for step in steps} | {
        (step, accuracy, 1 / (1 + step)) for step in steps
    }


def test_what_was_logged_can_be_read_back(logger, tmp_path, repository):
    log(logger, tmp_path, (0, 4), repository)
    found = read(logger, tmp_path, repository)
    metrics = {(step, name): value for step, name, value in found["metrics"]}
    assert metrics == {(step, name): pytest.approx(value) for step, name, value in expected(logger, range(4))}
    for word in ("1+1?", "#### 2", "0.5"):
        assert word in str(found["samples"])
    assert "4096" in str(found["config"])
    assert not (repository / "wandb").exists()
    assert not (repository / "mlruns").exists()


def test_a_run_that_goes_on_is_the_same_run_there(logger, tmp_path, repository):
    log(logger, tmp_path, (0, 3), repository)
    log(logger, tmp_path, (3, 5), repository, resume_step=2)
    found = read(logger, tmp_path, repository)
    assert found["runs"] == 1
    assert {(step, name) for step, name, _ in found["metrics"]} == {key[:2] for key in expected(logger, range(5))}


def test_a_new_run_in_the_same_folder_is_another_run_there(logger, tmp_path, repository):
    for _ in range(2):
        log(logger, tmp_path, (0, 1), repository)
    assert read(logger, tmp_path, repository)["runs"] == 2


@pytest.mark.parametrize("name", SERVICES)
def test_a_missing_package_is_named_with_its_extra_before_anything_starts(make_run, monkeypatch, name):
    monkeypatch.setattr("verl.tracking.services.importlib.util.find_spec", lambda package: None)
    with pytest.raises(UserError) as error:
        build_trackers(["file", name], make_run())
    assert f"{name!r}: its package is not installed" in str(error.value)
    assert f'pip install "verl[{name}]"' in str(error.value)
    assert not make_run().folder.exists()

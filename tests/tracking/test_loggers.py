"""The loggers, with real files: what they hold afterwards, after a resume, and when they cannot write."""

import json
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from verl.errors import UserError
from verl.tracking import StageTimer, build_trackers


def metrics_of(step):
    return {"critic/score/mean": math.sqrt(step), "val-core/openai/gsm8k/acc/mean@1": 1 / (1 + step), "actor/lr": 1e-6}


def log_steps(run, steps, names=("file", "tensorboard")):
    with build_trackers(list(names), run) as trackers:
        for step in steps:
            trackers.log(metrics_of(step), step)


def scalars(run):
    events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_file_has_a_line_a_step_with_the_metrics_by_name(make_run):
    run = make_run()
    log_steps(run, range(3))
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": step, **metrics_of(step)} for step in range(3)]
    assert all(list(json.loads(line)) == ["step", *sorted(metrics_of(0))] for line in lines)


def test_numbers_of_numpy_and_torch_are_logged_and_one_that_is_not_finite_is_null(make_run):
    run = make_run()
    with build_trackers(["file", "tensorboard"], run) as trackers:
        trackers.log({"a": np.float32(0.5), "b": torch.tensor(2.0), "c": np.int64(3), "d": math.nan, "e": math.inf}, 1)
    line = (run.folder / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "a": 0.5, "b": 2.0, "c": 3.0, "d": None, "e": None}
    assert "NaN" not in line


def test_tensorboard_holds_every_metric_of_every_step(make_run):
    run = make_run(config={"data": {"train_batch_size": 4096}})
    log_steps(run, range(20))
    found = scalars(run)
    assert set(found) == set(metrics_of(0))
    for name, points in found.items():
        assert points == [(step, pytest.approx(metrics_of(step)[name])) for step in range(20)]


def test_tensorboard_shows_the_configuration_and_samples_as_text(make_run):
    run = make_run(config={"data": {"train_batch_size": 4096}})
    with build_trackers(["tensorboard"], run) as trackers:
        trackers.log_samples([{"input": "1+1?", "output": "#### 2", "gts": "2", "score": 1.0}], 5)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    (config,), (sample,) = events.Tensors("config"), events.Tensors("samples/0")
    assert b"train_batch_size: 4096" in config.tensor_proto.string_val[0]
    assert sample.step == 5
    assert b"#### 2" in sample.tensor_proto.string_val[0]


def test_a_resumed_run_leaves_the_same_file_and_curves_as_one_that_never_stopped(make_run, tmp_path):
    whole, resumed = make_run(folder=tmp_path / "whole"), make_run(folder=tmp_path / "resumed")
    log_steps(whole, range(20))
    log_steps(resumed, range(13))  # the last checkpoint was of step 8
    log_steps(make_run(folder=tmp_path / "resumed", resume_step=8), range(9, 20))
    assert (resumed.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
    assert scalars(resumed) == scalars(whole)


def test_a_line_that_was_cut_off_is_dropped_on_resume(make_run):
    run = make_run()
    log_steps(run, range(4), ["file"])
    path = run.folder / "metrics.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + b'{"step": 2, "critic/sc')
    log_steps(make_run(resume_step=3), [], ["file"])
    assert path.read_bytes() == good


def test_a_new_run_in_the_same_folder_keeps_the_earlier_metrics_aside(make_run):
    run = make_run()
    log_steps(run, range(20))
    earlier = (run.folder / "metrics.jsonl").read_bytes()
    log_steps(run, range(5))
    assert (run.folder / "metrics.previous.jsonl").read_bytes() == earlier
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 5
    assert [step for step, _ in scalars(run)["actor/lr"]] == [0, 1, 2, 3, 4]


def test_an_unknown_logger_is_named_with_those_that_are_known(make_run):
    with pytest.raises(UserError) as error:
        build_trackers(["console", "tensorbord", "nonsense"], make_run())
    assert "'tensorbord'" in str(error.value)
    assert "did you mean 'tensorboard'?" in str(error.value)
    assert "'nonsense'" in str(error.value)
    assert "console, file, tensorboard" in str(error.value)


@pytest.mark.parametrize("name", ["file", "tensorboard"])
def test_a_logger_that_cannot_start_is_an_error_before_training(make_run, tmp_path, name):
    (tmp_path / "in_the_way").write_text("a file, not a folder")
    with pytest.raises(UserError, match=f"'{name}' cannot start"):
        build_trackers([name], make_run(folder=tmp_path / "in_the_way" / "run"))


FULL_DISK = """
import resource
from pathlib import Path
from verl.tracking import RunInfo, build_trackers

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

folder = Path({folder!r})
with build_trackers(["file", "tensorboard"], RunInfo("p", "e", folder, total_steps=400)) as trackers:
    for step in range(400):
        if step == 200:
            limit(20_000)  # as a full disk: writes past this size fail
        trackers.log({{f"a/metric_{{i}}": step + i / 7 for i in range(5)}}, step)
        if step in (10, 250, 260):
            trackers.dump(folder / "rollouts", step, [{{"output": "x" * 50_000}}])
        if step == 300 and {space_again}:
            limit(resource.RLIM_INFINITY)
print("the run ended well")
"""


def run_on_a_full_disk(folder, repository, *, space_again):
    script = textwrap.dedent(FULL_DISK.format(folder=str(folder), space_again=space_again))
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("the run ended well") == 1
    return done.stdout


def test_a_disk_that_fills_up_warns_once_for_each_logger_and_the_run_goes_on(tmp_path, repository):
    shown = run_on_a_full_disk(tmp_path, repository, space_again=False)
    for what in ("logger 'file' failed", "logger 'tensorboard' failed", f"the dump to {tmp_path / 'rollouts'} failed"):
        assert shown.count(what) == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > 20
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))  # whole lines only
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["10.jsonl"]


def test_when_the_disk_has_space_again_nothing_is_missing(tmp_path, repository, make_run):
    run_on_a_full_disk(tmp_path, repository, space_again=True)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(400))
    assert [step for step, _ in scalars(make_run(folder=tmp_path))["a/metric_4"]] == list(range(400))


def test_the_timer_adds_up_the_seconds_of_each_stage_also_of_one_that_fails():
    timer = StageTimer()
    for _ in range(2):
        with timer("gen"), timer("decode"):
            pass
    with pytest.raises(RuntimeError), timer("reward"):
        raise RuntimeError
    assert list(timer.seconds) == ["decode", "gen", "reward"]
    assert timer.seconds["gen"] >= timer.seconds["decode"] >= 0

"""What a run tells its user, while it goes and afterwards.

    run = RunInfo(project, experiment, folder, config, total_steps, resume_step)
    with build_trackers(["console", "file", "tensorboard"], run) as trackers:
        ...
        timer = StageTimer()
        with timer("gen"), trackers.progress.stage("rollout", total=128) as stage:
            stage.advance(tokens=311)  # one more response is finished
        ...
        trackers.log(metrics, step)  # to every logger; the console prints its row and moves its bar
        rows = generation_rows(table, decode, step)
        trackers.dump(folder / "validation", step, rows)  # every sample, as a file
        trackers.log_samples(rows[:3], step)  # some, for the console and tensorboard's text page
    write_report(folder)

A run's folder:

    config.yaml              the resolved configuration (written by the trainer)
    metrics.jsonl            one line a step: {"step": 3, "actor/entropy": 0.61, ...} (logger "file")
    metrics.previous.jsonl   of an earlier run that a new one in the same folder replaced
    tensorboard/             event files (logger "tensorboard")
    validation/{step}.jsonl  generations, one JSON object a line
    rollouts/{step}.jsonl    likewise, of training steps, where trainer.rollout_data_dir points here
    global_step_{N}/         checkpoints (written by the trainer)
    curve.png, samples.md, README.md   the report at the end
"""

from verl.tracking.progress import Progress
from verl.tracking.run import RunInfo
from verl.tracking.timers import StageTimer
from verl.tracking.trackers import LOGGERS, Trackers, build_trackers

__all__ = ["LOGGERS", "Progress", "RunInfo", "StageTimer", "Trackers", "build_trackers"]

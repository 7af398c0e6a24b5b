"""Progress, metrics and reports of a run.

    run = RunInfo(project, experiment, folder, config, total_steps, resume_step)
    with build_trackers(["console", "file", "tensorboard"], run) as trackers:
        ...
        timer = StageTimer()
        with timer("gen"), trackers.progress.stage("rollout", total=128) as stage:
            stage.advance(tokens=311)  # one more response is finished
        ...
        trackers.log(metrics, step)  # to every logger; the console prints a row and advances its bar
        rows = generation_rows(table, decode, step)
        trackers.dump(folder / "validation", step, rows)  # all samples, as a file
        trackers.log_samples(rows[:3], step)  # a few, to every logger that shows texts or tables
    write_report(folder)

docs/tracking.md lists the files in a run's folder.
"""

from verl.tracking.progress import Progress
from verl.tracking.run import RunInfo
from verl.tracking.services import missing_package
from verl.tracking.timers import StageTimer
from verl.tracking.trackers import LOGGERS, Trackers, build_trackers, how_to_install

__all__ = [
    "LOGGERS",
    "Progress",
    "RunInfo",
    "StageTimer",
    "Trackers",
    "build_trackers",
    "how_to_install",
    "missing_package",
]

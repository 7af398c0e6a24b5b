"""What every training run does around its trainer, whatever it trains: its folder, where it starts, its last words."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from verl.config.loading.dump import resolved_yaml
from verl.config.sections.models import Config, SFTConfig
from verl.config.sections.trainer import RunConfig
from verl.errors import UserError
from verl.findings import Findings
from verl.tracking import RunInfo
from verl.tracking.files import written_whole
from verl.tracking.report import write_report
from verl.trainer.checkpoints import Checkpoint, Checkpoints
from verl.trainer.interrupt import INTERRUPTED


def say(findings: Findings) -> None:
    for kind, texts in (
        ("notice", findings.notices),
        ("warning", findings.warnings),
        ("not checked", findings.unchecked),
    ):
        for text in texts:
            print(f"{kind}: {text}")


def run_folder(config: Config | SFTConfig, set_keys: Iterable[str]) -> Path:
    """trainer.default_local_dir, made, with the resolved configuration in it."""
    folder = folder_of(config.trainer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / "config.yaml") as partial:
            partial.write_text(resolved_yaml(config, set_keys))
    except OSError as error:
        raise UserError(f"trainer.default_local_dir={folder} cannot be written to: {error}") from error
    return folder


def folder_of(trainer: RunConfig) -> Path:
    return Path(trainer.default_local_dir).expanduser()


def where_to_start(trainer: RunConfig, checkpoints: Checkpoints, last_step: int) -> Checkpoint | None:
    """The checkpoint that trainer.resume_mode asks for; None: from the beginning. Says so if it is the run's end."""
    if trainer.resume_mode == "disable":
        return None
    if trainer.resume_mode == "resume_path" and trainer.resume_from_path:
        start: Checkpoint | None = checkpoints.at(Path(trainer.resume_from_path).expanduser())
    else:
        start = checkpoints.latest(warn=lambda text: print(f"warning: {text}"))
    if start and start.step >= last_step:
        print(f"{start.folder} is the end of this run: nothing to do (trainer.resume_mode=disable starts anew)")
    return start


def run_info(config: Config | SFTConfig, folder: Path, last_step: int, start: Checkpoint | None) -> RunInfo:
    return RunInfo(
        project=config.trainer.project_name,
        experiment=config.trainer.experiment_name,
        folder=folder,
        config=config.model_dump(mode="json"),
        total_steps=last_step,
        resume_step=start.step if start else None,
    )


def finishes(fit: Callable[[], bool], abandon: Callable[[], None] = lambda: None) -> bool:
    """Whether ``fit`` says so; a second Ctrl-C ends it without, and abandons what it was waiting for."""
    try:
        return fit()
    except KeyboardInterrupt:
        abandon()
        return False


def close_run(
    trainer: RunConfig,
    checkpoints: Checkpoints,
    step: int,
    finished: bool,
    *,
    validation: Path | None = None,
    skipped: Mapping[str, int] = MappingProxyType({}),
) -> int:
    """Writes the report, says where everything is, and returns the exit code. step: the last one begun. skipped:
    optimizer steps that were skipped, by model."""
    folder = checkpoints.folder
    texts = [
        f"warning: {count} optimizer steps of the {role} were skipped, because their gradients were not finite"
        for role, count in skipped.items()
        if count
    ]
    if "file" in trainer.logger:
        try:
            write_report(folder, validation=validation)
        except UserError as error:  # the run is over and its result safe
            texts.append(f"warning: no report was written: {error}")
    texts.append(closing_words(trainer, folder, checkpoints.all(), step, finished))
    last_words("\n".join(texts))
    return 0 if finished else INTERRUPTED


def last_words(text: str) -> None:
    """Print; to stderr when stdout's reader is gone, as `tee` is after Ctrl-C."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the interpreter flushes it once more at its end)
        print(text, file=sys.stderr)


def closing_words(trainer: RunConfig, folder: Path, kept: list[Checkpoint], step: int, finished: bool) -> str:
    where = f"Everything is in {folder}" + (f", the last checkpoint in {kept[-1].folder.name}" if kept else "")
    if finished:
        return f"Finished after step {step}. {where}{'' if kept else '; no checkpoint was saved (trainer.save_freq)'}."
    if kept and trainer.resume_mode == "auto":
        advice = f"The same command goes on from step {kept[-1].step + 1}."
    elif kept:
        advice = f"With trainer.resume_mode=auto the same command goes on from step {kept[-1].step + 1}."
    elif trainer.save_freq > 0:
        advice = "No checkpoint was written yet: the same command starts from the beginning."
    else:
        advice = (
            "No checkpoint was written, so the same command starts from the beginning: "
            "set trainer.save_freq to be able to go on."
        )
    return f"Stopped in or after step {step}. {where}. {advice}"

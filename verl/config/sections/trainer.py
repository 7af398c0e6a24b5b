"""The run: its length, devices, validation, logging and checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen
from pydantic import BeforeValidator, Field

from verl.config.sections.base import Device, PositiveInt, Section, Strings, as_list, derived

Frequency = Annotated[int, Ge(-1)]
DumpFormats = Annotated[list[Literal["jsonl", "parquet"]], MinLen(1), BeforeValidator(as_list)]


class RunConfig(Section):
    """What every entry point's trainer has."""

    project_name: str = Field("verl", description="Name of the project, in logs and paths.")
    experiment_name: str = Field("ppo", description="Name of the run within the project.")
    total_training_steps: PositiveInt | None = Field(None, description="Steps of the run; null: total_epochs decides.")
    total_epochs: PositiveInt = Field(30, description="Passes over the training data.")
    device: Device = Field("auto", description="Where models live; auto: cuda where there is a GPU, else cpu.")
    seed: int = Field(1, ge=0, description="Every random draw of the run follows from it.")
    logger: Strings = Field(
        ["console", "file"],
        description="Where metrics go: console, file (JSON lines), tensorboard, wandb, mlflow, swanlab, trackio.",
    )
    default_local_dir: str = derived("Folder of the run: checkpoints, metrics, samples.")
    save_freq: Frequency = Field(
        -1, description="Save a checkpoint every so many steps and at the end; -1 or 0: never."
    )
    test_freq: Frequency = Field(-1, description="Validate every so many steps and at the end; -1 or 0: never.")
    max_ckpt_to_keep: PositiveInt | None = Field(None, description="Checkpoints to keep, the newest; null: all.")
    resume_mode: Literal["auto", "disable", "resume_path"] = Field(
        "auto",
        description="Start from the newest checkpoint in default_local_dir, from none, or from resume_from_path.",
    )
    resume_from_path: str | None = Field(None, description="Checkpoint folder (.../global_step_N) to start from.")
    dry_run: bool = Field(False, description="Check everything, print the plan of the run and stop.")


class PlacementConfig(Section):
    """Where ranks are."""

    nnodes: PositiveInt = Field(1, description="Machines.")
    n_gpus_per_node: PositiveInt = Field(1, description="GPUs (or CPU ranks) of each machine.")
    executor: Literal["auto", "local", "ray"] = Field(
        "auto", description="Where ranks live; auto: in this process for one device, else under Ray."
    )
    worker_timeout: float = Field(
        1800.0, gt=0, description="Seconds that one call to the ranks may take; then the run ends, with their stacks."
    )


class TrainerConfig(PlacementConfig, RunConfig):
    rollout_restarts: int = Field(2, ge=0, description="Times that a rollout replica which died is started again.")
    critic_warmup: int = Field(0, ge=0, description="The actor is trained from this step on; before, only the critic.")
    balance_batch: bool = Field(
        True, description="Share a mini-batch's responses over the ranks so that tokens even out."
    )
    check_log_probs: bool = Field(
        True,
        description="Before the first step, draw a few responses and stop if the engine's log-probs of them are not "
        "the trainer's.",
    )
    check_weights: Literal["first", "always", "never"] = Field(
        "first",
        description="Compare checksums of all tensors that the rollout engine holds with the actor's, after the first "
        "weight update or every one, and stop if any differs.",
    )
    val_before_train: bool = Field(True, description="Validate before the first step.")
    log_val_generations: int = Field(0, ge=0, description="Validation samples that go to the loggers.")
    rollout_data_dir: str | None = Field(None, description="Folder for every step's responses; null: not kept.")
    validation_data_dir: str | None = Field(
        None, description="Folder for validation's responses; null: in the run's folder."
    )
    generations_format: DumpFormats = Field(
        ["jsonl"], description="Files of responses in these folders: jsonl, parquet or both."
    )
    default_hdfs_dir: str | None = Field(None, description="Must be null: checkpoints go to default_local_dir.")


class SFTTrainerConfig(RunConfig):
    experiment_name: str = Field("sft", description="Name of the run within the project.")
    total_epochs: PositiveInt = Field(1, description="Passes over the training data.")
    save_freq: Frequency = Field(
        -1, description="Save a checkpoint every so many steps; there is always one at the end, whatever this says."
    )


class RayKwargsConfig(Section):
    ray_init: dict[str, Any] = Field(
        {},
        description="Arguments of ray.init: address, num_cpus, ... (where Ray runs already: only those of joining it).",
    )

"""The run: its length, devices, validation, logging and checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen
from pydantic import BeforeValidator, Field

from verl.config.sections.base import Device, PositiveInt, Section, Strings, as_list, derived
from verl.config.sections.effects import NO_CHECKPOINT, NO_RAY, NOT_VALIDATED, NoEffect

Frequency = Annotated[int, Ge(-1)]
DumpFormats = Annotated[list[Literal["jsonl", "parquet"]], MinLen(1), BeforeValidator(as_list)]

STEPS_SET = NoEffect(
    "trainer.total_training_steps is set",
    lambda trainer, run: trainer.total_training_steps is not None,
)
NOT_RESUMED_FROM = NoEffect(
    "it is read with trainer.resume_mode=resume_path only", lambda trainer, run: trainer.resume_mode != "resume_path"
)
IN_THE_RANKS = NoEffect(
    "the engine is embedded: it lives in the ranks and ends only with a rank", lambda trainer, run: run.engine == "hf"
)
NO_WEIGHT_SYNC = NoEffect(
    "the engine is embedded (actor_rollout_ref.rollout.name=hf): it runs the trainer's own model",
    lambda trainer, run: run.engine == "hf",
)
NO_CRITIC = NoEffect(
    "no critic is built, the advantages need none (algorithm.adv_estimator, critic.enable)",
    lambda section, run: "critic" not in run.roles,
    spared=("enable",),
)
ONE_RANK = NoEffect("there is one rank", lambda trainer, run: run.world_size == 1)
NO_SAMPLES_LOGGED = NoEffect(
    "no logger of this run shows samples (all but file do)", lambda trainer, run: set(trainer.logger) <= {"file"}
)
NO_RESPONSES_WRITTEN = NoEffect(
    "no responses are written (trainer.rollout_data_dir is null, and nothing is validated)",
    lambda trainer, run: not run.validates and trainer.rollout_data_dir is None,
)
NO_VALIDATION_FILES = NoEffect(
    "there is nothing to validate on (data.val_files)", lambda trainer, run: not run.value("data.val_files")
)


class RunConfig(Section):
    """The trainer's keys in every entry point that trains."""

    project_name: str = Field("verl", description="Name of the project, in logs and paths.")
    experiment_name: str = Field("ppo", description="Name of the run within the project.")
    total_training_steps: PositiveInt | None = Field(None, description="Steps of the run; null: total_epochs decides.")
    total_epochs: Annotated[PositiveInt, STEPS_SET] = Field(30, description="Passes over the training data.")
    device: Device = Field("auto", description="Device of the models; auto: cuda if there is a GPU, else cpu.")
    seed: int = Field(1, ge=0, description="Every random number of the run follows from it.")
    logger: Strings = Field(
        ["console", "file"],
        description="Destinations of metrics: console, file (JSON lines), tensorboard, wandb, mlflow, swanlab or "
        "trackio.",
    )
    default_local_dir: str = derived("Folder of the run: checkpoints, metrics, samples.")
    save_freq: Frequency = Field(
        -1, description="Number of steps between checkpoints; one is also saved at the end. -1 or 0: never."
    )
    test_freq: Frequency = Field(
        -1, description="Number of steps between validations; one also runs at the end. -1 or 0: never."
    )
    max_ckpt_to_keep: Annotated[PositiveInt | None, NO_CHECKPOINT] = Field(
        None, description="Number of newest checkpoints to keep; null: all."
    )
    resume_mode: Literal["auto", "disable", "resume_path"] = Field(
        "auto",
        description="Checkpoint to start from; auto: the newest in default_local_dir; disable: none; resume_path: "
        "resume_from_path.",
    )
    resume_from_path: Annotated[str | None, NOT_RESUMED_FROM] = Field(
        None, description="Checkpoint folder (.../global_step_N) to start from."
    )
    dry_run: bool = Field(False, description="Check everything, print the plan of the run and stop.")


class PlacementConfig(Section):
    """Placement of the ranks."""

    nnodes: PositiveInt = Field(1, description="Number of machines.")
    n_gpus_per_node: PositiveInt = Field(1, description="GPUs (or CPU ranks) per machine.")
    executor: Literal["auto", "local", "ray"] = Field(
        "auto", description="Where ranks run; auto: in this process for one device, else under Ray."
    )
    worker_timeout: Annotated[float, NO_RAY] = Field(
        1800.0,
        gt=0,
        description="Seconds that one call to the ranks may take. After that the run ends and prints their stacks.",
    )


class TrainerConfig(PlacementConfig, RunConfig):
    rollout_restarts: Annotated[int, NO_RAY, IN_THE_RANKS] = Field(
        2, ge=0, description="Number of times that a dead rollout replica is started again."
    )
    critic_warmup: Annotated[int, NO_CRITIC] = Field(
        0, ge=0, description="First step that trains the actor. Earlier steps train only the critic."
    )
    balance_batch: Annotated[bool, ONE_RANK] = Field(
        True, description="Share a mini-batch's responses over the ranks so that their token counts are nearly equal."
    )
    check_log_probs: bool = Field(
        True,
        description="Before the first step, generate a few responses and stop if the engine's log-probs differ from "
        "the trainer's.",
    )
    check_weights: Annotated[Literal["first", "always", "never"], NO_WEIGHT_SYNC] = Field(
        "first",
        description="Compare checksums of all tensors of the rollout engine with the actor's after the first weight "
        "update or after every one, and stop if any differs.",
    )
    val_before_train: bool = Field(True, description="Validate before the first step.")
    log_val_generations: Annotated[int, NO_SAMPLES_LOGGED, NOT_VALIDATED] = Field(
        0, ge=0, description="Number of validation samples that go to the loggers."
    )
    rollout_data_dir: str | None = Field(None, description="Folder for the responses of every step; null: not kept.")
    validation_data_dir: Annotated[str | None, NOT_VALIDATED] = Field(
        None, description="Folder for validation responses; null: in the run's folder."
    )
    generations_format: Annotated[DumpFormats, NO_RESPONSES_WRITTEN] = Field(
        ["jsonl"], description="Format of the files in these folders: jsonl, parquet or both."
    )
    default_hdfs_dir: str | None = Field(None, description="Must be null: checkpoints go to default_local_dir.")


class SFTTrainerConfig(RunConfig):
    experiment_name: str = Field("sft", description="Name of the run within the project.")
    total_epochs: Annotated[PositiveInt, STEPS_SET] = Field(1, description="Passes over the training data.")
    save_freq: Frequency = Field(
        -1, description="Number of steps between checkpoints; one is always saved at the end. -1 or 0: only that one."
    )
    test_freq: Annotated[Frequency, NO_VALIDATION_FILES] = Field(
        -1, description="Number of steps between validations; one also runs at the end. -1 or 0: never."
    )


class RayKwargsConfig(Section):
    ray_init: dict[str, Any] = Field(
        {},
        description="Arguments of ray.init: address, num_cpus, ... If Ray runs already, only those for joining it.",
    )

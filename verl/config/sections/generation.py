"""Sections of ``main_generation`` (responses to a file of prompts) and ``main_eval`` (scores of responses)."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Gt, Lt
from pydantic import Field

from verl.config.sections.base import CountOrAll, Device, PositiveInt, Section, Strings
from verl.config.sections.data import ImageKey, Truncation
from verl.config.sections.effects import PROMPTS_DROPPED
from verl.config.sections.trainer import PlacementConfig

Files = Annotated[Strings, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]


class GenerationDataConfig(Section):
    path: Files = Field(description="Parquet file or files of prompts.")
    output_path: str = Field(
        description="File to write, .parquet or .jsonl: one row per prompt, with its own columns and those of its "
        "responses."
    )
    prompt_key: str = Field("prompt", description="Column with the prompt's chat messages.")
    image_key: ImageKey = "images"
    batch_size: PositiveInt = Field(
        1024, description="Prompts per batch. The responses of a batch are on disk when the batch ends."
    )
    max_samples: CountOrAll = Field(-1, description="Number of rows to use, from the first; -1: all.")
    max_prompt_length: PositiveInt = Field(512, description="Longest prompt in tokens, chat template included.")
    max_response_length: PositiveInt = Field(512, description="Longest response in tokens; generation stops there.")
    filter_overlong_prompts: bool = Field(False, description="Drop prompts longer than max_prompt_length.")
    truncation: Annotated[Truncation, PROMPTS_DROPPED] = Field(
        "error", description="Treatment of a longer prompt; error: stop; else: cut it on that side."
    )
    apply_chat_template_kwargs: dict[str, Any] = Field({}, description="Further arguments of the chat template.")


class GenerationTrainerConfig(PlacementConfig):
    """The section has the same name as in training, though nothing is trained."""

    device: Device = Field("auto", description="Device of the model; auto: cuda if there is a GPU, else cpu.")
    seed: int = Field(1, ge=0, description="The seed of every response follows from it.")
    dry_run: bool = Field(False, description="Check everything, print the plan and stop.")


class EvalDataConfig(Section):
    path: Files = Field(description="File or files of responses, .parquet or .jsonl, as main_generation writes them.")
    output_path: str | None = Field(None, description="JSON file for the results; null: they are only printed.")
    response_key: str = Field("responses", description="Column with the list of a prompt's responses (or one text).")
    reward_fn_key: str = Field(
        "data_source", description="Column with the name of the data source, which chooses the scorer."
    )


class EvaluationConfig(Section):
    k: list[Positive] = Field([], description="Values of k for pass@k; empty: 1, 2, 4, ... and all responses.")
    pass_score: float = Field(
        1.0, description="A response passes if the scorer's acc (its score, if it returns no acc) is at least this."
    )
    confidence: Annotated[float, Gt(0), Lt(1)] = Field(0.95, description="Level of the confidence intervals.")
    bootstrap_samples: PositiveInt = Field(
        1000, description="Bootstrap resamples of the prompts, with replacement, for those intervals."
    )
    seed: int = Field(1, ge=0, description="Seed of the resampling.")


class EvalTrainerConfig(Section):
    dry_run: bool = Field(False, description="Check everything, print the plan and stop.")

"""Responses to a file of prompts, and their scores: what ``main_generation`` and ``main_eval`` take."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Gt, Lt
from pydantic import Field

from verl.config.sections.base import CountOrAll, Device, PositiveInt, Section, Strings
from verl.config.sections.data import ImageKey, Truncation
from verl.config.sections.trainer import PlacementConfig

Files = Annotated[Strings, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]


class GenerationDataConfig(Section):
    path: Files = Field(description="Parquet file or files of prompts.")
    output_path: str = Field(
        description="File of the responses, .parquet or .jsonl: a row a prompt, its own columns and those of the "
        "responses."
    )
    prompt_key: str = Field("prompt", description="Column with the prompt's chat messages.")
    image_key: ImageKey = "images"
    batch_size: PositiveInt = Field(
        1024, description="Prompts answered together; what a batch gave is safe on disk when it ends."
    )
    max_samples: CountOrAll = Field(-1, description="Use only the first so many rows; -1: all.")
    max_prompt_length: PositiveInt = Field(512, description="Longest prompt in tokens, chat template included.")
    max_response_length: PositiveInt = Field(512, description="Longest response in tokens; generation stops there.")
    filter_overlong_prompts: bool = Field(False, description="Leave out prompts longer than max_prompt_length.")
    truncation: Truncation = Field(
        "error", description="What happens to a longer prompt that was not filtered: stop, or cut on that side."
    )
    apply_chat_template_kwargs: dict[str, Any] = Field({}, description="Further arguments of the chat template.")


class GenerationTrainerConfig(PlacementConfig):
    """Named as for training, though nothing is trained."""

    device: Device = Field("auto", description="Where the model lives; auto: cuda where there is a GPU, else cpu.")
    seed: int = Field(1, ge=0, description="Every response's own seed follows from it.")
    dry_run: bool = Field(False, description="Check everything, print what would be done and stop.")


class EvalDataConfig(Section):
    path: Files = Field(description="File or files of responses, .parquet or .jsonl, as main_generation writes them.")
    output_path: str | None = Field(None, description="JSON file of the results; null: they are only printed.")
    response_key: str = Field("responses", description="Column with the list of a prompt's responses (or one text).")
    reward_fn_key: str = Field("data_source", description="Column that names the data set, which chooses the scorer.")


class EvaluationConfig(Section):
    k: list[Positive] = Field([], description="pass@k is given for these k; empty: for 1, 2, 4, ... and all responses.")
    pass_score: float = Field(
        1.0, description="A response passes when the scorer's acc (its score, where it returns none) is at least this."
    )
    confidence: Annotated[float, Gt(0), Lt(1)] = Field(0.95, description="Level of the confidence intervals.")
    bootstrap_samples: PositiveInt = Field(
        1000, description="Times that the prompts are drawn anew, with replacement, for those intervals."
    )
    seed: int = Field(1, ge=0, description="Of these draws.")


class EvalTrainerConfig(Section):
    dry_run: bool = Field(False, description="Check everything, print what would be done and stop.")

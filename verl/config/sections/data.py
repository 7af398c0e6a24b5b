"""Prompts: their files and how they are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from verl.config.sections.base import CountOrAll, PositiveInt, Section, Strings, derived
from verl.config.sections.effects import NOT_SHUFFLED, NOT_VALIDATED, PROMPTS_DROPPED, NoEffect

Truncation = Literal["error", "left", "right", "middle"]
ImageKey = Annotated[
    str | None,
    Field(
        description="Column with the prompt's images. Images are not supported yet: rows that have any are rejected. "
        "null: the column is ignored.",
    ),
]
FILES_NOT_VALIDATED = NoEffect(  # an empty list is not named: it says that there is no validation
    NOT_VALIDATED.why, lambda data, run: bool(data.val_files) and not run.validates
)
CUT_BY_EXAMPLES = NoEffect(
    "micro-batches are cut by examples ({section}.micro_batch_size_per_gpu)",
    lambda data, run: data.micro_batch_size_per_gpu is not None,
)


class DataConfig(Section):
    train_files: Annotated[Strings, Field(min_length=1)] = Field(
        ["~/data/gsm8k/train.parquet"], description="Parquet file or files of training prompts."
    )
    val_files: Annotated[Strings, FILES_NOT_VALIDATED] = Field(
        ["~/data/gsm8k/test.parquet"], description="Parquet file or files of validation prompts; null: no validation."
    )
    prompt_key: str = Field("prompt", description="Column with the prompt's chat messages.")
    reward_fn_key: str = Field(
        "data_source", description="Column with the name of the data source, which chooses the scorer."
    )
    image_key: ImageKey = "images"
    train_batch_size: PositiveInt = Field(
        1024, description="Prompts per step over all ranks. Each gets rollout.n responses."
    )
    max_prompt_length: PositiveInt = Field(512, description="Longest prompt in tokens, chat template included.")
    max_response_length: PositiveInt = Field(512, description="Longest response in tokens; generation stops there.")
    filter_overlong_prompts: bool = Field(False, description="Drop prompts longer than max_prompt_length.")
    truncation: Annotated[Truncation, PROMPTS_DROPPED] = Field(
        "error", description="Treatment of a longer prompt; error: stop; else: cut it on that side."
    )
    train_max_samples: CountOrAll = Field(-1, description="Number of training rows to use, from the first; -1: all.")
    val_max_samples: Annotated[CountOrAll, NOT_VALIDATED] = Field(
        -1, description="Number of validation rows to use, from the first; -1: all."
    )
    shuffle: bool = Field(True, description="Use a new random order of the training prompts in each epoch.")
    seed: Annotated[int, NOT_SHUFFLED] = derived("Seed of that order.")
    apply_chat_template_kwargs: dict[str, Any] = Field({}, description="Further arguments of the chat template.")


class SFTDataConfig(Section):
    train_files: Annotated[Strings, Field(min_length=1)] = Field(
        ["~/data/gsm8k/train.parquet"], description="Parquet file or files of training examples."
    )
    val_files: Annotated[Strings, FILES_NOT_VALIDATED] = Field(
        [], description="Parquet file or files of examples for validation: their loss is measured."
    )
    prompt_key: str = Field("prompt", description="Column with the prompt's chat messages.")
    response_key: str = Field(
        "response", description="Column with the response's text. Only the response is trained on."
    )
    image_key: ImageKey = "images"
    train_batch_size: PositiveInt = Field(64, description="Examples per optimizer step over all ranks.")
    micro_batch_size_per_gpu: PositiveInt | None = Field(
        None,
        description="Examples per forward and backward pass of a rank; null: as many as fit max_token_len_per_gpu.",
    )
    max_token_len_per_gpu: Annotated[PositiveInt, CUT_BY_EXAMPLES] = Field(
        16384, description="Most tokens of such a pass, padding included."
    )
    max_length: PositiveInt = Field(1024, description="Longest example (prompt and response) in tokens.")
    truncation: Literal["error", "left", "right"] = Field(
        "error", description="Treatment of a longer example; error: stop; else: cut it on that side."
    )
    shuffle: bool = Field(True, description="Use a new random order of the examples in each epoch.")
    seed: Annotated[int, NOT_SHUFFLED] = derived("Seed of that order.")
    apply_chat_template_kwargs: dict[str, Any] = Field({}, description="Further arguments of the chat template.")

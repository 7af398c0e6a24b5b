"""Prompts: where they are and how they are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from verl.config.sections.base import CountOrAll, PositiveInt, Section, Strings, derived

Truncation = Literal["error", "left", "right", "middle"]
ImageKey = Annotated[
    str | None,
    Field(
        description="Column with the prompt's images, which nothing takes yet: rows that have any are refused; null: "
        "they are not looked at.",
    ),
]


class DataConfig(Section):
    train_files: Annotated[Strings, Field(min_length=1)] = Field(
        ["~/data/gsm8k/train.parquet"], description="Parquet file or files of training prompts."
    )
    val_files: Strings = Field(
        ["~/data/gsm8k/test.parquet"], description="Parquet file or files of validation prompts; null: no validation."
    )
    prompt_key: str = Field("prompt", description="Column with the prompt's chat messages.")
    reward_fn_key: str = Field("data_source", description="Column that names the data set, which chooses the scorer.")
    image_key: ImageKey = "images"
    train_batch_size: PositiveInt = Field(
        1024, description="Prompts of a step, over all ranks; each gets rollout.n responses."
    )
    max_prompt_length: PositiveInt = Field(512, description="Longest prompt in tokens, chat template included.")
    max_response_length: PositiveInt = Field(512, description="Longest response in tokens; generation stops there.")
    filter_overlong_prompts: bool = Field(False, description="Leave out prompts longer than max_prompt_length.")
    truncation: Truncation = Field(
        "error", description="What happens to a longer prompt that was not filtered: stop, or cut on that side."
    )
    train_max_samples: CountOrAll = Field(-1, description="Use only the first so many training rows; -1: all.")
    val_max_samples: CountOrAll = Field(-1, description="Use only the first so many validation rows; -1: all.")
    shuffle: bool = Field(True, description="Draw a new order of the training prompts each epoch.")
    seed: int = derived("Seed of that order.")
    apply_chat_template_kwargs: dict[str, Any] = Field({}, description="Further arguments of the chat template.")


class SFTDataConfig(Section):
    train_files: Annotated[Strings, Field(min_length=1)] = Field(
        ["~/data/gsm8k/train.parquet"], description="Parquet file or files of training examples."
    )
    val_files: Strings = Field(
        [], description="Parquet file or files of examples whose loss is measured and not trained on."
    )
    prompt_key: str = Field("prompt", description="Column with the prompt's chat messages.")
    response_key: str = Field("response", description="Column with the response's text; only it is trained on.")
    image_key: ImageKey = "images"
    train_batch_size: PositiveInt = Field(64, description="Examples of an optimizer step, over all ranks.")
    micro_batch_size_per_gpu: PositiveInt | None = Field(
        None,
        description="Examples of one forward and backward pass of a rank; null: as many as max_token_len_per_gpu says.",
    )
    max_token_len_per_gpu: PositiveInt = Field(16384, description="Tokens of such a pass, with what padding there is.")
    max_length: PositiveInt = Field(1024, description="Longest example, prompt and response, in tokens.")
    truncation: Literal["error", "left", "right"] = Field(
        "error", description="What happens to a longer example: stop, or cut on that side."
    )
    shuffle: bool = Field(True, description="Draw a new order of the examples each epoch.")
    seed: int = derived("Seed of that order.")
    apply_chat_template_kwargs: dict[str, Any] = Field({}, description="Further arguments of the chat template.")

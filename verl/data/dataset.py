"""A data set of prompts, ready for the loader: read, tokenised, and cut to length."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from verl.data.parquet import read_prompts
from verl.data.ragged import Ragged
from verl.data.schema import PROMPT_COLUMNS, with_columns
from verl.data.tokenizer import encode_chats
from verl.errors import UserError

if TYPE_CHECKING:
    from verl.config.sections.generation import GenerationDataConfig
    from verl.config.sections.models import DataConfig

log = logging.getLogger(__name__)
BATCH = 1024  # chats tokenised at a time


def load_prompts(
    files: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    kind: Literal["train", "val"] = "train",
    notice: Callable[[str], None] = log.warning,
) -> pa.Table:
    """The prompts of these parquet files: the columns of ``PROMPT_COLUMNS``, ``row`` counting what is kept.

    ``config.{kind}_max_samples``: only that many rows, the first. A prompt over ``max_prompt_length`` tokens is dropped
    under ``filter_overlong_prompts``; else ``truncation`` says: "error" (all of them in one UserError), "left" (its
    beginning is cut off), "right" (its end), "middle". notice: told what was left out or cut.
    """
    table = read_prompts(
        files, prompt_key=config.prompt_key, reward_fn_key=config.reward_fn_key, image_key=config.image_key
    )
    read = table.num_rows
    limit = config.train_max_samples if kind == "train" else config.val_max_samples
    if limit >= 0:
        table = table.slice(0, limit)
    table, prompts = encode_prompts(table, tokenizer, config, key=f"data.{kind}_files", notice=notice)
    if table.num_rows == 0:
        raise UserError(
            f"data.{kind}_files: no prompt is left of {read} rows "
            f"(data.{kind}_max_samples={limit}, data.max_prompt_length={config.max_prompt_length}, "
            f"data.filter_overlong_prompts={config.filter_overlong_prompts})"
        )
    table = with_columns(table, row=np.arange(table.num_rows), prompt_ids=Ragged.from_rows(prompts, np.int32))
    return table.select(list(PROMPT_COLUMNS)).combine_chunks()


def encode_prompts(
    table: pa.Table,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | GenerationDataConfig,
    *,
    key: str,
    notice: Callable[[str], None],
) -> tuple[pa.Table, list[np.ndarray]]:
    """The rows that are kept and the token ids of each, cut as ``load_prompts`` says. table: chats as JSON text in
    ``prompt``. key: of the configuration, that names the files."""
    if not tokenizer.chat_template:
        notice("the tokenizer has no chat template: a prompt is its messages' contents, one a line, without roles")
    return _fit(table, _encode(table, tokenizer, config), config, key, notice)


def _encode(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase, config: DataConfig | GenerationDataConfig
) -> list[np.ndarray]:
    prompts: list[np.ndarray] = []
    for start in range(0, table.num_rows, BATCH):
        chats = [json.loads(text) for text in table["prompt"].slice(start, BATCH).to_pylist()]
        encoded = encode_chats(tokenizer, chats, **config.apply_chat_template_kwargs)
        prompts += [np.array(ids, np.int32) for ids in encoded]
    return prompts


def _fit(
    table: pa.Table,
    prompts: list[np.ndarray],
    config: DataConfig | GenerationDataConfig,
    key: str,
    notice: Callable[[str], None],
) -> tuple[pa.Table, list[np.ndarray]]:
    limit = config.max_prompt_length
    over = [row for row, ids in enumerate(prompts) if len(ids) > limit]
    if not over:
        return table, prompts
    of_all = f"{len(over)} of {len(prompts)} prompts of {key} are over data.max_prompt_length={limit}"
    if config.filter_overlong_prompts:
        notice(f"{of_all} and are left out")
        dropped = set(over)
        keep = [row for row in range(len(prompts)) if row not in dropped]
        return table.take(pa.array(keep, pa.int64())), [prompts[row] for row in keep]
    if config.truncation == "error":
        longest = max(len(prompts[row]) for row in over)
        first = ", ".join(f"row {row}: {len(prompts[row])} tokens" for row in over[:5])
        raise UserError(
            f"{of_all} ({first}{', ...' if len(over) > 5 else ''}). "
            f"Set data.max_prompt_length={longest} (the longest), data.filter_overlong_prompts=True to leave them out, "
            "or data.truncation=left, right or middle to cut them."
        )
    notice(f"{of_all} and are cut (data.truncation={config.truncation})")
    return table, [truncated(ids, limit, config.truncation) for ids in prompts]


def truncated(ids: np.ndarray, limit: int, side: str) -> np.ndarray:
    """At most ``limit`` tokens. side: what is cut off: "left" the beginning, "right" the end, "middle" the inside, so
    that limit // 2 tokens of the beginning stay and the rest is of the end."""
    if len(ids) <= limit:
        return ids
    if side == "left":
        return ids[len(ids) - limit :]
    if side == "right":
        return ids[:limit]
    head = limit // 2
    return np.concatenate([ids[:head], ids[len(ids) - (limit - head) :]])

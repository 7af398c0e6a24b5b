"""The prompts of a generation run: the user's rows unchanged, and the columns that an engine needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from verl.config.sections.generation import GenerationDataConfig
from verl.data.dataset import encode_prompts
from verl.data.parquet import chats_of, references_of
from verl.data.ragged import Ragged
from verl.data.schema import STRINGS, with_columns
from verl.errors import UserError

RESPONSES = pa.schema(
    [("responses", STRINGS), ("response_tokens", pa.list_(pa.int32())), ("finish_reasons", STRINGS)]
)  # columns added to the user's; each has one entry per response


def load(
    config: GenerationDataConfig, tokenizer: PreTrainedTokenizerBase, notice: Callable[[str], None]
) -> tuple[pa.Table, pa.Table]:
    """The user's rows that are kept, and a table with one row for each: row (its number among all rows), prompt_ids,
    images. Long prompts are cut or left out as in training (``verl.data.dataset.load_prompts``)."""
    rows = pa.concat_tables(map(_read, config.path), promote_options="default").combine_chunks()
    if taken := set(RESPONSES.names) & set(rows.column_names):
        files = ", ".join(config.path)
        raise UserError(f"data.path={files} has a column {min(taken)!r}, which this run writes: rename it")
    if config.max_samples >= 0:
        rows = rows.slice(0, config.max_samples)
    where = f"column {{!r}} of {', '.join(config.path)}"
    images: list[list[str]] = [[]] * rows.num_rows
    if config.image_key in rows.column_names:
        images = references_of(rows[config.image_key], where.format(config.image_key))
    chats = chats_of(rows[config.prompt_key], where.format(config.prompt_key))
    table = pa.table({"row": np.arange(rows.num_rows), "prompt": chats, "images": pa.array(images, STRINGS)})
    table, prompts = encode_prompts(table, tokenizer, config, key="data.path", notice=notice)
    if table.num_rows == 0:
        raise UserError(f"data.path={config.path}: no prompt is left of {rows.num_rows} rows")
    return rows.take(table["row"]), with_columns(table, prompt_ids=Ragged.from_rows(prompts, np.int32))


def _read(name: str) -> pa.Table:
    path = Path(name).expanduser()
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error

"""The table that travels through a step: one row a trajectory, columns added stage by stage.

Token columns are ragged Arrow lists aligned with ``response_ids`` (one entry a response token), except ``prompt_ids``.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from verl.data.ragged import Ragged, offsets_of

FLOATS = pa.list_(pa.float32())
IDS = pa.list_(pa.int32())
FLAGS = pa.list_(pa.int8())
VERSIONS = pa.list_(pa.int64())
STRINGS = pa.list_(pa.string())

# What the data loader gives: one row a prompt. JSON text where a data set's own structure varies.
PROMPT_COLUMNS: dict[str, pa.DataType] = {
    "row": pa.int64(),  # position in the (filtered) data set
    "data_source": pa.string(),
    "prompt": pa.string(),  # JSON: the list of chat messages
    "ground_truth": pa.string(),
    "extra_info": pa.string(),  # JSON object
    "images": STRINGS,  # by reference (path or URL); empty list without images
    "prompt_ids": IDS,
}

# What a finished episode is: the prompt's columns and these.
TRAJECTORY_COLUMNS: dict[str, pa.DataType] = {
    **PROMPT_COLUMNS,
    "uid": pa.string(),  # unique in a run: "{step}-{row}-{sample}"
    "group": pa.int64(),  # trajectories of one prompt share it
    "seed": pa.uint64(),
    "response_ids": IDS,  # the stop token included
    "response_mask": FLAGS,  # 1 where the policy wrote the token
    "rollout_log_probs": FLOATS,
    "finish_reason": pa.string(),  # stop | length | abort
    "first_version": pa.int64(),  # of the weights that generated the first token
    "last_version": pa.int64(),  # of the weights that generated the last token
    "versions": VERSIONS,  # of the weights that generated each token
}

# Added by later stages of a step.
STAGE_COLUMNS: dict[str, pa.DataType] = {
    "score": pa.float64(),  # the scorer's number
    "reward_model_score": pa.float64(),  # the reward model's own, where there is one
    "reward_extra": pa.string(),  # JSON object: other numbers a scorer returned
    "greedy_reward": pa.float64(),  # of the greedy response to the same prompt
    "old_log_probs": FLOATS,
    "rollout_is_weights": FLOATS,  # see verl.algorithms.corrections
    "entropy": FLOATS,
    "ref_log_probs": FLOATS,
    "values": FLOATS,
    "token_rewards": FLOATS,  # score on the last token, in-reward KL taken off
    "advantages": FLOATS,
    "returns": FLOATS,
    "loss_weights": FLOATS,  # see verl.algorithms.losses.aggregation_weights
    "selected": FLAGS,  # see verl.algorithms.loss_modes.selected_tokens
}

COLUMNS = {**TRAJECTORY_COLUMNS, **STAGE_COLUMNS}


def with_columns(table: pa.Table, **columns: pa.Array | Ragged | np.ndarray | list) -> pa.Table:
    """The table with columns added or replaced, each of its declared type."""
    for name, column in columns.items():
        array = column.to_column() if isinstance(column, Ragged) else column
        if isinstance(array, pa.Array | pa.ChunkedArray):
            array = array.cast(COLUMNS[name])
        else:
            array = pa.array(array, COLUMNS[name])
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, array)
        else:
            table = table.append_column(name, array)
    return table


def ragged(table: pa.Table, name: str) -> Ragged:
    return Ragged.from_column(table[name])


def rows_of(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """``table.take(rows)``; a slice of the table where they follow each other."""
    if len(rows) and (np.diff(rows) == 1).all():
        return table.slice(rows[0], len(rows))
    return taken(table, rows)


def taken(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """``table.take(rows)``, its columns in one chunk each. Faster on token columns: a row's tokens are copied together,
    where Arrow looks each of them up."""
    if not len(rows):
        return table.slice(0, 0)
    lists = [field.name for field in table.schema if _holds_numbers(field.type) and not table[field.name].null_count]
    found = {name: _taken_lists(table[name], rows) for name in lists}
    others = table.drop_columns(lists).take(pa.array(rows))
    columns = [found[name] if name in found else others[name] for name in table.column_names]
    return pa.table(columns, schema=table.schema)


def _holds_numbers(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))


def _taken_lists(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ListArray:
    offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]  # of chunks that may be slices
    values = [chunk.values.to_numpy() for chunk in column.chunks]
    starts, ends = (np.concatenate([of_chunk[cut] for of_chunk in offsets])[rows] for cut in (np.s_[:-1], np.s_[1:]))
    chunk_of_row = np.repeat(np.arange(column.num_chunks), [len(chunk) for chunk in column.chunks])[rows]
    places = zip(chunk_of_row.tolist(), starts.tolist(), ends.tolist(), strict=True)
    tokens = np.concatenate([values[chunk][start:end] for chunk, start, end in places])
    return pa.ListArray.from_arrays(pa.array(offsets_of(ends - starts), pa.int32()), pa.array(tokens), column.type)

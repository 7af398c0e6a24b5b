"""The table that travels through a step: one row a trajectory, columns added stage by stage.

Token columns are ragged Arrow lists aligned with ``response_ids`` (one entry a response token), except ``prompt_ids``.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from verl.data.ragged import Ragged

FLOATS = pa.list_(pa.float32())
IDS = pa.list_(pa.int32())
FLAGS = pa.list_(pa.int8())
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
    "weight_version": pa.int64(),  # of the weights that wrote the last token
}

# Added by later stages of a step.
STAGE_COLUMNS: dict[str, pa.DataType] = {
    "score": pa.float64(),  # the scorer's number
    "reward_extra": pa.string(),  # JSON object: other numbers a scorer returned
    "old_log_probs": FLOATS,
    "rollout_is_weights": FLOATS,  # see verl.trainer.ppo.corrections
    "entropy": FLOATS,
    "ref_log_probs": FLOATS,
    "values": FLOATS,
    "token_rewards": FLOATS,  # score on the last token, in-reward KL taken off
    "advantages": FLOATS,
    "returns": FLOATS,
    "loss_weights": FLOATS,  # see verl.trainer.ppo.losses.aggregation_weights
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

"""Prompts as they lie in parquet files: a user's columns to those of ``PROMPT_COLUMNS``, but for the tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from verl.data.schema import PROMPT_COLUMNS
from verl.errors import UserError

READ = pa.schema([(name, PROMPT_COLUMNS[name]) for name in PROMPT_COLUMNS if name not in ("row", "prompt_ids")])


def read_prompts(files: str | Sequence[str], *, prompt_key: str, reward_fn_key: str, image_key: str | None) -> pa.Table:
    """The rows of all files, in order, with the columns ``READ``.

    prompt_key: column of chat messages, a list of {role, content}. reward_fn_key: column that names the data source,
    and so the scorer. ``reward_model.ground_truth``: what the scorer compares with; JSON text unless it is a string.
    ``extra_info`` (a struct) and image_key (references: paths or URLs; None: not read) may be missing.
    """
    names = [files] if isinstance(files, str) else list(files)
    if not names:
        raise UserError("no data file was named")
    return pa.concat_tables(_read_file(name, prompt_key, reward_fn_key, image_key) for name in names)


def _read_file(name: str, prompt_key: str, reward_fn_key: str, image_key: str | None) -> pa.Table:
    wanted = [prompt_key, reward_fn_key, "reward_model", "extra_info", image_key]
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"the data file {path} does not exist")
    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            table = file.read(columns=[column for column in wanted if column in present])
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error
    for key, column in (("data.prompt_key", prompt_key), ("data.reward_fn_key", reward_fn_key)):
        if column not in present:
            raise UserError(f"{path} has no column {column!r} ({key}); its columns are {', '.join(present)}")
    count = table.num_rows
    columns = {
        "data_source": table[reward_fn_key].cast(pa.string()),
        "prompt": chats_of(table[prompt_key], f"column {prompt_key!r} of {path}"),
        "ground_truth": _ground_truths(table, path),
        "extra_info": [_json(value or {}) for value in table["extra_info"].to_pylist()]
        if "extra_info" in present
        else ["{}"] * count,
        "images": references_of(table[image_key], f"column {image_key!r} of {path}")
        if image_key in present
        else [[]] * count,
    }
    return pa.table(columns, schema=READ)


def chats_of(column: pa.ChunkedArray, where: str) -> list[str]:
    """Each row's messages as JSON text."""
    fix = 'it must hold a list of messages, such as [{"role": "user", "content": "..."}]'
    texts = []
    for row, chat in enumerate(column.to_pylist()):
        if not isinstance(chat, list) or not chat:
            raise UserError(f"{where}, row {row}: {_short(chat)} is not a chat; {fix}")
        for message in chat:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise UserError(f"{where}, row {row}: {_short(message)} is not a message; {fix}")
        texts.append(_json(chat))
    return texts


def _ground_truths(table: pa.Table, path: Path) -> list[str | None]:
    if "reward_model" not in table.column_names:
        raise UserError(
            f"{path} has no column 'reward_model': each row needs {{style, ground_truth}}; ground_truth may be empty"
        )
    kind = table["reward_model"].type
    if not pa.types.is_struct(kind) or kind.get_field_index("ground_truth") < 0:
        raise UserError(f"{path}: the column 'reward_model' ({kind}) has no field 'ground_truth'")
    values = pc.struct_field(table["reward_model"], "ground_truth").to_pylist()
    return [value if isinstance(value, str | None) else _json(value) for value in values]


def references_of(column: pa.ChunkedArray, where: str) -> list[list[str]]:
    """Paths or URLs, from strings or the {path, bytes} structs of the hub's data sets."""
    rows = []
    for row, images in enumerate(column.to_pylist()):
        references = [image["path"] if isinstance(image, dict) else image for image in images or []]
        if not all(isinstance(reference, str) for reference in references):
            raise UserError(f"{where}, row {row}: images are read by reference; save them and give paths or URLs")
        rows.append(references)
    return rows


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

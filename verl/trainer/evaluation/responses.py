"""Reads files of responses into a table to score."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from verl.data.schema import COLUMNS
from verl.errors import UserError
from verl.tracking.dumps import read_rows

SCHEMA = pa.schema(
    [(name, COLUMNS[name]) for name in ("group", "data_source", "prompt", "ground_truth", "extra_info")]
    + [("response", pa.string())]
)


def read_responses(files: Sequence[str], response_key: str, reward_fn_key: str) -> pa.Table:
    """One row per response, with the columns of ``SCHEMA``. ``group`` numbers the files' rows, which are prompts."""
    found = []
    for group, (where, row) in enumerate(_rows(files)):
        responses = row.get(response_key)
        texts = [responses] if isinstance(responses, str) else responses
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: column {response_key!r} (data.response_key) holds no text or list of texts")
        truth = (row.get("reward_model") or {}).get("ground_truth")
        shared = {
            "group": group,
            "data_source": row.get(reward_fn_key),
            "prompt": _json(row.get("prompt")),
            "ground_truth": truth if isinstance(truth, str | None) else _json(truth),
            "extra_info": _json(row.get("extra_info") or {}),
        }
        found += [{**shared, "response": text} for text in texts]
    if not found:
        raise UserError(f"data.path={', '.join(files)}: there is no response in it")
    return pa.Table.from_pylist(found, SCHEMA)


def _rows(files: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        try:
            rows = read_rows(Path(file).expanduser())
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
        for number, row in enumerate(rows):
            yield f"{file}, row {number}", row


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)

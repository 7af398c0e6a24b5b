"""Writes generations to ``{folder}/{step}.jsonl`` (or ``.parquet``), one row per sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from verl.tracking.files import written_whole

SHOWN_TEXT = 400  # characters of a prompt or response on the console
DumpFormat = Literal["jsonl", "parquet"]
Decode = Callable[[list[list[int]]], list[str]]


def generation_rows(table: pa.Table, decode: Decode, step: int) -> list[dict[str, Any]]:
    """One row per sample: input, output, gts (the ground truth), score, step, response_tokens, and optional fields.

    table: has the columns prompt_ids, response_ids, ground_truth and score of ``verl.data.schema``. The columns uid,
        data_source, finish_reason and reward_extra are optional. The entries of reward_extra become fields.
    decode: converts lists of token ids to texts.
    """
    columns = {
        "input": decode(table["prompt_ids"].to_pylist()),
        "output": decode(table["response_ids"].to_pylist()),
        "gts": table["ground_truth"].to_pylist(),
        "score": table["score"].to_pylist(),
        "step": [step] * len(table),
        "response_tokens": [len(ids) for ids in table["response_ids"].to_pylist()],
    }
    for name in ("data_source", "uid", "finish_reason"):
        if name in table.column_names:
            columns[name] = table[name].to_pylist()
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if "reward_extra" in table.column_names:
        for row, extra in zip(rows, table["reward_extra"].to_pylist(), strict=True):
            for name, value in json.loads(extra or "{}").items():
                row.setdefault(name, value)
    return rows


def dump_rows(
    folder: Path, step: int, rows: pa.Table | Sequence[Mapping[str, Any]], file_format: DumpFormat = "jsonl"
) -> Path:
    """The file that now holds the rows. It is written atomically and replaces an earlier file of the step."""
    path = Path(folder) / f"{step}.{file_format}"
    with written_whole(path) as partial:
        if file_format == "parquet":
            pq.write_table(rows if isinstance(rows, pa.Table) else _as_table(rows), partial)
        else:
            records = rows.to_pylist() if isinstance(rows, pa.Table) else rows
            with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
                for record in records:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def _as_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A table with the fields of all rows. Missing values are null."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that ``dump_rows`` wrote."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def sample_text(row: Mapping[str, Any], step: int) -> str:
    """A sample for the eye: the end of its prompt and the beginning of its response, each line indented."""
    prompt, response = row["input"].strip(), row["output"].strip()
    prompt = prompt if len(prompt) <= SHOWN_TEXT else "..." + prompt[-SHOWN_TEXT:]
    response = response if len(response) <= SHOWN_TEXT else response[:SHOWN_TEXT] + "..."
    lines = [f"validation sample, step {step}, score {row['score']:g}, reference {row.get('gts')}"]
    lines += [f"    {line}" for line in prompt.splitlines()]
    lines += [f"  > {line}" for line in response.splitlines() or [""]]
    return "\n".join(lines)

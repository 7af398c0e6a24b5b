"""Checks that prompts are text only: images are not supported yet, neither by engines nor in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from verl.checks.files import paths
from verl.findings import Findings

if TYPE_CHECKING:
    from verl.config.sections.generation import GenerationDataConfig
    from verl.config.sections.models import DataConfig, SFTDataConfig

BATCH = 256  # rows read at the same time: they may contain the image files


def check_images(
    findings: Findings,
    key: str,
    files: str | Sequence[str],
    data: DataConfig | GenerationDataConfig | SFTDataConfig,
    limit: int = -1,
    engine: str | None = None,
) -> None:
    """Checks that no row that the run uses has an image, in the image column or in its messages. It reports the first
    such row of each file, and skips files that cannot be read.

    key: the key that names the files. limit: number of rows to use of all files together, from the first; -1: all.
    engine: name of the rollout engine, if there is one.
    """
    check_messages(findings, key, files, data.prompt_key)
    if data.image_key is None:
        return
    for file in paths(files):
        try:
            with pq.ParquetFile(Path(file).expanduser()) as parquet:
                row = _first_with_images(parquet, data.image_key, limit)
                rows = parquet.metadata.num_rows
        except (OSError, pa.ArrowException):
            continue
        if row is not None:
            why = f"its row {row} has images (column {data.image_key!r}): "
            if engine:
                why += f"{engine} does not take them, nor does any other engine in this version, and "
            why += "models are trained on text alone"
            fix = "write it without rows that have images, or train on the text alone: data.image_key=null"
            findings.problem(key, file, why, fix)
        if limit >= 0:
            limit = max(limit - rows, 0)


def check_messages(findings: Findings, key: str, files: str | Sequence[str], prompt_key: str) -> None:
    """Checks that the content of messages is text. Chat templates may print a list of parts as Python code."""
    for file in paths(files):
        parts = _parts_of_messages(_schema(file), prompt_key)
        if parts is not None:
            why = f"the messages in its column {prompt_key!r} are not text: their content is {parts}"
            findings.problem(key, file, why, "write each message as {role, content}, its content a text")


def check_image_key(findings: Findings, column: str | None, files: Sequence[str], set_keys: frozenset[str]) -> None:
    """Warns if the user named a column that none of the files has."""
    if column is None or "data.image_key" not in set_keys:
        return
    schemas = [_schema(file) for file in files]
    columns = {name for schema in schemas for name in schema.names}
    if all(schemas) and column not in columns:
        there = ", ".join(sorted(columns))
        findings.warn(f"data.image_key has no effect: no data file has a column {column!r}; they have {there}.")


def _schema(file: str) -> pa.Schema:
    """The file's schema; one without columns if the file cannot be read."""
    try:
        return pq.read_schema(Path(file).expanduser())
    except (OSError, pa.ArrowException):
        return pa.schema([])


def _parts_of_messages(schema: pa.Schema, column: str) -> pa.DataType | None:
    """The type of the messages' content if it is a list of parts (text, images, ...), None if it is text."""
    kind = schema.field(column).type if column in schema.names else None
    if kind is None or not pa.types.is_list(kind) or not pa.types.is_struct(kind.value_type):
        return None
    index = kind.value_type.get_field_index("content")
    content = None if index < 0 else kind.value_type.field(index).type
    return content if content is not None and pa.types.is_nested(content) else None


def _first_with_images(parquet: pq.ParquetFile, column: str, limit: int) -> int | None:
    """The first row with images, counted from 0, among the first ``limit`` rows (-1: all)."""
    if column not in parquet.schema_arrow.names:
        return None
    start = 0
    for batch in parquet.iter_batches(BATCH, columns=[column]):
        if 0 <= limit <= start:
            break
        inside = batch.column(0) if limit < 0 else batch.column(0).slice(0, limit - start)
        for place, images in enumerate(inside):
            if images.as_py():
                return start + place
        start += len(batch)
    return None

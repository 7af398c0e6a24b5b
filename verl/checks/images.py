"""Whether prompts have images: no engine takes them, and no model here is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from verl.checks.files import paths
from verl.checks.findings import Findings

BATCH = 256  # rows read at a time: they may hold the pictures themselves


def check_images(
    findings: Findings, key: str, files: str | Sequence[str], column: str | None, limit: int, engine: str
) -> None:
    """No row that the run uses has an image; the first one of each file is named.

    key: that names the files. column: data.image_key; None: images are not looked at. limit: rows that are used of all
    files together, the first; -1: all. Files that cannot be read are not this check's business.
    """
    for file in paths(files):
        try:
            with pq.ParquetFile(Path(file).expanduser()) as parquet:
                row = None if column is None else _first_with_images(parquet, column, limit)
                rows = parquet.metadata.num_rows
        except (OSError, pa.ArrowException):
            continue
        if row is not None:
            why = (
                f"its row {row} has images (column {column!r}): {engine} does not take them, nor does any other engine "
                "in this version, and models are trained on text alone"
            )
            fix = "write it without rows that have images, or train on the text alone: data.image_key=null"
            findings.problem(key, file, why, fix)
        if limit >= 0:
            limit = max(limit - rows, 0)


def _first_with_images(parquet: pq.ParquetFile, column: str, limit: int) -> int | None:
    """Its row, counted from 0, among the first ``limit`` (-1: all)."""
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

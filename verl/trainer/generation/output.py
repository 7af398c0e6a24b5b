"""Responses on disk: one file per batch in ``OUT.parts/`` during the run, joined into ``OUT`` at its end.

A part gets its name only when it is completely on disk. ``settings.json`` beside the parts has the settings that decide
the responses: a later run resumes only if its own are the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl.errors import UserError
from verl.tracking.dumps import dump_rows
from verl.tracking.files import written_whole

SETTINGS = "settings.json"


class Output:
    """path: the file to write. settings: all settings that decide the responses. batches: number of parts."""

    def __init__(self, path: Path, settings: dict[str, Any], batches: int):
        self.path, self.batches = path, batches
        self.folder = path.with_name(f"{path.name}.parts")
        self._keep_settings(json.loads(json.dumps(settings)))

    def _keep_settings(self, settings: dict[str, Any]) -> None:
        file = self.folder / SETTINGS
        if file.exists():
            before = json.loads(file.read_text())
            if other := sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key)):
                changes = ", ".join(f"{key}={before.get(key)} there, {settings.get(key)} now" for key in other)
                raise UserError(
                    f"{self.folder} has responses of a run with other settings ({changes}). Repeat that run's command "
                    "to resume it, name another data.output_path, or remove the folder to start again."
                )
            return
        try:
            with written_whole(file) as partial:
                partial.write_text(json.dumps(settings, indent=1))
        except OSError as error:
            raise UserError(f"data.output_path={self.path}: {self.folder} cannot be written to: {error}") from error

    def missing(self) -> list[int]:
        return [batch for batch in range(self.batches) if not self._part(batch).exists()]

    def write(self, batch: int, rows: pa.Table) -> None:
        dump_rows(self.folder, batch, rows, "parquet")

    def _part(self, batch: int) -> Path:
        return self.folder / f"{batch}.parquet"

    def finish(self) -> None:
        """Joins all parts, in order, into the output file. The file appears only when it is complete."""
        with written_whole(self.path) as partial:
            if self.path.suffix == ".jsonl":
                with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
                    for table in self._tables():
                        for row in table.to_pylist():
                            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            else:
                with pq.ParquetWriter(partial, pq.read_schema(self._part(0))) as writer:
                    for table in self._tables():
                        writer.write_table(table)
        shutil.rmtree(self.folder)

    def _tables(self) -> Iterator[pa.Table]:
        for batch in range(self.batches):
            yield pq.read_table(self._part(batch))

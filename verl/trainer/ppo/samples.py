"""Generated samples on disk, for people and scripts to read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from verl.config.sections.models import Config
from verl.tracking import Trackers
from verl.tracking.dumps import generation_rows


class Samples:
    """Writes a table's prompts and responses as text, in the formats of ``trainer.generations_format``."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, trackers: Trackers):
        self._config, self._tokenizer, self._trackers = config.trainer, tokenizer, trackers

    @property
    def validation_folder(self) -> Path:
        trainer = self._config
        return Path(trainer.validation_data_dir or f"{trainer.default_local_dir}/validation").expanduser()

    def write_training(self, table: pa.Table, step: int) -> None:
        """Into ``trainer.rollout_data_dir``, if it is set."""
        if folder := self._config.rollout_data_dir:
            self._write(Path(folder).expanduser(), table, step)

    def write_validation(self, table: pa.Table, step: int) -> None:
        """Into the validation folder; the first ``trainer.log_val_generations`` also go to every logger."""
        rows = self._write(self.validation_folder, table, step)
        self._trackers.log_samples(rows[: self._config.log_val_generations], step)

    def _write(self, folder: Path, table: pa.Table, step: int) -> list[dict]:
        def decode(rows: list[list[int]]) -> list[str]:
            return self._tokenizer.batch_decode(rows, skip_special_tokens=True)

        rows = generation_rows(table, decode, step)
        for file_format in self._config.generations_format:
            self._trackers.dump(folder, step, rows, file_format)
        return rows

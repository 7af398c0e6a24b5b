"""The training loop of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from verl.config.sections.models import SFTConfig
from verl.data.loader import PromptLoader
from verl.data.ragged import Ragged
from verl.data.schema import ragged, with_columns
from verl.engine import TrainEngine
from verl.plan import MicroBatching, is_due
from verl.tracking import StageTimer, Trackers
from verl.trainer.checkpoints import Checkpoint, Checkpoints, SaveError
from verl.trainer.sft.loss import nll_loss

Metrics = dict[str, float]


class SFTTrainer:
    """``fit`` trains from ``step`` (0, or that of a checkpoint after ``restore``) to ``last_step``.

    train, val: see ``verl.trainer.sft.examples``. stop: called after each step; True ends the run there.
    """

    def __init__(
        self,
        config: SFTConfig,
        engine: TrainEngine,
        tokenizer: PreTrainedTokenizerBase,
        train: pa.Table,
        val: pa.Table | None,
        checkpoints: Checkpoints,
        trackers: Trackers,
        *,
        last_step: int,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.config, self.engine, self.tokenizer = config, engine, tokenizer
        self.train, self.val, self.checkpoints, self.trackers = train, val, checkpoints, trackers
        self.last_step, self.stop = last_step, stop
        self.step = 0
        size = config.data.micro_batch_size_per_gpu
        self.batching = MicroBatching(size, None if size else config.data.max_token_len_per_gpu)
        data = config.data
        self.loader = PromptLoader(train.num_rows, data.train_batch_size, shuffle=data.shuffle, seed=data.seed)
        self.timer = StageTimer()
        self.unsaved: SaveError | None = None  # why the last save failed

    def fit(self) -> bool:
        """Whether the last step was reached."""
        if self.step == 0 and self.val is not None and self.config.trainer.test_freq > 0:
            self.trackers.log(self.validate(), 0)
        stopping = self.stop()
        while self.step < self.last_step and not stopping:
            self.step += 1
            self.timer = StageTimer()
            with self.timer("step"):
                epoch, rows = next(self.loader)
                metrics = self.train_step(self.train.take(pa.array(rows)))
                if is_due(self.step, self.config.trainer.test_freq, self.last_step):
                    metrics |= self.validate()
            self.report(metrics, epoch, rows)
            stopping, save_freq = self.stop(), self.config.trainer.save_freq
            due = self.step == self.last_step or is_due(self.step, save_freq, self.last_step)
            if due or self.unsaved or (stopping and save_freq > 0):
                self.save()
        if self.unsaved:
            raise self.unsaved
        return self.step == self.last_step

    def train_step(self, batch: pa.Table) -> Metrics:
        """One optimizer step on the mean loss of all the batch's response tokens."""
        before = self.engine.flops
        with self.timer("update"):
            found = self.engine.update(weighted(batch), nll_loss, batching=self.batching, entropy=False)
            self.engine.step_schedule()
        own = {"grad_norm": "train/grad_norm", "lr": "train/lr", "skipped": "train/skipped_steps"}
        could = self.engine.peak_flops * self.timer.seconds["update"]
        mfu = {"perf/mfu": (self.engine.flops - before) / could} if could else {}
        return {own.get(name, name): value for name, value in found.items()} | mfu

    def validate(self) -> Metrics:
        """val/loss: mean negative log-likelihood of the validation examples' response tokens, in nats."""
        if self.val is None:
            return {}
        total = self.val.num_rows
        with self.timer("testing"), self.trackers.progress.stage("testing", total):
            found = self.engine.log_probs(self.val, temperature=1.0, batching=self.batching, entropy=False)
            log_probs = Ragged.from_column(found["log_probs"]).values
        return {"val/loss": -float(np.mean(log_probs, dtype=np.float64))}

    def report(self, metrics: Metrics, epoch: int, rows: np.ndarray) -> None:
        tokens = int(self.prompt_lengths[rows].sum() + self.response_lengths[rows].sum())
        seconds = self.timer.seconds
        self.trackers.log(
            {
                "training/global_step": self.step,
                "training/epoch": epoch,
                **metrics,
                **{f"timing_s/{stage}": value for stage, value in seconds.items()},
                "perf/total_num_tokens": tokens,
                "perf/throughput": tokens / seconds["step"],
            },
            self.step,
        )

    @property
    def prompt_lengths(self) -> np.ndarray:
        return ragged(self.train, "prompt_ids").lengths

    @property
    def response_lengths(self) -> np.ndarray:
        return ragged(self.train, "response_ids").lengths

    # ---- checkpoints

    def save(self) -> None:
        """Saves a checkpoint. If that fails, on a full disk for example, the run continues and tries again after each
        step."""
        try:
            with self.trackers.progress.stage("save_checkpoint"):
                self.checkpoints.save(self.step, self._write, {"step": self.step, "loader": self.loader.state_dict()})
            self.unsaved = None
        except SaveError as error:
            self.unsaved = error
            self.trackers.progress.warn(f"{error}. Saving is tried again after each step.")

    def _write(self, folder: Path) -> None:
        """Writes model/, from which training resumes, and huggingface/, which transformers loads."""
        self.engine.save(folder / "model")
        self.engine.export_hf(folder / "huggingface", self.tokenizer)

    def restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        self.step = state["step"]
        self.loader.load_state_dict(state["loader"])
        self.engine.load(checkpoint.folder / "model")


def weighted(batch: pa.Table) -> pa.Table:
    """The batch with ``loss_weights`` that are equal for all response tokens."""
    mask = ragged(batch, "response_mask")
    return with_columns(batch, loss_weights=mask.like(mask.values / np.float32(len(mask.values))))

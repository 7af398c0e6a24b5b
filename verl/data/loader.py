"""Which rows each step trains on. The order is a pure function of (seed, epoch), so that resuming is exact."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from verl.errors import UserError


class PromptLoader:
    """Batches of row numbers, epoch after epoch without end; an epoch's last, smaller batch is left out.

    Its state counts rows, not batches: resumed with another batch size, it goes on behind the rows already used.
    """

    def __init__(self, num_rows: int, batch_size: int, *, shuffle: bool = True, seed: int = 0):
        if batch_size > num_rows:
            raise UserError(
                f"data.train_batch_size={batch_size} is more than the {num_rows} prompts of the data set: "
                f"set it to {num_rows} or less"
            )
        self.num_rows, self.batch_size, self.shuffle, self.seed = num_rows, batch_size, shuffle, seed
        self.epoch, self.position = 0, 0  # of the next row
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, its order)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return self

    def __next__(self) -> tuple[int, np.ndarray]:
        """(epoch, row numbers): int64, shape (batch_size,)."""
        return self.draw(self.batch_size)

    def draw(self, count: int) -> tuple[int, np.ndarray]:
        """(epoch, row numbers): int64, shape (count,). What an epoch has left is left out where it is less."""
        if self.position + count > self.num_rows:
            self.epoch, self.position = self.epoch + 1, 0
        if self._order is None or self._order[0] != self.epoch:
            self._order = (self.epoch, epoch_order(self.num_rows, self.epoch, self.seed, self.shuffle))
        start, self.position = self.position, self.position + count
        return self.epoch, self._order[1][start : self.position]

    def give_back(self, count: int) -> None:
        """The last so many rows of the last draw come again in the next one."""
        self.position -= count

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "num_rows": self.num_rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["num_rows"] != self.num_rows:
            raise UserError(
                f"the data set has {self.num_rows} prompts, the checkpoint's had {state['num_rows']}: resume with the "
                "data that the run began with, or begin a new one (trainer.resume_mode=disable)"
            )
        self.epoch, self.position = state["epoch"], state["position"]


def epoch_order(num_rows: int, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
    """A permutation of the rows: int64, shape (num_rows,).

    Sorted by raw 64-bit draws: numpy keeps those the same in every version, unlike ``Generator.permutation``.
    """
    if not shuffle:
        return np.arange(num_rows)
    noise = np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(num_rows)
    return np.argsort(noise, kind="stable")

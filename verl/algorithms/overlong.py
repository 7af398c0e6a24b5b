"""What a response loses for coming near the length limit, before it is cut off there."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class OverlongSettings(Protocol):
    """The ``reward_model.overlong_buffer`` section."""

    @property
    def enable(self) -> bool: ...
    @property
    def len(self) -> int: ...
    @property
    def penalty_factor(self) -> float: ...


def overlong_penalties(lengths: np.ndarray, settings: OverlongSettings, max_length: int) -> np.ndarray:
    """float64, shape (B,): what is added to each response's score, never positive; lengths in tokens.

    Soft overlong punishment (DAPO, Yu et al. 2025, arXiv:2503.14476, equation 13) times penalty_factor: 0 up to
    max_length - len, from there falling in a line to -penalty_factor at max_length. All 0 where it is not enabled.
    """
    if not settings.enable:
        return np.zeros(len(lengths))
    over = lengths - (max_length - settings.len)
    return -settings.penalty_factor * np.clip(over / settings.len, 0.0, 1.0)

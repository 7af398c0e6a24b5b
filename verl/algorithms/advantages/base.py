"""The inputs and results of advantage estimators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from verl.data.ragged import Ragged
from verl.errors import UserError


class AdvantageSettings(Protocol):
    """The keys of the ``algorithm`` section that estimators read."""

    @property
    def gamma(self) -> float: ...
    @property
    def lam(self) -> float: ...
    @property
    def norm_adv_by_std_in_grpo(self) -> bool: ...


@dataclass(frozen=True)
class AdvantageInputs:
    """token_rewards, values: float columns; response_mask: 1 where the policy wrote the token; all aligned.

    values: the critic's, None without a critic. group: int64, shape (B,): rows of one prompt share it.
    greedy_rewards: float64, shape (B,): the reward of the greedy response to the row's prompt; None without greedy
        responses.
    """

    token_rewards: Ragged
    values: Ragged | None
    response_mask: Ragged
    group: np.ndarray
    settings: AdvantageSettings
    greedy_rewards: np.ndarray | None = None


Compute = Callable[[AdvantageInputs], tuple[Ragged, Ragged]]


@dataclass(frozen=True)
class Estimator:
    """needs_critic: reads ``values``. needs_greedy: reads ``greedy_rewards``, so that the rollout generates greedy
        responses.
    compares_group: compares a response with the others to its prompt.
    reads: keys of the ``algorithm`` section that only some estimators read; None if that is not known.
    """

    name: str
    compute: Compute
    needs_critic: bool = False
    needs_greedy: bool = False
    compares_group: bool = False
    reads: frozenset[str] | None = frozenset()

    def __call__(self, inputs: AdvantageInputs) -> tuple[Ragged, Ragged]:
        """Advantages and returns, checked to be columns of the response tokens."""
        advantages, returns = self.compute(inputs)
        for what, column in (("advantages", advantages), ("returns", returns)):
            if not np.array_equal(column.offsets, inputs.response_mask.offsets):
                raise UserError(
                    f"algorithm.adv_estimator={self.name} gave {what} that are not aligned with the response tokens: "
                    f"{len(column)} rows of {len(column.values)} tokens instead of {len(inputs.response_mask)} rows of "
                    f"{len(inputs.response_mask.values)}. Build them with response_mask.like(values)."
                )
        return advantages, returns

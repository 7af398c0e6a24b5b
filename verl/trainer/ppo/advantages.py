"""Advantages: one registry of estimators over ragged numpy columns, on the driver.

An estimator is a function ``AdvantageInputs -> (advantages, returns)``, both float32 columns of the response tokens,
zero on tokens that the policy did not write. ``algorithm.adv_estimator`` names one of the registry, or a function of
the user's own as ``package.module:function`` (a true attribute ``needs_critic`` on it asks for a critic).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from verl.data.ragged import Ragged, offsets_of
from verl.errors import UserError

WHITEN_EPS = 1e-8  # added to the variance
GROUP_EPS = 1e-6  # added to a group's standard deviation


class AdvantageSettings(Protocol):
    """What estimators read of the ``algorithm`` section."""

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
    """

    token_rewards: Ragged
    values: Ragged | None
    response_mask: Ragged
    group: np.ndarray
    settings: AdvantageSettings


Compute = Callable[[AdvantageInputs], tuple[Ragged, Ragged]]


@dataclass(frozen=True)
class Estimator:
    name: str
    compute: Compute
    needs_critic: bool = False

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


ESTIMATORS: dict[str, Estimator] = {}


def register(name: str, *, needs_critic: bool = False) -> Callable[[Compute], Compute]:
    def add(compute: Compute) -> Compute:
        ESTIMATORS[name] = Estimator(name, compute, needs_critic)
        return compute

    return add


def resolve(name: str) -> Estimator:
    """The estimator that ``algorithm.adv_estimator`` names. UserError when there is none."""
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, ESTIMATORS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"algorithm.adv_estimator={name} is not one of {', '.join(sorted(ESTIMATORS))}.{hint} "
            "A function of your own is written package.module:function."
        )
    try:
        compute = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"algorithm.adv_estimator={name} cannot be imported: {error}. "
            "It is written package.module:function; the package must be on PYTHONPATH."
        ) from error
    if not callable(compute):
        raise UserError(f"algorithm.adv_estimator={name} is not a function but {compute!r}.")
    return Estimator(name, compute, bool(getattr(compute, "needs_critic", False)))


@register("gae", needs_critic=True)
def gae(inputs: AdvantageInputs) -> tuple[Ragged, Ragged]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438), whitened over the batch.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns = A + V, before whitening.
    The episode ends with the response: V and A after its last token are 0. "Next" is the row's next token that the
    policy wrote: tokens in between (a tool's output) are no steps of the policy, so nothing is discounted over them.
    """
    if inputs.values is None:
        raise UserError("algorithm.adv_estimator=gae needs a critic's values; without a critic use grpo.")
    mask = inputs.response_mask
    kept = mask.values > 0
    rewards = _steps(inputs.token_rewards, kept)
    values = _steps(inputs.values, kept)

    deltas = np.zeros(len(values.values))  # first the next values; in place, for these are the largest arrays of a step
    deltas[:-1] = values.values[1:]
    deltas[values.offsets[1:][values.lengths > 0] - 1] = 0.0
    deltas *= inputs.settings.gamma
    deltas += rewards.values
    deltas -= values.values
    advantages = discounted_suffix_sums(values.like(deltas), inputs.settings.gamma * inputs.settings.lam)
    returns = np.add(advantages.values, values.values, out=deltas)
    return _scatter(whiten(advantages.values), mask, kept), _scatter(returns, mask, kept)


@register("grpo")
def grpo(inputs: AdvantageInputs) -> tuple[Ragged, Ragged]:
    """Group-relative advantages (Shao et al. 2024, arXiv:2402.03300): every token of a response gets
    (R - mean of its group) / (std of its group + 1e-6), with the unbiased std and R the response's summed rewards.

    norm_adv_by_std_in_grpo=False leaves the division out (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).
    A group of one has mean 0 and std 1: its advantage is its reward. Returns are the advantages.
    """
    mask = inputs.response_mask
    rewards = mask.row_sums(np.where(mask.values > 0, inputs.token_rewards.values, 0.0))
    _, group_of_row = np.unique(inputs.group, return_inverse=True)
    sizes = np.bincount(group_of_row)
    alone = sizes == 1
    means = np.where(alone, 0.0, np.bincount(group_of_row, weights=rewards) / sizes)
    centred = rewards - means[group_of_row]
    if inputs.settings.norm_adv_by_std_in_grpo:
        variances = np.bincount(group_of_row, weights=centred**2) / np.maximum(sizes - 1, 1)
        stds = np.where(alone, 1.0, np.sqrt(variances))
        centred = centred / (stds[group_of_row] + GROUP_EPS)
    advantages = mask.like(np.where(mask.values > 0, mask.spread(centred), 0.0).astype(np.float32))
    return advantages, advantages


def discounted_suffix_sums(rows: Ragged, discount: float) -> Ragged:
    """float64: y_t = x_t + discount * y_{t+1} within each row. One numpy step a position, over all rows at once."""
    sums = np.empty(len(rows.values), np.float64)
    longest_first = np.argsort(-rows.lengths, kind="stable")
    lengths = rows.lengths[longest_first]
    last_token = rows.offsets[1:][longest_first] - 1
    carry = np.zeros(len(rows))
    for back in range(lengths[0] if len(lengths) else 0):  # tokens from the end
        alive = np.searchsorted(-lengths, -back)  # rows longer than `back` come first
        tokens = last_token[:alive] - back
        carry[:alive] = rows.values[tokens] + discount * carry[:alive]
        sums[tokens] = carry[:alive]
    return rows.like(sums)


def whiten(values: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(var + 1e-8), unbiased variance; a single value becomes 0."""
    variance = values.var(ddof=1) if len(values) > 1 else 0.0
    whitened = values - (values.mean() if len(values) else 0.0)
    whitened /= np.sqrt(variance + WHITEN_EPS)
    return whitened


def _steps(column: Ragged, kept: np.ndarray) -> Ragged:
    """The column's tokens that the policy wrote."""
    if kept.all():
        return column
    lengths = column.row_sums(kept).astype(np.int64)
    return Ragged(column.values[kept], offsets_of(lengths))


def _scatter(values: np.ndarray, mask: Ragged, kept: np.ndarray) -> Ragged:
    """float32: values on the kept tokens, zero elsewhere."""
    if len(values) == len(mask.values):
        return mask.like(values.astype(np.float32))
    full = np.zeros(len(mask.values), np.float32)
    full[kept] = values
    return mask.like(full)

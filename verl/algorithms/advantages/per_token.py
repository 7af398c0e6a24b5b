"""Estimators that follow the rewards of a response from token to token."""

from __future__ import annotations

import numpy as np

from verl.algorithms.advantages.base import AdvantageInputs
from verl.algorithms.advantages.numerics import discounted_suffix_sums, scatter, steps, whiten
from verl.data.ragged import Ragged
from verl.errors import UserError


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
    rewards = steps(inputs.token_rewards, kept)
    values = steps(inputs.values, kept)

    deltas = np.zeros(len(values.values))  # first the next values; in place, for these are the largest arrays of a step
    deltas[:-1] = values.values[1:]
    deltas[values.offsets[1:][values.lengths > 0] - 1] = 0.0
    deltas *= inputs.settings.gamma
    deltas += rewards.values
    deltas -= values.values
    advantages = discounted_suffix_sums(values.like(deltas), inputs.settings.gamma * inputs.settings.lam)
    returns = np.add(advantages.values, values.values, out=deltas)
    return scatter(whiten(advantages.values), mask, kept), scatter(returns, mask, kept)


def reinforce_plus_plus(inputs: AdvantageInputs) -> tuple[Ragged, Ragged]:
    """REINFORCE++ (Hu 2025, arXiv:2501.03262): the discounted rewards from a token on, whitened over the batch.

    returns_t = r_t + gamma returns_{t+1}, over the tokens that the policy wrote; advantages are the whitened returns.
    """
    mask = inputs.response_mask
    kept = mask.values > 0
    returns = discounted_suffix_sums(steps(inputs.token_rewards, kept), inputs.settings.gamma).values
    return scatter(whiten(returns), mask, kept), scatter(returns, mask, kept)


def remax(inputs: AdvantageInputs) -> tuple[Ragged, Ragged]:
    """ReMax (Li et al. 2023, arXiv:2310.10505): the rewards from a token on, less the reward of the greedy response to
    the same prompt. Returns are the sums before the baseline is taken off."""
    if inputs.greedy_rewards is None:
        raise UserError("algorithm.adv_estimator=remax needs the rewards of greedy responses (greedy_rewards).")
    mask = inputs.response_mask
    kept = mask.values > 0
    returns = discounted_suffix_sums(steps(inputs.token_rewards, kept), 1.0).values
    advantages = returns - mask.spread(inputs.greedy_rewards)[kept]
    return scatter(advantages, mask, kept), scatter(returns, mask, kept)

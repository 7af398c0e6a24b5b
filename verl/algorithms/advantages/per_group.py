"""Estimators that set each response against the others to its prompt: one number a response, for each of its tokens.

R is a response's summed rewards. A response that is alone in its group has no other to be compared with: its advantage
is its R. Returns are the advantages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from verl.algorithms.advantages.base import AdvantageInputs
from verl.algorithms.advantages.numerics import scatter, whiten
from verl.data.ragged import Ragged

GROUP_EPS = 1e-6  # added to a group's standard deviation


@dataclass(frozen=True)
class Groups:
    """Which rows belong together, and numbers of each row's group; shapes (B,) where not said otherwise.

    of_row: int64: the group's number, from 0. sizes: int64. lowest_first: int64: rows by group, then by value.
    firsts: int64, (G,): where each group begins in ``lowest_first``.
    """

    values: np.ndarray
    of_row: np.ndarray
    sizes: np.ndarray
    lowest_first: np.ndarray
    firsts: np.ndarray

    @classmethod
    def of(cls, group: np.ndarray, values: np.ndarray) -> Groups:
        """group: rows of one prompt share it. values: float64, (B,)."""
        _, of_row, counts = np.unique(group, return_inverse=True, return_counts=True)
        firsts = np.cumsum(counts) - counts
        return cls(values, of_row, counts[of_row], np.lexsort((values, of_row)), firsts)

    @property
    def alone(self) -> np.ndarray:
        return self.sizes == 1

    @property
    def unequal(self) -> np.ndarray:
        """Whether the values of the row's group differ at all."""
        lasts = np.append(self.firsts[1:], len(self.values)) - 1
        ends = self.values[self.lowest_first]
        return (ends[self.firsts] != ends[lasts])[self.of_row]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum over the row's group."""
        return np.bincount(self.of_row, weights=values)[self.of_row] if len(values) else values

    def centred(self) -> np.ndarray:
        """Values less the mean of their group; a row that is alone keeps its value."""
        return self.values - np.where(self.alone, 0.0, self.sums(self.values) / self.sizes)

    def stds(self) -> np.ndarray:
        """The unbiased standard deviation of the row's group; 1 for a row that is alone."""
        variances = self.sums(self.centred() ** 2) / np.maximum(self.sizes - 1, 1)
        return np.where(self.alone, 1.0, np.sqrt(variances))


def grpo(inputs: AdvantageInputs) -> tuple[Ragged, Ragged]:
    """Group-relative advantages (Shao et al. 2024, arXiv:2402.03300): (R - mean of the group) / (std + 1e-6), with
    the unbiased std.

    norm_adv_by_std_in_grpo=False leaves the division out (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).
    """
    groups = _rewards(inputs)
    centred = groups.centred()
    if inputs.settings.norm_adv_by_std_in_grpo:
        centred = centred / (groups.stds() + GROUP_EPS)
    return _for_each_token(inputs, centred)


def rloo(inputs: AdvantageInputs) -> tuple[Ragged, Ragged]:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740): R - mean of the group's other responses, which
    is n / (n - 1) times R - mean of the group."""
    groups = _rewards(inputs)
    return _for_each_token(inputs, groups.centred() * groups.sizes / np.maximum(groups.sizes - 1, 1))


def reinforce_plus_plus_baseline(inputs: AdvantageInputs) -> tuple[Ragged, Ragged]:
    """REINFORCE++ with the group's mean as baseline (Hu 2025, arXiv:2501.03262): R - mean of the group, for each token,
    then whitened over the batch's tokens."""
    mask = inputs.response_mask
    written = mask.values > 0
    advantages = scatter(whiten(mask.spread(_rewards(inputs).centred())[written]), mask, written)
    return advantages, advantages


def opo(inputs: AdvantageInputs) -> tuple[Ragged, Ragged]:
    """On-policy RL with the optimal baseline (Hao et al. 2025, arXiv:2505.23585): R - sum(l R) / sum(l) over the group,
    l the tokens that the policy wrote: the baseline of least variance, if a gradient's square grows with the length."""
    groups, mask = _rewards(inputs), inputs.response_mask
    lengths = mask.row_sums(mask.values > 0)
    baseline = groups.sums(lengths * groups.values) / np.maximum(groups.sums(lengths), 1.0)
    return _for_each_token(inputs, groups.values - np.where(groups.alone, 0.0, baseline))


def grpo_passk(inputs: AdvantageInputs) -> tuple[Ragged, Ragged]:
    """GRPO for pass@k, k the group's size (Tang et al. 2025, arXiv:2503.19595): what the best response adds to the
    group's maximum. Its advantage is the highest R less the second highest (0 where they are equal), all others' are 0.

    Divided by std + 1e-6 as in GRPO unless norm_adv_by_std_in_grpo=False.
    """
    groups = _rewards(inputs)
    advantages = np.zeros(len(groups.values))
    if len(advantages):
        lasts = np.append(groups.firsts[1:], len(advantages)) - 1
        best, second = groups.lowest_first[lasts], groups.lowest_first[np.maximum(lasts - 1, 0)]
        advantages[best] = groups.values[best] - np.where(groups.alone[best], 0.0, groups.values[second])
    if inputs.settings.norm_adv_by_std_in_grpo:
        advantages = advantages / (groups.stds() + GROUP_EPS)
    return _for_each_token(inputs, advantages)


def gpg(inputs: AdvantageInputs) -> tuple[Ragged, Ragged]:
    """Group policy gradient (Chu et al. 2025, arXiv:2504.02546): alpha (R - mean of the group), not divided by the std.

    alpha = B / (B - M), M of the batch's B responses being in groups whose rewards are all equal, be they right or
    wrong: such responses add nothing to the gradient, and alpha gives back what they take from its mean. The formula
    is that of the authors' repository (AMAP-ML/GPG, with F_norm = 1), whose trainer counts groups of equal rewards;
    other implementations take the responses of reward 0 for M. With ``algorithm.filter_groups`` alpha is 1.
    """
    groups = _rewards(inputs)
    useful = np.where(groups.alone, groups.values != 0, groups.unequal)
    return _for_each_token(inputs, groups.centred() * len(useful) / max(np.count_nonzero(useful), 1))


def _rewards(inputs: AdvantageInputs) -> Groups:
    mask = inputs.response_mask
    return Groups.of(inputs.group, mask.row_sums(np.where(mask.values > 0, inputs.token_rewards.values, 0.0)))


def _for_each_token(inputs: AdvantageInputs, per_row: np.ndarray) -> tuple[Ragged, Ragged]:
    mask = inputs.response_mask
    advantages = mask.like(np.where(mask.values > 0, mask.spread(per_row), 0.0).astype(np.float32))
    return advantages, advantages

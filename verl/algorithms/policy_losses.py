"""The policy losses, one function each. ``policy_loss.loss_mode`` names them (see ``verl.config.policy_losses``).

A loss is a function ``(tokens: PolicyTokens, settings: ActorConfig) -> (losses, shares)``.

- losses: (T,), with gradient: the loss of each token in ``sum_t weight_t * loss_t``.
- shares: metric name -> (T,) flags, reported as their share of the mini-batch's tokens.

A token's loss may depend on its own row, whose tokens are always in one micro-batch, and on nothing else of the
micro-batch. Only then is the gradient the same for any split.

r is the probability ratio to the policy that generated the tokens, A the advantage. Clip ranges are 1 - clip_ratio_low
to 1 + clip_ratio_high.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from verl.algorithms.kl import LOG_RATIO_LIMIT

if TYPE_CHECKING:
    from verl.config.sections.models import ActorConfig

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PolicyTokens:
    """The T response tokens of a micro-batch, in whole rows. All values are 0 where the mask is 0.

    mask: bool, whether the policy wrote the token. log_probs: with gradient. columns: the unmasked columns of the table
    that an update reads (``worker.reads_of``).
    """

    mask: torch.Tensor
    log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    advantages: torch.Tensor
    columns: Tensors

    @classmethod
    def of(cls, outputs: Tensors, columns: Tensors) -> PolicyTokens:
        mask = columns["response_mask"] > 0
        log_probs, old_log_probs, advantages = (
            torch.where(mask, column, 0.0)
            for column in (outputs["log_probs"], columns["old_log_probs"], columns["advantages"])
        )
        return cls(mask, log_probs, old_log_probs, advantages, columns)

    @cached_property
    def log_ratio(self) -> torch.Tensor:
        return self.log_probs - self.old_log_probs

    @cached_property
    def ratio(self) -> torch.Tensor:
        return bounded_exp(self.log_ratio)

    @property
    def selected(self) -> torch.Tensor:
        """bool: the tokens that ``loss_modes.selected_tokens`` picked from the mini-batch."""
        return self.mask & (self.columns["selected"] > 0)

    def mean_of_row(self, values: torch.Tensor) -> torch.Tensor:
        """(T,): for each token the mean over what the policy wrote of its row. values: 0 where the mask is."""
        rows, row_of_token = torch.unique(self.columns["row_ids"], return_inverse=True)
        sums, counts = (
            torch.zeros(len(rows), dtype=values.dtype, device=values.device).index_add(0, row_of_token, per_token)
            for per_token in (values, self.mask.to(values.dtype))
        )
        return (sums / counts.clamp(min=1))[row_of_token]


TokenLoss = Callable[[PolicyTokens, "ActorConfig"], tuple[torch.Tensor, Tensors]]


def bounded_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped(ratio: torch.Tensor, advantages: torch.Tensor, settings: ActorConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """max(-A r, -A clip(r)), and where clipping decides (Schulman et al. 2017, arXiv:1707.06347)."""
    free = -advantages * ratio
    bound = -advantages * ratio.clamp(1.0 - settings.clip_ratio_low, 1.0 + settings.clip_ratio_high)
    return torch.maximum(free, bound), bound > free


def vanilla(tokens: PolicyTokens, settings: ActorConfig) -> tuple[torch.Tensor, Tensors]:
    """PPO: clipped surrogate (Schulman et al. 2017, arXiv:1707.06347) with asymmetric range (Yu et al. 2025,
    arXiv:2503.14476) and dual clip (Ye et al. 2020, arXiv:1912.09729):

    max(-A r, -A clip(r));  where A < 0, at most -A clip_ratio_c.
    """
    surrogate, is_clipped = clipped(tokens.ratio, tokens.advantages, settings)
    ceiling = -tokens.advantages * settings.clip_ratio_c
    lower = (tokens.advantages < 0) & (surrogate > ceiling)
    shares = {"actor/pg_clipfrac": is_clipped, "actor/pg_clipfrac_lower": lower}
    return torch.where(lower, ceiling, surrogate), shares


def gspo(tokens: PolicyTokens, settings: ActorConfig) -> tuple[torch.Tensor, Tensors]:
    """Group sequence policy optimization (Zheng et al. 2025, arXiv:2507.18071): max(-A s, -A clip(s)), s the response's
    ratio, exp of the mean log-ratio of its tokens.

    In the form of the paper's GSPO-token, s_t = sg(s) p_t / sg(p_t), sg stopping the gradient: the same gradient where
    a response's tokens share their advantage, and defined where they do not. Usual ranges are near 3e-4.
    """
    log_s = tokens.mean_of_row(tokens.log_ratio).detach() + tokens.log_probs - tokens.log_probs.detach()
    losses, is_clipped = clipped(bounded_exp(log_s), tokens.advantages, settings)
    return losses, {"actor/pg_clipfrac": is_clipped}


def cispo(tokens: PolicyTokens, settings: ActorConfig) -> tuple[torch.Tensor, Tensors]:
    """Clipped importance weights (MiniMax-M1, Chen et al. 2025, arXiv:2506.13585): -sg(clip(r)) A log p. The weight is
    bounded, but no token loses its gradient."""
    weight = tokens.ratio.detach().clamp(1.0 - settings.clip_ratio_low, 1.0 + settings.clip_ratio_high)
    return -weight * tokens.advantages * tokens.log_probs, {"actor/pg_clipfrac": weight != tokens.ratio}


def geo_mean(tokens: PolicyTokens, settings: ActorConfig) -> tuple[torch.Tensor, Tensors]:
    """Geometric-mean policy optimization (Zhao et al. 2025, arXiv:2507.20673): -A times the geometric mean of the
    response's ratios, each of them clipped where that makes the loss larger; A the mean advantage of its tokens.

    The range is one of log r: -clip_ratio_low to clip_ratio_high, in the paper 0.4 on both sides.
    """
    advantage = tokens.mean_of_row(tokens.advantages)
    bound = tokens.log_ratio.clamp(-settings.clip_ratio_low, settings.clip_ratio_high)
    pessimistic = torch.where(
        advantage > 0, torch.minimum(tokens.log_ratio, bound), torch.maximum(tokens.log_ratio, bound)
    )
    losses = -advantage * bounded_exp(tokens.mean_of_row(pessimistic))
    return losses, {"actor/pg_clipfrac": pessimistic != tokens.log_ratio}


def sapo(tokens: PolicyTokens, settings: ActorConfig) -> tuple[torch.Tensor, Tensors]:
    """Soft adaptive policy optimization (Gao et al. 2025, arXiv:2511.20347): -A (4 / tau) sigmoid(tau (r - 1)), tau
    tau_pos where A > 0, else tau_neg: a gate in place of the clip, with slope 1 at r = 1 and none far from it."""
    tau = torch.where(tokens.advantages > 0, settings.tau_pos, settings.tau_neg)
    return -tokens.advantages * 4.0 / tau * torch.sigmoid(tau * (tokens.ratio - 1.0)), {}


def gpg(tokens: PolicyTokens, settings: ActorConfig) -> tuple[torch.Tensor, Tensors]:
    """Policy gradient without a ratio (GPG, Chu et al. 2025, arXiv:2504.02546): -A log p."""
    return -tokens.advantages * tokens.log_probs, {}


def clip_cov(tokens: PolicyTokens, settings: ActorConfig) -> tuple[torch.Tensor, Tensors]:
    """Clip-Cov (Cui et al. 2025, arXiv:2505.22617): PPO's clipped surrogate, and nothing for the selected tokens, which
    are some of high covariance (``covariance.some_covariances``)."""
    losses, is_clipped = clipped(tokens.ratio, tokens.advantages, settings)
    shares = {"actor/pg_clipfrac": is_clipped, "actor/pg_selected": tokens.selected}
    return torch.where(tokens.selected, 0.0, losses), shares


def kl_cov(tokens: PolicyTokens, settings: ActorConfig) -> tuple[torch.Tensor, Tensors]:
    """KL-Cov (Cui et al. 2025, arXiv:2505.22617): -A r, and ppo_kl_coef |log r| on top for the selected tokens,
    those of the highest covariance (``covariance.highest_covariances``). Nothing is clipped."""
    penalty = settings.policy_loss.ppo_kl_coef * tokens.log_ratio.abs()
    losses = -tokens.advantages * tokens.ratio + torch.where(tokens.selected, penalty, 0.0)
    return losses, {"actor/pg_selected": tokens.selected}

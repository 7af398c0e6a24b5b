"""PPO's losses on the flat response tokens of a micro-batch, and the weights that make them additive.

The driver computes ``loss_weights`` once for a whole mini-batch; a loss is then ``sum_t weight_t * loss_t``, so that
summing it over micro-batches and ranks gives the mini-batch's loss and gradient whatever the split.

A loss function is ``(outputs, batch, **settings) -> (loss, metrics)`` on tensors of shape (T,), float32:
outputs: what the forward gave (``log_probs``, ``entropy`` when asked for; ``values`` for a critic), with gradient;
batch: the table's token columns (``loss_weights``, ``response_mask``, ``advantages``, ``old_log_probs``, ...).
Metrics are floats without gradient that add up over micro-batches and ranks like the loss; means over tokens are
divided by ``num_tokens``, the mini-batch's count of tokens that the policy wrote. A token with mask 0 contributes
exactly nothing, whatever its columns hold (inf and nan included).
"""

from __future__ import annotations

import numpy as np
import torch

from verl.data.ragged import Ragged
from verl.trainer.ppo.kl import LOG_RATIO_LIMIT, kl_estimate

Tensors = dict[str, torch.Tensor]
LossAndMetrics = tuple[torch.Tensor, Tensors]

AGGREGATION_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def aggregation_weights(response_mask: Ragged, mode: str, max_response_length: int) -> Ragged:
    """float32 weight of every token in a mini-batch's loss, 0 where the mask is 0. With N sequences (those in which
    the policy wrote a token at all):

    token-mean: 1 / (mini-batch's tokens).
    seq-mean-token-sum: 1 / N.
    seq-mean-token-mean: 1 / (N * the sequence's tokens).
    seq-mean-token-sum-norm: 1 / (N * max_response_length), a constant divisor (Dr. GRPO, arXiv:2503.20783).
    """
    mask = (response_mask.values > 0).astype(np.float64)
    counts = response_mask.row_sums(mask)
    num_sequences = max(int(np.count_nonzero(counts)), 1)
    match mode:
        case "token-mean":
            weights = mask / max(counts.sum(), 1)
        case "seq-mean-token-sum":
            weights = mask / num_sequences
        case "seq-mean-token-mean":
            weights = mask / (num_sequences * response_mask.spread(np.maximum(counts, 1)))
        case "seq-mean-token-sum-norm":
            weights = mask / (num_sequences * max_response_length)
        case _:
            raise ValueError(f"unknown loss_agg_mode {mode!r}: one of {', '.join(AGGREGATION_MODES)}")
    return response_mask.like(weights.astype(np.float32))


def ppo_policy_loss(
    outputs: Tensors,
    batch: Tensors,
    *,
    clip_low: float,
    clip_high: float,
    clip_c: float,
    entropy_coeff: float,
    kl_loss_coef: float,
    kl_loss_type: str,
    num_tokens: int,
) -> LossAndMetrics:
    """Clipped surrogate (Schulman et al. 2017, arXiv:1707.06347) with asymmetric clip range (arXiv:2503.14476) and
    dual clip (Ye et al. 2020, arXiv:1912.09729). With ratio r = exp(log_prob - old_log_prob), log-ratio cut to +-20:

    L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));  where A < 0: L = min(L, -A clip_c), clip_c > 1.
    loss = sum w c L  -  entropy_coeff * sum w H  +  kl_loss_coef * sum w KL(policy || reference).

    c are the table's ``rollout_is_weights`` (see verl.trainer.ppo.corrections), 1 where it has none.
    Entropy is read from outputs only when its coefficient is not 0 or it is there; ref_log_probs likewise only with
    a KL coefficient. Metrics: actor/{pg_loss, pg_clipfrac, pg_clipfrac_lower, ppo_kl, entropy_loss, kl_loss}.
    """
    mask, weights = _mask_and_weights(batch)
    log_probs = torch.where(mask, outputs["log_probs"], 0.0)
    advantages = torch.where(mask, batch["advantages"], 0.0)
    log_ratio = log_probs - torch.where(mask, batch["old_log_probs"], 0.0)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()

    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.maximum(unclipped, clipped)
    ceiling = -advantages * clip_c
    lower = (advantages < 0) & (surrogate > ceiling)
    pg_losses = weights * torch.where(lower, ceiling, surrogate)
    if "rollout_is_weights" in batch:
        pg_losses = pg_losses * torch.where(mask, batch["rollout_is_weights"], 0.0)
    pg_loss = pg_losses.sum()

    loss = pg_loss
    metrics = {
        "actor/pg_loss": pg_loss.detach(),
        "actor/pg_clipfrac": (clipped > unclipped).sum() / num_tokens,
        "actor/pg_clipfrac_lower": lower.sum() / num_tokens,
        "actor/ppo_kl": -log_ratio.detach().sum() / num_tokens,
    }
    if entropy_coeff or "entropy" in outputs:
        entropy = (weights * torch.where(mask, outputs["entropy"], 0.0)).sum()
        metrics["actor/entropy_loss"] = entropy.detach()
        if entropy_coeff:
            loss = loss - entropy_coeff * entropy
    if kl_loss_coef:
        kl = kl_estimate(log_probs, torch.where(mask, batch["ref_log_probs"], 0.0), kl_loss_type)
        kl_loss = (weights * kl).sum()
        loss = loss + kl_loss_coef * kl_loss
        metrics["actor/kl_loss"] = kl_loss.detach()
    return loss, metrics


def value_loss(outputs: Tensors, batch: Tensors, *, cliprange_value: float, num_tokens: int) -> LossAndMetrics:
    """Clipped value loss: sum w * 1/2 max((V - R)^2, (clip(V, V_old +- cliprange_value) - R)^2).

    The factor 1/2 is part of it. R are the table's ``returns``, V_old its ``values``.
    Metrics: critic/{vf_loss, vf_clipfrac, vpred_mean}.
    """
    mask, weights = _mask_and_weights(batch)
    predicted = torch.where(mask, outputs["values"], 0.0)
    old = torch.where(mask, batch["values"], 0.0)
    returns = torch.where(mask, batch["returns"], 0.0)

    unclipped = (predicted - returns).square()
    clipped = (predicted.clamp(old - cliprange_value, old + cliprange_value) - returns).square()
    loss = 0.5 * (weights * torch.maximum(unclipped, clipped)).sum()
    return loss, {
        "critic/vf_loss": loss.detach(),
        "critic/vf_clipfrac": (clipped > unclipped).sum() / num_tokens,
        "critic/vpred_mean": predicted.detach().sum() / num_tokens,
    }


def _mask_and_weights(batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    mask = batch["response_mask"] > 0
    return mask, torch.where(mask, batch["loss_weights"], 0.0)

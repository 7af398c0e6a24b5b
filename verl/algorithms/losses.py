"""Losses of policy and critic on the flat response tokens of a micro-batch, and the weights that make them additive.

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

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from verl.algorithms.kl import kl_estimate
from verl.algorithms.loss_modes import selected_tokens
from verl.algorithms.policy_losses import PolicyTokens, Tensors, TokenLoss
from verl.config.sections.models import ActorConfig, CriticConfig
from verl.data.ragged import Ragged
from verl.data.schema import ragged

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


def loss_columns(
    mini_batch: pa.Table, settings: ActorConfig | CriticConfig, max_response_length: int, seed: Sequence[int]
) -> dict[str, Ragged]:
    """``loss_weights`` and, where the policy's loss asks for it, ``selected``: what a loss needs to know of the whole
    mini-batch. seed: of a random choice."""
    mask = ragged(mini_batch, "response_mask")
    columns = {"loss_weights": aggregation_weights(mask, settings.loss_agg_mode, max_response_length)}
    if isinstance(settings, ActorConfig):
        columns |= selected_tokens(mini_batch, settings, seed)
    return columns


def policy_loss(
    outputs: Tensors, batch: Tensors, *, token_loss: TokenLoss, settings: ActorConfig, num_tokens: int
) -> LossAndMetrics:
    """What the policy loss of ``verl.algorithms.policy_losses`` that was chosen comes to, with entropy bonus and KL:

    loss = sum w c L  -  entropy_coeff * sum w H  +  kl_loss_coef * sum w KL(policy || reference).

    c are the table's ``rollout_is_weights`` (see verl.algorithms.corrections), 1 where it has none.
    Entropy is read from outputs only when its coefficient is not 0 or it is there; ref_log_probs likewise only with
    a KL loss. Metrics: actor/{pg_loss, ppo_kl, entropy_loss, kl_loss} and the loss's own shares of tokens.
    """
    mask, weights = _mask_and_weights(batch)
    tokens = PolicyTokens.of(outputs, batch)
    token_losses, shares = token_loss(tokens, settings)
    pg_losses = weights * torch.where(mask, token_losses, 0.0)
    if "rollout_is_weights" in batch:
        pg_losses = pg_losses * torch.where(mask, batch["rollout_is_weights"], 0.0)
    pg_loss = pg_losses.sum()

    loss = pg_loss
    metrics = {"actor/pg_loss": pg_loss.detach(), "actor/ppo_kl": -tokens.log_ratio.detach().sum() / num_tokens}
    metrics |= {name: (flags & mask).sum() / num_tokens for name, flags in shares.items()}
    if settings.entropy_coeff or "entropy" in outputs:
        entropy = (weights * torch.where(mask, outputs["entropy"], 0.0)).sum()
        metrics["actor/entropy_loss"] = entropy.detach()
        if settings.entropy_coeff:
            loss = loss - settings.entropy_coeff * entropy
    if settings.use_kl_loss and settings.kl_loss_coef:
        reference = torch.where(mask, batch["ref_log_probs"], 0.0)
        kl_loss = (weights * kl_estimate(tokens.log_probs, reference, settings.kl_loss_type)).sum()
        loss = loss + settings.kl_loss_coef * kl_loss
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

"""The loss of supervised fine-tuning, in the form that the training engine expects (see verl.algorithms.losses)."""

from __future__ import annotations

import torch


def nll_loss(
    outputs: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Negative log-likelihood ``-sum_t loss_weights_t * log_probs_t`` over the tokens whose ``response_mask`` is 1.

    With token-mean weights it is the mini-batch's mean cross-entropy in nats. Metric: train/loss, additive.
    """
    mask = batch["response_mask"] > 0
    loss = -(torch.where(mask, batch["loss_weights"], 0.0) * torch.where(mask, outputs["log_probs"], 0.0)).sum()
    return loss, {"train/loss": loss.detach()}

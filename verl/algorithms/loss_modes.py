"""Finds the policy loss that ``actor_rollout_ref.actor.policy_loss.loss_mode`` names, and the tokens that it selects.

Without torch, so that the checks can use it: the functions are in ``verl.algorithms.policy_losses`` and are imported
where they are used. Your own function is written ``package.module:function``. Its attribute ``columns`` names columns
of the mini-batch that it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from verl.algorithms.covariance import Select
from verl.algorithms.plugins import users_function
from verl.config.policy_losses import LOSS_MODES, LossMode, imported
from verl.data.ragged import Ragged
from verl.data.schema import ragged

if TYPE_CHECKING:
    from verl.config.sections.models import ActorConfig

__all__ = ["KEY", "LOSS_MODES", "LossMode", "resolve", "selected_tokens"]

KEY = "actor_rollout_ref.actor.policy_loss.loss_mode"


def resolve(name: str) -> LossMode:
    """The entry of a loss. UserError if there is none of this name and no such function."""
    if name in LOSS_MODES:
        return LOSS_MODES[name]
    function = users_function(KEY, name, LOSS_MODES)
    return LossMode(name, name, reads=None, columns=tuple(getattr(function, "columns", ())))


def selected_tokens(mini_batch: pa.Table, settings: ActorConfig, seed: Sequence[int]) -> dict[str, Ragged]:
    """The column ``selected`` if the policy loss has one: int8, 1 for the tokens that it picks from the mini-batch.

    The choice is made over the whole mini-batch, so that it does not depend on the split into micro-batches. It uses
    ``old_log_probs``, the policy at the start of the step: log-probs of the update's own forward are complete only
    after all of its micro-batches. seed: of a random choice.
    """
    path = resolve(settings.policy_loss.loss_mode).select
    if path is None:
        return {}
    select: Select = imported(path)
    mask = ragged(mini_batch, "response_mask")
    written = np.flatnonzero(mask.values > 0)
    advantages, log_probs = (ragged(mini_batch, name).values[written] for name in ("advantages", "old_log_probs"))
    selected = np.zeros(len(mask.values), np.int8)
    selected[written[select(advantages, log_probs, settings.policy_loss, seed)]] = 1
    return {"selected": mask.like(selected)}

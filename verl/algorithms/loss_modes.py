"""The policy losses that ``actor_rollout_ref.actor.policy_loss.loss_mode`` names, and what each of them reads.

Known without torch, so that the checks know them: the functions are in ``verl.algorithms.policy_losses``, and are
imported where they are used. One of the user's own is ``package.module:function``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from verl.algorithms.covariance import Select, highest_covariances, some_covariances
from verl.algorithms.plugins import users_function
from verl.data.ragged import Ragged
from verl.data.schema import ragged

if TYPE_CHECKING:
    from verl.algorithms.policy_losses import TokenLoss
    from verl.config.sections.models import ActorConfig

KEY = "actor_rollout_ref.actor.policy_loss.loss_mode"
CLIP = frozenset({"clip_ratio", "clip_ratio_low", "clip_ratio_high"})


@dataclass(frozen=True)
class LossMode:
    """path: the function's import path. reads: keys of the actor's section that only some losses take; None where that
    is not known. select: picks tokens of a whole mini-batch that the loss treats in another way."""

    name: str
    path: str
    reads: frozenset[str] | None = frozenset()
    select: Select | None = None

    def load(self) -> TokenLoss:
        return users_function(KEY, self.path, LOSS_MODES)


def _own(name: str, *reads: str, clips: bool = True, select: Select | None = None) -> LossMode:
    path = f"verl.algorithms.policy_losses:{name}"
    return LossMode(name, path, frozenset(reads) | (CLIP if clips else frozenset()), select)


LOSS_MODES = {
    mode.name: mode
    for mode in (
        _own("vanilla", "clip_ratio_c"),
        _own("gspo"),
        _own("cispo"),
        _own("geo_mean"),
        _own("sapo", "tau_pos", "tau_neg", clips=False),
        _own("gpg", clips=False),
        _own(
            "clip_cov",
            "policy_loss.clip_cov_ratio",
            "policy_loss.clip_cov_lb",
            "policy_loss.clip_cov_ub",
            select=some_covariances,
        ),
        _own("kl_cov", "policy_loss.kl_cov_ratio", "policy_loss.ppo_kl_coef", clips=False, select=highest_covariances),
    )
}


def resolve(name: str) -> LossMode:
    """UserError when there is no such loss."""
    if name in LOSS_MODES:
        return LOSS_MODES[name]
    users_function(KEY, name, LOSS_MODES)
    return LossMode(name, name, reads=None)


def selected_tokens(mini_batch: pa.Table, settings: ActorConfig, seed: Sequence[int]) -> dict[str, Ragged]:
    """The column ``selected`` where the policy loss has one: int8, 1 for the tokens that it picks from the mini-batch.

    Over the whole mini-batch, whatever its split, and of ``old_log_probs``, the policy at the step's beginning: that of
    an update's own forward would be known only after all of its micro-batches. seed: of a random choice.
    """
    select = resolve(settings.policy_loss.loss_mode).select
    if select is None:
        return {}
    mask = ragged(mini_batch, "response_mask")
    written = np.flatnonzero(mask.values > 0)
    advantages, log_probs = (ragged(mini_batch, name).values[written] for name in ("advantages", "old_log_probs"))
    selected = np.zeros(len(mask.values), np.int8)
    selected[written[select(advantages, log_probs, settings.policy_loss, seed)]] = 1
    return {"selected": mask.like(selected)}

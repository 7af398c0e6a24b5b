"""The policy losses that ``actor_rollout_ref.actor.policy_loss.loss_mode`` names: one entry each.

The entries stand here, below the functions that they name, because loading a configuration takes a default from them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from verl.config.sections.base import AggregationMode

CLIP = frozenset({"clip_ratio", "clip_ratio_low", "clip_ratio_high"})


@dataclass(frozen=True)
class LossMode:
    """path: import path of the function, as package.module:function (see ``verl.algorithms.policy_losses``).
    reads: keys of the actor's section that only some losses read; None if that is not known.
    averages: default of ``actor.loss_agg_mode``; None: the key's own default.
    columns: columns of the mini-batch that the function reads from ``PolicyTokens.columns``.
    select: import path of a function that picks tokens of a whole mini-batch for the column ``selected`` (see
        ``verl.algorithms.covariance``).
    """

    name: str
    path: str
    reads: frozenset[str] | None = frozenset()
    averages: AggregationMode | None = None
    columns: tuple[str, ...] = ()
    select: str | None = None

    def load(self) -> Any:
        """The function."""
        return imported(self.path)


def imported(path: str) -> Any:
    """The object at package.module:name."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _own(name: str, *reads: str, clips: bool = True, **facts: Any) -> LossMode:
    path = f"verl.algorithms.policy_losses:{name}"
    return LossMode(name, path, frozenset(reads) | (CLIP if clips else frozenset()), **facts)


def _selecting(name: str, function: str, *reads: str, clips: bool = True) -> LossMode:
    path = f"verl.algorithms.covariance:{function}"
    return _own(name, *(f"policy_loss.{key}" for key in reads), clips=clips, columns=("selected",), select=path)


LOSS_MODES = {
    mode.name: mode
    for mode in (
        _own("vanilla", "clip_ratio_c"),
        _own("gspo", averages="seq-mean-token-mean"),
        _own("cispo"),
        _own("geo_mean", averages="seq-mean-token-mean"),
        _own("sapo", "tau_pos", "tau_neg", clips=False, averages="seq-mean-token-mean"),
        _own("gpg", clips=False),
        _selecting("clip_cov", "some_covariances", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"),
        _selecting("kl_cov", "highest_covariances", "kl_cov_ratio", "ppo_kl_coef", clips=False),
    )
}

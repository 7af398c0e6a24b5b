"""Rollout engines by the name that ``actor_rollout_ref.rollout.name`` gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl.errors import UserError
from verl.rollout.base import RolloutEngine


def _hf(**kwargs: Any) -> RolloutEngine:
    from verl.rollout.hf import HFEngine

    return HFEngine(**kwargs)


ENGINES: dict[str, Callable[..., RolloutEngine]] = {"hf": _hf}


def build_engine(name: str, **kwargs: Any) -> RolloutEngine:
    """The engine of this name; kwargs as its class documents them."""
    if name not in ENGINES:
        raise UserError(
            f"actor_rollout_ref.rollout.name={name} is not a rollout engine; there are: {', '.join(ENGINES)}"
        )
    return ENGINES[name](**kwargs)

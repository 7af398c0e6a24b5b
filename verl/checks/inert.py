"""Finds keys that the user set and that have no effect in a run.

The conditions are written beside the keys (``verl.config.sections.effects``). This module applies them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from verl.algorithms.advantages import ESTIMATORS
from verl.algorithms.loss_modes import KEY as LOSS_MODE
from verl.algorithms.loss_modes import LOSS_MODES
from verl.checks.settings import ACTOR, splits
from verl.config.loading.problems import shown
from verl.config.loading.schema import conditions_of
from verl.config.sections.effects import Condition, NoEffect
from verl.plan import MicroBatching, RunPlan

if TYPE_CHECKING:
    from verl.config.sections.models import Config, Root

# A key that names an entry of a registry -> the section to whose keys the entries' ``reads`` are relative, and the
# registry.
REGISTRIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "algorithm.adv_estimator": ("algorithm", ESTIMATORS),
    LOSS_MODE: (ACTOR, LOSS_MODES),
}


@dataclass(frozen=True)
class Run:
    """A run, as the conditions see it: see ``verl.config.sections.effects.Run``. splits: its micro-batches by name."""

    config: Root
    set_keys: frozenset[str]
    device: Literal["cpu", "cuda"]
    world_size: int = 1
    uses_ray: bool = False
    roles: Collection[str] = ()
    engine: str | None = None
    validates: bool = False
    saves: bool = False
    splits: Mapping[str, MicroBatching] = field(default_factory=dict)

    @classmethod
    def of_plan(cls, config: Config, plan: RunPlan, set_keys: Iterable[str]) -> Run:
        return cls(
            config,
            frozenset(set_keys),
            plan.device,
            world_size=plan.world_size,
            uses_ray=plan.uses_ray,
            roles=plan.roles,
            engine=plan.engine,
            validates=plan.validates_ever,
            saves=plan.save_freq > 0,
            splits=splits(plan),
        )

    def value(self, key: str) -> Any:
        return value_at(self.config, key)

    def by_tokens(self, *micro_batches: str) -> bool:
        return all(split.max_tokens is not None for name, split in self.splits.items() if name in micro_batches)

    def by_sequences(self, *micro_batches: str) -> bool:
        return all(split.max_tokens is None for name, split in self.splits.items() if name in micro_batches)


def find_inert(run: Run) -> list[str]:
    """One sentence per reason, with the keys that it makes inert and their values. A key set to null is not named."""
    by_reason: dict[str, list[str]] = {}
    for key in sorted(run.set_keys):
        value = run.value(key)
        if value is not None and (reason := _reason(run, key)):
            by_reason.setdefault(reason, []).append(f"{key}={shown(value)}")
    return [f"{', '.join(keys)} has no effect: {reason}." for reason, keys in by_reason.items()]


def _reason(run: Run, key: str) -> str | None:
    """Why the key has no effect, None if it has one. The first condition that holds counts."""
    conditions = conditions_of(type(run.config), key)
    return next((text for section, each in conditions if (text := _holds(run, key, section, each))), None)


def _holds(run: Run, key: str, section: str, condition: Condition) -> str | None:
    if isinstance(condition, NoEffect):
        owner = value_at(run.config, section) if section else run.config
        return condition.why.replace("{section}", section) if condition.when(owner, run) else None
    registry, chosen = REGISTRIES[condition.choice][1], run.value(condition.choice)
    readers = readers_of(condition.choice, key)
    if chosen not in registry or chosen in readers:
        return None
    return f"it belongs to {condition.choice}={' or '.join(readers)}"


def readers_of(choice: str, key: str) -> list[str]:
    """The names of the registry's entries that read a key."""
    section, registry = REGISTRIES[choice]
    return [name for name, entry in registry.items() if key in {f"{section}.{read}" for read in entry.reads or ()}]


def value_at(config: Any, key: str) -> Any:
    """The value of a dotted key, also below a mapping; None if there is no such key."""
    value = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return value

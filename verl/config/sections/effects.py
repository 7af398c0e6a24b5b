"""What makes a key have an effect, written beside the key: ``key: Annotated[type, NoEffect(...)] = Field(...)``.

``verl.checks.inert`` warns of keys that the user set and that have no effect in a run. The documentation shows the
conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


class Run(Protocol):
    """What conditions may ask about a run, apart from the section that holds the key.

    roles: models that the run builds. engine: name of its rollout engine, None without one. validates, saves: whether
    it ever does so during training.
    """

    @property
    def set_keys(self) -> frozenset[str]: ...
    @property
    def device(self) -> Literal["cpu", "cuda"]: ...
    @property
    def world_size(self) -> int: ...
    @property
    def uses_ray(self) -> bool: ...
    @property
    def roles(self) -> Collection[str]: ...
    @property
    def engine(self) -> str | None: ...
    @property
    def validates(self) -> bool: ...
    @property
    def saves(self) -> bool: ...

    def value(self, key: str) -> Any:
        """The value of a key, None if the entry point has no such key."""
        ...

    def by_tokens(self, *micro_batches: str) -> bool:
        """Whether all of these micro-batches that the run has are cut by tokens."""
        ...

    def by_sequences(self, *micro_batches: str) -> bool:
        """Whether all of these micro-batches that the run has are cut by number of sequences."""
        ...


@dataclass(frozen=True)
class NoEffect:
    """The key has no effect when ``when(section, run)`` is true. ``section`` is the section that holds the key.

    why: the condition in words. It completes "KEY has no effect: ..." and "No effect if ...". ``{section}`` stands for
        the dotted name of the section that holds the key.
    On a key that is a section, the condition holds for every key below it: for all but ``spared``, or for ``only``
    these.
    """

    why: str
    when: Callable[[Any, Run], bool]
    spared: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def covers(self, below: Sequence[str]) -> bool:
        """below: the rest of a dotted key after the field that has this condition."""
        return not below or (below[0] in self.only if self.only else below[0] not in self.spared)


@dataclass(frozen=True)
class ReadBy:
    """The key has an effect only with those values of another key (``choice``) whose registry entry lists it in
    ``reads``."""

    choice: str

    def covers(self, below: Sequence[str]) -> bool:
        return True


Condition = NoEffect | ReadBy

ESTIMATOR = ReadBy("algorithm.adv_estimator")
POLICY_LOSS = ReadBy("actor_rollout_ref.actor.policy_loss.loss_mode")


def always(section: Any, run: Run) -> bool:
    return True


def on_cpu(section: Any, run: Run) -> bool:
    return run.device == "cpu"


ONE_RANK = NoEffect("one device holds the whole model", lambda section, run: run.world_size == 1)
NO_OFFLOAD = NoEffect("the run is on a CPU, where nothing can be offloaded", on_cpu)
NO_CHECKPOINT = NoEffect(
    "no checkpoint is saved during the run (trainer.save_freq)", lambda section, run: not run.saves
)
NOT_VALIDATED = NoEffect(
    "nothing is validated (trainer.test_freq, trainer.val_before_train)", lambda section, run: not run.validates
)
NOT_SHUFFLED = NoEffect("the data are not shuffled ({section}.shuffle)", lambda data, run: not data.shuffle)
NO_RAY = NoEffect(
    "everything runs in this process, without Ray (trainer.executor)", lambda section, run: not run.uses_ray
)
PROMPTS_DROPPED = NoEffect(
    "prompts over the limit are dropped ({section}.filter_overlong_prompts)",
    lambda data, run: data.filter_overlong_prompts,
)
CUSTOM_FUNCTION = NoEffect(
    "custom_reward_function.path scores instead of the data source's scorer",
    lambda section, run: run.value("custom_reward_function.path") is not None,
)


def cut_by_tokens(*micro_batches: str) -> NoEffect:
    """For a micro-batch size. micro_batches: those that the key decides, its own and those whose key defaults to it."""
    return NoEffect(
        "micro-batches are cut by tokens there (use_dynamic_bsz)", lambda section, run: run.by_tokens(*micro_batches)
    )


def cut_by_sequences(*micro_batches: str) -> NoEffect:
    """For a limit on tokens. micro_batches: as for ``cut_by_tokens``."""
    return NoEffect(
        "micro-batches are cut by sequences there (a micro-batch size is set and use_dynamic_bsz is off)",
        lambda section, run: run.by_sequences(*micro_batches),
    )

"""Every key is read by the library: a key that nothing reads promises what does not happen."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from pydantic import Field

pytest.importorskip("mypy", reason="finds out which section an attribute is read of")

from key_reads import Reads, reads_of_library, unread

from verl.config.loading.schema import keys_of
from verl.config.sections.actor import ActorRolloutRefConfig, RefConfig
from verl.config.sections.critic import CriticConfig
from verl.config.sections.models import Config, EvalConfig, GenerationConfig, Root, SFTConfig, sources_of
from verl.config.sections.parts import FSDPConfig
from verl.memory.host_budget import FSDP
from verl.reward.sandbox import Limits
from verl.reward.scorers import SCORERS
from verl.rollout.engines.registry import ADAPTERS

# Read through a value whose type mypy does not know, or by the checks with an effect on the run.
OTHERWISE = {
    "trainer.dry_run",  # verl.trainer.entry, for any configuration
    "trainer.device",  # the checks turn it into the plan's device
    "trainer.default_hdfs_dir",  # must be null
}
OF_SFT = {"data.image_key"}  # the checks reject rows with images
OF_EVALUATION = {"trainer"}  # has dry_run only


def scorer_settings() -> set[str]:
    """Sections that are passed to a scorer as keyword arguments, and their keys that it takes."""
    taken = {f"reward.{name}" for name in SCORERS}
    taken |= {f"reward.code.limits.{field.name}" for field in dataclasses.fields(Limits)}
    for name, scorer in SCORERS.items():
        if scorer.compute_score is not None:
            taken |= {f"reward.{name}.{argument}" for argument in inspect.signature(scorer.compute_score).parameters}
    return taken


def followed(schema: type[Root]) -> set[str]:
    """Keys whose value is another key's default."""
    return {source for reference in schema.derived.values() for source in sources_of(reference)}


READ_BY_NAME = {
    *OTHERWISE,
    *scorer_settings(),
    *(f"{section}" for section in FSDP.values()),
    *(f"{where}.engine_kwargs.{name}" for where in ("rollout", "actor_rollout_ref.rollout") for name in ADAPTERS),
}


@pytest.fixture(scope="module")
def reads() -> Reads:
    return reads_of_library()


def dead(schema: type[Root], reads: Reads, *more: str) -> set[str]:
    return unread(schema, reads, frozenset({*READ_BY_NAME, *followed(schema), *more}))


def test_every_key_of_training_is_read(reads):
    assert dead(Config, reads) == set()


def test_every_key_of_supervised_training_is_read(reads):
    assert dead(SFTConfig, reads, *OF_SFT) == set()


def test_every_key_of_generation_is_read(reads):
    assert dead(GenerationConfig, reads) == set()


def test_every_key_of_evaluation_is_read(reads):
    assert dead(EvalConfig, reads, *OF_EVALUATION) == set()


class DeadCriticConfig(CriticConfig):
    seed: int = Field(1, description="Shares its name with data.seed and trainer.seed, which are read.")
    kl_loss_coef: float = Field(1.0, description="Shares its name with a key of the actor, which is read.")


class DeadRefConfig(RefConfig):
    optim: FSDPConfig = FSDPConfig()


class DeadPolicyConfig(ActorRolloutRefConfig):
    ref: DeadRefConfig = DeadRefConfig()


class ConfigWithDeadKeys(Config):
    critic: DeadCriticConfig
    actor_rollout_ref: DeadPolicyConfig


def test_a_dead_key_is_found_though_another_section_has_a_live_one_of_its_name(reads):
    names = [key.rpartition(".")[2] for key in keys_of(Config)]
    assert {"seed", "kl_loss_coef"} <= set(names)
    assert dead(ConfigWithDeadKeys, reads) == {"critic.seed", "critic.kl_loss_coef", "actor_rollout_ref.ref.optim"}

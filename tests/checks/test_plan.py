"""The plan's arithmetic, against counting a run out loop by loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.algorithms.advantages import ESTIMATORS
from verl.config.loading.load import load
from verl.config.sections.models import Config
from verl.plan import MicroBatching, plan_run

BASE = {
    "actor_rollout_ref.model.path": "some/model",
    "actor_rollout_ref.rollout.name": "hf",
    "data.train_batch_size": 8,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
}


def plan_of(train_rows: int | None = 100, **changes: object):
    settings = {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    loaded = load([f"{key}={value}" for key, value in settings.items()])
    assert loaded.config is not None, loaded.problems
    return plan_run(loaded.config, device="cpu", train_rows=train_rows)


@dataclass
class Counted:
    """What a run did when played through."""

    steps: int = 0
    unused: set[int] = field(default_factory=set)
    optimizer_steps: int = 0
    micro_batches: set[int] = field(default_factory=set)
    biggest: int = 0
    forwards: set[int] = field(default_factory=set)


def play(rows, batch, mini, samples, world, micro, epochs, ppo_epochs) -> Counted:
    """A run counted out: real lists, real loops, no division."""
    seen = Counted()
    for _ in range(epochs):
        prompts = list(range(rows))
        while len(prompts) >= batch:
            step, prompts = prompts[:batch], prompts[batch:]
            seen.steps += 1
            trajectories = [prompt for prompt in step for _ in range(samples)]
            seen.forwards.add(len(cut(trajectories[0::world], micro)))
            for _ in range(ppo_epochs):
                for mini_batch in cut(step, mini):
                    share = [prompt for prompt in mini_batch for _ in range(samples)][0::world]
                    pieces = cut(share, micro)
                    seen.micro_batches.add(len(pieces))
                    seen.biggest = max(seen.biggest, *(len(piece) for piece in pieces))
                    seen.optimizer_steps += 1
        seen.unused = set(prompts)
    return seen


def cut(items: list, size: int) -> list[list]:
    pieces = []
    for item in items:
        if not pieces or len(pieces[-1]) == size:
            pieces.append([])
        pieces[-1].append(item)
    return pieces


@given(
    mini_multiple=st.integers(1, 3),
    minis=st.integers(1, 3),
    samples=st.integers(1, 3),
    world=st.integers(1, 4),
    micro=st.integers(1, 20),
    extra=st.integers(0, 60),
    epochs=st.integers(1, 2),
    ppo_epochs=st.integers(1, 2),
)
def test_the_plan_counts_what_a_run_does(mini_multiple, minis, samples, world, micro, extra, epochs, ppo_epochs):
    mini = world * mini_multiple
    batch = mini * minis
    rows = batch + extra
    plan = plan_of(
        train_rows=rows,
        data__train_batch_size=batch,
        actor_rollout_ref__actor__ppo_mini_batch_size=mini,
        actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu=micro,
        actor_rollout_ref__actor__ppo_epochs=ppo_epochs,
        actor_rollout_ref__rollout__n=samples,
        trainer__n_gpus_per_node=world,
        trainer__total_epochs=epochs,
    )
    seen = play(rows, batch, mini, samples, world, micro, epochs, ppo_epochs)
    assert plan.total_steps == seen.steps
    assert plan.rows_left_out == len(seen.unused)
    assert plan.total_steps * plan.actor.optimizer_steps == seen.optimizer_steps
    assert {plan.actor.micro_batching.micro_batches} == seen.micro_batches
    assert plan.actor.micro_batching.micro_batch_size == seen.biggest
    assert {plan.forwards["old_log_probs"].micro_batches} == seen.forwards
    assert plan.critic == plan.actor  # the critic's defaults follow the actor's


def test_a_micro_batch_is_at_most_the_ranks_share():
    sizes = [
        MicroBatching.of(4, asked, dynamic=False, max_tokens=100).micro_batch_size for asked in (1, 3, 4, 16, None)
    ]
    assert sizes == [1, 3, 4, 4, None]


def test_total_training_steps_overrides_the_epochs():
    assert plan_of(trainer__total_training_steps=50).total_steps == 50  # an epoch has 12
    assert plan_of(trainer__total_epochs=3).total_steps == 36


def test_without_the_data_only_what_needs_them_is_unknown():
    plan = plan_of(train_rows=None)
    assert (plan.steps_per_epoch, plan.rows_left_out, plan.total_steps) == (None, None, None)
    assert plan.actor.optimizer_steps == 2
    assert plan_of(train_rows=None, trainer__total_training_steps=7).total_steps == 7


def test_validation_and_saving_come_round_and_at_the_last_step():
    plan = plan_of(trainer__total_training_steps=15, trainer__test_freq=10, trainer__save_freq=4)
    assert plan.steps(plan.validates) == [0, 10, 15]
    assert plan.steps(plan.saves) == [4, 8, 12, 15]
    never = plan_of(trainer__total_training_steps=15, trainer__val_before_train=False)
    assert never.steps(never.validates) == never.steps(never.saves) == []


def test_the_actor_waits_for_the_critics_warm_up_only_where_there_is_a_critic():
    warm_up = plan_of(trainer__critic_warmup=3)
    assert [warm_up.trains_actor(step) for step in (1, 2, 3, 4)] == [False, False, True, True]
    without = plan_of(trainer__critic_warmup=3, algorithm__adv_estimator="grpo")
    assert without.trains_actor(1)


@pytest.mark.parametrize(
    ("changes", "roles"),
    [
        ({}, {"actor", "critic"}),
        *(({"algorithm__adv_estimator": name}, {"actor"}) for name in ESTIMATORS if name != "gae"),
        ({"algorithm__adv_estimator": "grpo", "critic__enable": True}, {"actor", "critic"}),
        ({"algorithm__kl_ctrl__kl_coef": 0.001}, {"actor", "critic", "reference"}),
        ({"algorithm__kl_ctrl__kl_coef": 0.001, "algorithm__use_kl_in_reward": False}, {"actor", "critic"}),
        ({"actor_rollout_ref__actor__use_kl_loss": True}, {"actor", "critic", "reference"}),
    ],
)
def test_only_the_models_that_something_asks_for_are_built(changes, roles):
    plan = plan_of(**changes)
    assert set(plan.roles) == roles
    assert ("ref_log_probs" in plan.forwards) == ("reference" in roles)
    assert ("values" in plan.forwards) == ("critic" in roles) == (plan.critic is not None)


def test_token_budgets_take_the_place_of_micro_batch_sizes():
    plan = plan_of(
        actor_rollout_ref__actor__use_dynamic_bsz=True, actor_rollout_ref__actor__ppo_max_token_len_per_gpu=5000
    )
    for split in (plan.actor.micro_batching, plan.forwards["old_log_probs"]):
        assert (split.micro_batch_size, split.max_tokens, split.micro_batches) == (None, 5000, None)


@pytest.mark.parametrize(
    ("asked", "validates", "val_rows", "expected"),
    [
        (None, False, None, 40),  # all of a step's
        (7, False, None, 7),
        (None, True, 300, 300),
        (None, True, 5000, 1024),
        (None, True, None, 1024),
    ],
)
def test_an_engine_generates_all_of_a_step_at_a_time_unless_asked_otherwise(asked, validates, val_rows, expected):
    config = Config.model_validate(
        {
            "data": {"train_files": "a.parquet", "train_batch_size": 8},
            "actor_rollout_ref": {
                "model": {"path": "m"},
                "actor": {"ppo_mini_batch_size": 8},
                "rollout": {"name": "hf", "n": 5, "max_num_seqs": asked},
            },
            "trainer": {"val_before_train": validates, "test_freq": -1},
        }
    )
    assert plan_run(config, device="cpu", train_rows=100, val_rows=val_rows).max_num_seqs == expected

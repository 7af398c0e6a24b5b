"""The synchronous feed: which prompts a step gets, and with which weights they are answered."""

from __future__ import annotations

from types import SimpleNamespace

import pyarrow as pa
import pytest

from verl.config.loading.load import load
from verl.data.loader import epoch_order
from verl.data.schema import with_columns
from verl.plan import plan_run
from verl.trainer.ppo.feed import SynchronousFeed
from verl.trainer.ppo.step_log import StepLog

ROWS, BATCH = 7, 2


class Responder:
    """Answers each prompt with its row as the only token."""

    def __init__(self) -> None:
        self.samplings: list[object] = []

    def respond(self, episodes: pa.Table, sampling: object, log: StepLog) -> pa.Table:
        self.samplings.append(sampling)
        rows = episodes["row"].to_pylist()
        return with_columns(
            episodes,
            response_ids=[[row] for row in rows],
            response_mask=[[1]] * len(rows),
            score=[float(row) for row in rows],
        )


def feed_of(**settings: object) -> SynchronousFeed:
    chosen = {
        "data.train_files": "none.parquet",
        "data.train_batch_size": BATCH,
        "data.seed": 3,
        "actor_rollout_ref.model.path": "none",
        "actor_rollout_ref.rollout.name": "hf",
        "actor_rollout_ref.rollout.n": 2,
        "actor_rollout_ref.actor.ppo_mini_batch_size": BATCH,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    loaded = load([f"{name}={value}" for name, value in chosen.items()])
    config = loaded.config
    assert config is not None, loaded.problems
    prompts = pa.table({"row": range(ROWS), "prompt_ids": [[1, 2]] * ROWS})
    stages = SimpleNamespace(make_room_for_training=lambda log: None)
    plan = plan_run(config, device="cpu", train_rows=ROWS)
    return SynchronousFeed(config, plan, prompts, stages, Responder())  # type: ignore[arg-type]


def taken(feed: SynchronousFeed, steps: range) -> list[list[int]]:
    """The rows of each step's prompts; n of each follow one another."""
    found = []
    for step in steps:
        feed.released(step - 1)
        found.append(feed.take(step, StepLog())["row"].to_pylist()[::2])
    return found


def test_prompts_come_in_the_order_of_the_epoch_and_what_does_not_fill_a_step_is_left_out():
    order = [epoch_order(ROWS, epoch, 3, True).tolist() for epoch in (0, 1)]
    expected = [order[epoch][start : start + BATCH] for epoch in (0, 1) for start in (0, 2, 4)]
    assert taken(feed_of(), range(1, 7)) == expected


def test_a_feed_that_is_restored_goes_on_with_the_next_step():
    whole = taken(feed_of(), range(1, 6))
    first, second = feed_of(), feed_of()
    taken(first, range(1, 4))
    second.load_state_dict(first.state_dict())
    assert taken(second, range(4, 6)) == whole[3:]


@pytest.mark.parametrize("version", [None, 0, 2])
def test_a_step_is_refused_without_the_weights_of_the_step_before(version):
    feed = feed_of()
    if version is not None:
        feed.released(version)
    with pytest.raises(RuntimeError, match="step 2 needs the weights of step 1"):
        feed.take(2, StepLog())


def test_advantages_that_need_it_get_the_reward_of_a_greedy_response_to_the_same_prompt():
    feed = feed_of(algorithm__adv_estimator="remax")
    feed.released(0)
    table = feed.take(1, StepLog())
    assert table["greedy_reward"].to_pylist() == [float(row) for row in table["row"].to_pylist()]
    ((*sampled, greedy, _),) = feed._responder.samplings  # type: ignore[attr-defined]
    assert sampled[0].temperature == 1.0
    assert greedy.temperature == 0.0

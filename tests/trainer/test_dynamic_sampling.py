"""Steps of groups that differ, against a plain walk through the prompts in their order."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.data.loader import PromptLoader
from verl.errors import UserError
from verl.trainer.ppo.dynamic_sampling import differs, fill_step

SAMPLES = 3


def scored(rows, differing, extra="{}") -> pa.Table:
    """Responses to these prompts: all scored alike, or one of them otherwise, as ``differing`` says of a prompt."""
    scores = [score for row in rows for score in ([0.0, 1.0, 0.0] if differing[row] else [0.5] * SAMPLES)]
    count = len(rows) * SAMPLES
    return pa.table(
        {
            "row": pa.array(np.repeat(rows, SAMPLES)),
            "group": pa.array(np.repeat(rows, SAMPLES)),
            "score": scores,
            "reward_extra": [extra] * count,
            "response_ids": pa.array([[n] for n in range(count)], pa.list_(pa.int32())),
        }
    )


class Run:
    """Steps over data of which ``differing`` says of each prompt whether its responses differ."""

    def __init__(self, differing, groups, limit=0):
        self.differing, self.groups = differing, groups
        self.loader = PromptLoader(len(differing), groups, shuffle=False)
        self.settings = SimpleNamespace(metric="score", max_num_gen_batches=limit)
        self.counts: list[int] = []

    def draw(self, count, number):
        self.counts.append(count)
        return scored(self.loader.draw(count)[1], self.differing)

    def step(self):
        first = scored(next(self.loader)[1], self.differing)
        sizes = {"groups": self.groups, "samples": SAMPLES, "data_rows": len(self.differing)}
        table, given_back, metrics = fill_step(first, self.draw, self.settings, **sizes)
        self.loader.give_back(given_back)
        return table, metrics


@given(st.lists(st.booleans(), min_size=40, max_size=60), st.integers(1, 4))
def test_steps_take_the_prompts_that_differ_in_their_order_and_lose_none(differing, groups):
    differing += [True] * 40  # so that three steps end within the data
    run, expected = Run(differing, groups), [row for row, differs in enumerate(differing) if differs]
    for step in range(3):
        table, metrics = run.step()
        wanted = expected[step * groups : (step + 1) * groups]
        assert table["row"].to_pylist() == np.repeat(wanted, SAMPLES).tolist()
        assert table["group"].to_pylist() == np.repeat(np.arange(groups), SAMPLES).tolist()
        assert run.loader.position == wanted[-1] + 1
        drawn, equal, back = (metrics[f"training/groups_{name}"] for name in ("drawn", "equal", "given_back"))
        assert drawn == groups + equal + back
    assert max(run.counts, default=0) <= groups


def test_later_draws_go_by_the_share_found_so_far():
    """Half of the prompts differ: 2 of the first 4, so 4 more are drawn for the 2 that lack."""
    run = Run([True, False] * 20, groups=4)
    _, metrics = run.step()
    assert run.counts == [4]
    assert metrics == {
        "training/num_gen_batches": 2.0,
        "training/groups_drawn": 8.0,
        "training/groups_equal": 3.0,
        "training/groups_given_back": 1.0,
    }


def test_past_the_limit_the_run_ends_and_says_what_was_found():
    with pytest.raises(UserError, match=r"after 2 generations for 8 prompts, only 2 of 4 groups differ in score"):
        Run([True, False, False, False] * 20, groups=4, limit=2).step()


def test_a_last_draw_within_the_limit_fills_the_step():
    table, _ = Run([True, False] * 20, groups=4, limit=2).step()
    assert len(table) == 4 * SAMPLES


def test_without_a_limit_data_that_never_differ_do_not_go_on_for_ever():
    with pytest.raises(UserError, match="too easy or too hard"):
        Run([False] * 12, groups=2).step()


def test_what_differs_may_be_another_number_of_the_scorers():
    table = scored([0, 1], [True, True])
    extras = [{"acc": acc, "pred": "7"} for acc in (1, 1, 1, 0, 1, 0)]
    table = table.set_column(3, "reward_extra", [[json.dumps(extra) for extra in extras]])
    assert differs(table, SAMPLES, "score").tolist() == [True, True]
    assert differs(table, SAMPLES, "acc").tolist() == [False, True]
    with pytest.raises(UserError, match=r"algorithm.filter_groups.metric=pred .* one of score, acc"):
        differs(table, SAMPLES, "pred")


def test_a_response_that_could_not_be_scored_differs_from_none():
    table = scored([0, 1, 2], [True, True, True])
    extras = [{"acc": 1}, {}, {"acc": 0}, {"acc": 1}, {}, {"acc": 1}, {}, {}, {}]
    table = table.set_column(3, "reward_extra", [[json.dumps(extra) for extra in extras]])
    assert differs(table, SAMPLES, "acc").tolist() == [True, False, False]

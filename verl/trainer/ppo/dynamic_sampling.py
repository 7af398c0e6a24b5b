"""Dynamic sampling: steps made of groups whose rewards differ. A group of equal rewards has no advantage to learn from.

DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.2. Prompts are taken in the data's order until a step has its number
of groups. The prompts of the last batch that come after the last group found are given back: the next step begins with
them, and its policy answers them. So every prompt is either trained on or found equal, and the position in the data is
one number. A batch does not cross the end of an epoch: the rest of the epoch is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pyarrow as pa

from verl.data.schema import taken, with_columns
from verl.errors import UserError

Metrics = dict[str, float]
KEY = "algorithm.filter_groups"


class FilterSettings(Protocol):
    """The ``algorithm.filter_groups`` section."""

    @property
    def metric(self) -> str: ...
    @property
    def max_num_gen_batches(self) -> int: ...


def fill_step(
    first: pa.Table,
    draw: Callable[[int, int], pa.Table],
    settings: FilterSettings,
    *,
    groups: int,
    samples: int,
    data_rows: int,
) -> tuple[pa.Table, int, Metrics]:
    """A step's table of ``groups`` groups that differ, the number of prompts to give back, and metrics.

    first: the first batch, scored, with ``samples`` rows a prompt, one prompt after the other. draw(count, number): the
    next batch, of ``count`` prompts; number: how many batches came before it. The share found so far decides how many
    prompts a batch has, at most ``groups``.

    UserError after max_num_gen_batches batches (0: no limit), or after as many equal groups in a row as the data have
    prompts (data_rows).

    Metrics: training/{num_gen_batches, groups_drawn, groups_equal, groups_given_back}.
    """
    table, parts = first, []
    draws = drawn = found = barren = 0
    while True:
        size = len(table) // samples
        differing = np.flatnonzero(differs(table, samples, settings.metric))[: groups - found]
        parts.append(taken(table, (differing[:, None] * samples + np.arange(samples)).ravel()))
        draws, drawn, found = draws + 1, drawn + size, found + len(differing)
        if found == groups:
            break
        barren = 0 if len(differing) else barren + size
        if draws == settings.max_num_gen_batches or barren >= data_rows:
            raise UserError(_too_few(settings, draws, drawn, found, groups))
        table = draw(min(groups, -(-(groups - found) * drawn // max(found, 1))), draws)
    given_back = size - 1 - int(differing[-1])
    step = pa.concat_tables(parts).combine_chunks()
    metrics = {
        "training/num_gen_batches": float(draws),
        "training/groups_drawn": float(drawn),
        "training/groups_equal": float(drawn - given_back - groups),
        "training/groups_given_back": float(given_back),
    }
    return with_columns(step, group=np.repeat(np.arange(groups), samples)), given_back, metrics


def differs(table: pa.Table, samples: int, metric: str) -> np.ndarray:
    """bool, one a prompt: True if its responses differ in the metric, which is ``score`` or another number that the
    scorer returns. Responses without that number do not count."""
    values = table["score"].to_numpy() if metric == "score" else np.array(_extras(table, metric))
    of_prompts = values.reshape(-1, samples)
    return np.fmax.reduce(of_prompts, 1) > np.fmin.reduce(of_prompts, 1)


def _extras(table: pa.Table, metric: str) -> list[float]:
    """The scorer's number for each response; nan for a response that could not be scored."""
    extras = [json.loads(text) for text in table["reward_extra"].to_pylist()]
    found = [float(extra[metric]) if isinstance(extra.get(metric), int | float) else np.nan for extra in extras]
    if np.isnan(found).all():
        numbers = {name for extra in extras for name, value in extra.items() if isinstance(value, int | float)}
        raise UserError(
            f"{KEY}.metric={metric} is not a number that the reward function returns: "
            f"set it to one of {', '.join(['score', *sorted(numbers)])}."
        )
    return found


def _too_few(settings: FilterSettings, draws: int, drawn: int, found: int, groups: int) -> str:
    return (
        f"{KEY}: after {draws} generations for {drawn} prompts, only {found} of {groups} groups differ in "
        f"{settings.metric}. In the others all responses are right, or all are wrong: the data are too easy or too "
        f"hard for this policy. Raise {KEY}.max_num_gen_batches={settings.max_num_gen_batches} (0: no limit) or "
        "actor_rollout_ref.rollout.n, choose other data, or train on all groups (enable=False)."
    )

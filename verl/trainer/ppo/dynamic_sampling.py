"""Steps made of groups whose responses differ: others have no advantage and teach nothing.

Dynamic sampling (DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.2). Prompts are drawn in the data's order until as
many groups as a step has are found. Those of the last draw that come after the last one found count as not drawn: the
next step begins with them, and its policy answers them. So every prompt is either trained on or found equal, and where
the data stand is one number, as without this. (Where a draw would cross the end of an epoch, what is left of the epoch
is not drawn, as without this.)
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
    """A step's table of ``groups`` groups that differ, the prompts of the last draw to give back, and metrics.

    first: the first draw, scored, ``samples`` rows to a prompt, one prompt after the other. draw(count, number): the
    next one, of so many prompts; number: how many came before it. Each asks for as many as will do, going by the share
    found so far, and never for more than ``groups``.

    UserError after max_num_gen_batches draws (0: no limit), or when as many prompts as the data have (data_rows) in a
    row were equal.

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
    """bool, one a prompt: whether its responses differ in the metric: ``score``, or a number that the scorer returned
    besides (those of them that have it)."""
    values = table["score"].to_numpy() if metric == "score" else np.array(_extras(table, metric))
    of_prompts = values.reshape(-1, samples)
    return np.fmax.reduce(of_prompts, 1) > np.fmin.reduce(of_prompts, 1)


def _extras(table: pa.Table, metric: str) -> list[float]:
    """nan where a response could not be scored: it differs from none."""
    extras = [json.loads(text) for text in table["reward_extra"].to_pylist()]
    found = [float(extra[metric]) if isinstance(extra.get(metric), int | float) else np.nan for extra in extras]
    if np.isnan(found).all():
        numbers = {name for extra in extras for name, value in extra.items() if isinstance(value, int | float)}
        raise UserError(
            f"{KEY}.metric={metric} is no number that the reward function returns: "
            f"set it to one of {', '.join(['score', *sorted(numbers)])}."
        )
    return found


def _too_few(settings: FilterSettings, draws: int, drawn: int, found: int, groups: int) -> str:
    return (
        f"{KEY}: {draws} generations of a step drew responses to {drawn} prompts, and those to {found} differ in "
        f"{settings.metric}, of {groups} wanted. The others are all right or all wrong: the data are too easy or too "
        f"hard for the policy now. Raise {KEY}.max_num_gen_batches={settings.max_num_gen_batches} (0: no limit) or "
        "actor_rollout_ref.rollout.n, choose other data, or train with what there is (enable=False)."
    )

"""Warnings for steps whose rewards cannot teach the policy anything: every advantage is zero, and nothing else says so.

A typical cause is an answer format that the model does not use, so that every response scores 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from verl.algorithms.advantages import Estimator
from verl.algorithms.rewards import response_rewards
from verl.reward.scorers import scorer_of

if TYPE_CHECKING:
    from verl.config.sections.models import Config

ADVICE_AFTER = 3  # steps in a row
REMIND_EVERY = 10  # steps, from then on
SHOWN_TEXT = 300  # characters of a response
CLIPPED_SHARE = 0.2  # of the responses, from which max_response_length is worth naming

LOOKS_FOR = {
    "gsm8k": 'the number behind the last "####" (reward.gsm8k.method=strict) or the last number (flexible)',
    "math": "an expression equal to the reference, in the last \\boxed{...}",
    "math_dapo": 'the answer behind the last "Answer:"',
    "multiple_choice": "the letter of the choice",
    "exact_match": "the reference text",
    "json_match": "a JSON value equal to the reference",
    "code": "a program that passes the tests",
    "judge": "what the judge's prompt asks for",
}


class LearningSignal:
    """Counts the steps in a row that have no learning signal, and words the warnings."""

    def __init__(self, config: Config, estimator: Estimator):
        self._config, self._estimator = config, estimator
        self._barren = 0

    def warning(self, table: pa.Table, step: int, decode: Callable[[list[list[int]]], list[str]]) -> str | None:
        """The warning that this step deserves, or None.

        The first barren step of a row shows two responses, the ``ADVICE_AFTER``-th says what to try, and every
        ``REMIND_EVERY``-th after that repeats it. table: the step's, scored. decode: a batch of token ids to texts.
        """
        rewards = response_rewards(table, self._config)
        if has_signal(table, rewards, self._estimator):
            self._barren = 0
            return None
        self._barren += 1
        if self._barren == 1:
            return barren_step(table, rewards, step, self._estimator, decode, self._config)
        if self._barren >= ADVICE_AFTER and (self._barren - ADVICE_AFTER) % REMIND_EVERY == 0:
            return advice(table, rewards, self._barren)
        return None


def has_signal(table: pa.Table, rewards: np.ndarray, estimator: Estimator) -> bool:
    """Whether rewards differ where the estimator compares them: among the responses to one prompt (of more than one
    response), with the greedy response, or else among all responses of the step. rewards: float64, (B,)."""
    if not len(rewards):
        return True
    if estimator.needs_greedy:
        return bool((rewards != table["greedy_reward"].to_numpy()).any())
    groups, of_row = np.unique(table["group"].to_numpy(), return_inverse=True)
    if not estimator.compares_group or len(groups) == len(rewards):
        return bool(rewards.min() != rewards.max())
    lowest, highest = np.full(len(groups), np.inf), np.full(len(groups), -np.inf)
    np.minimum.at(lowest, of_row, rewards)
    np.maximum.at(highest, of_row, rewards)
    return bool((lowest != highest).any())


def barren_step(
    table: pa.Table,
    rewards: np.ndarray,
    step: int,
    estimator: Estimator,
    decode: Callable[[list[list[int]]], list[str]],
    config: Config,
) -> str:
    """The facts of a step without a signal, with two of its responses."""
    if estimator.needs_greedy:
        what = "every response has the same reward as the greedy one"
    elif estimator.compares_group:
        what = "no two responses to the same prompt have different rewards"
    else:
        what = "all responses have the same reward"
    lines = [f"step {step}: {what} ({_rewards_text(rewards)}), so this step's update cannot learn from them."]
    rows = [0, len(table) // 2] if len(table) > 1 else [0]
    scorers = {_scorer_text(table["data_source"][row].as_py(), config) for row in rows}
    lines += [f"  {text}" for text in sorted(scorers)]
    responses = decode([table["response_ids"][row].as_py() for row in rows])
    for number, (row, response) in enumerate(zip(rows, responses, strict=True), start=1):
        lines.append(f"  response {number}: {_facts(table, row, float(rewards[row]))}")
        text = response.strip()
        shown = text if len(text) <= SHOWN_TEXT else "..." + text[-SHOWN_TEXT:]
        lines += [f"    > {line}" for line in shown.splitlines() or [""]]
    return "\n".join(lines)


def advice(table: pa.Table, rewards: np.ndarray, barren: int) -> str:
    """What to try after ``barren`` steps in a row without a signal."""
    lines = [f"{barren} steps in a row had no differing rewards ({_rewards_text(rewards)}). What to try:"]
    clipped = float(np.mean(np.array(table["finish_reason"].to_pylist(), dtype=object) == "length"))
    if clipped >= CLIPPED_SHARE:
        lines.append(f"  - {clipped:.0%} of the responses were cut off: raise data.max_response_length")
    if rewards.max() > 0:
        lines.append("  - if the responses are right, the data are too easy for this model: train on harder prompts")
    else:
        lines += [
            "  - if responses hold the right answer in another form: show the form in the prompt, with an example line",
            "    (examples/data_preprocess/gsm8k.py --instruction), or relax the scorer (its settings under reward)",
            "  - if the answers are wrong: train on easier prompts, or fine-tune first (verl.trainer.main_sft)",
        ]
    lines.append("  - more responses to a prompt differ more often: raise actor_rollout_ref.rollout.n or temperature")
    return "\n".join(lines)


def _rewards_text(rewards: np.ndarray) -> str:
    lowest, highest = float(rewards.min()), float(rewards.max())
    return (
        f"all {len(rewards):,} are {lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g} over all prompts"
    )


def _scorer_text(data_source: str, config: Config) -> str:
    if config.custom_reward_function.path:
        return f"scored by {config.custom_reward_function.name} of {config.custom_reward_function.path}"
    if not config.uses_scorers:
        return "scored by the reward model"
    name = scorer_of(data_source, config.reward.data_sources)
    if name in LOOKS_FOR:
        return f"the scorer {name} looks for {LOOKS_FOR[name]}"
    return f"scored by {name}"


def _facts(table: pa.Table, row: int, reward: float) -> str:
    facts = [f"reward {reward:g}", f"reference {table['ground_truth'][row].as_py()}"]
    extra: dict[str, Any] = {}
    if "reward_extra" in table.column_names:
        extra = json.loads(table["reward_extra"][row].as_py() or "{}")
    if "pred" in extra:
        facts.append("no answer found" if extra["pred"] is None else f"answer found: {extra['pred']}")
    tokens = len(table["response_ids"][row].as_py())
    ended = {"length": "cut off at the length limit", "stop": "ended by itself"}
    facts.append(f"{tokens} tokens, {ended.get(table['finish_reason'][row].as_py(), 'aborted')}")
    return ", ".join(facts)

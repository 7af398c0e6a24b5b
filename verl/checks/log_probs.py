"""Checks before the first step that the engine samples from the distribution that the trainer trains.

A few responses are generated as in training. Their tokens have a log-prob from the engine and one from the trainer's
forward. Two questions are asked.

1. Are the log-probs equal up to rounding? Rounding leaves small differences without a pattern. Another temperature
   leaves differences that vanish if the trainer's log-probs are computed at that temperature. The differences of
   another model vanish at no temperature.
2. Were the tokens sampled from that distribution? Take the probability of all tokens at another temperature, divided by
   their probability at the run's temperature. If they were sampled at the run's temperature, this ratio is above x with
   a probability of at most 1 / x (Ville's inequality), for any model and wherever responses end. Only a ratio beyond
   chance is reported.

The module does not use torch. It calls the two functions that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from verl.data.schema import ragged
from verl.errors import UserError

if TYPE_CHECKING:
    from verl.config.sections.models import Config
    from verl.rollout.contract.base import SamplingParams

PROMPTS, TOKENS = 8, 32  # number of responses, and their greatest length

# Largest mean |difference| in nats that rounding explains. docs/log_probs.md has the measurements.
FLOAT32_LIMIT = 0.01
HALF_LIMIT = 0.1  # either side computes in 16 bits

# A difference of this share of the log-probs' own spread also means another distribution.
SPREAD_LIMIT = 0.5
# The trainer at another temperature explains the engine's log-probs when it leaves no more of their spread than this.
SPREAD_EXPLAINED = 0.25
# Within the limit, a temperature must do better by this much, and beyond chance, before it is blamed.
BETTER, SIGMAS = 0.8, 5.0
SLOPE = 0.02  # relative change of temperature that a first-order fit must see before others are tried
FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 1.75, 2.0)  # of the run's temperature; 1 besides

DRAWN_FACTORS = (0.1, 0.25, 0.5, 0.7, 1.5, 2.0)
FALSE_ALARMS = 1e-6  # at most, over all of DRAWN_FACTORS
DRAWN_LIMIT = math.log(len(DRAWN_FACTORS) / FALSE_ALARMS)  # nats


@dataclass(frozen=True)
class Scores:
    """The trainer's forward at one temperature over N sampled tokens: float64, shape (N,) each. entropy: of the whole
    distribution of each token, in nats."""

    log_probs: np.ndarray
    entropy: np.ndarray

    def error(self, rollout: np.ndarray) -> float:
        return float(np.abs(rollout - self.log_probs).mean())

    def slope(self, rollout: np.ndarray) -> float:
        """Relative change of 1 / temperature that explains the differences best, to first order: the derivative of a
        token's log-prob by it is log_prob + entropy."""
        direction = self.log_probs + self.entropy
        norm = direction @ direction
        return float((rollout - self.log_probs) @ direction / norm) if norm else 0.0


ScoresAt = Callable[[float], Scores]


def check_log_probs(
    table: pa.Table, score: Callable[[float], pa.Table], config: Config, sampling: SamplingParams, device: str
) -> str:
    """One line on how well the log-probs agree. UserError if they belong to different distributions.

    table: responses generated with ``sampling``. score: returns the same table with the trainer's ``old_log_probs`` and
    ``entropy`` at a temperature.
    """
    written = ragged(table, "response_mask").values > 0
    if not written.any():
        reasons = ", ".join(sorted(set(table["finish_reason"].to_pylist())))
        raise UserError(f"the rollout engine wrote no token to any of {table.num_rows} prompts ({reasons})")

    def column(scored: pa.Table, name: str) -> np.ndarray:
        return ragged(scored, name).values[written].astype(np.float64)

    known: dict[float, Scores] = {}

    def at(temperature: float) -> Scores:
        if temperature not in known:
            scored = score(temperature)
            known[temperature] = Scores(column(scored, "old_log_probs"), column(scored, "entropy"))
        return known[temperature]

    rollout, limit = column(table, "rollout_log_probs"), rounding_limit(config, device)
    problem = diagnose(rollout, at, sampling.temperature, limit=limit)
    if problem is None and not filters(sampling):
        problem = diagnose_draws(at, sampling.temperature)
    if problem:
        raise UserError(
            f"the rollout engine and the trainer do not work with the same distribution: {problem} "
            "docs/log_probs.md says more; trainer.check_log_probs=False starts the run all the same."
        )
    differences = np.abs(rollout - at(sampling.temperature).log_probs)
    return (
        f"engine and trainer agree on the log-probs of {len(rollout)} tokens: "
        f"they differ by {differences.mean():.2g} nats, at most {differences.max():.2g}"
    )


def check_sampling(sampling: SamplingParams) -> SamplingParams:
    """The run's sampling parameters with the length of the check's responses."""
    longest = min(TOKENS, sampling.max_new_tokens)
    return replace(sampling, max_new_tokens=longest, min_new_tokens=min(sampling.min_new_tokens, longest))


def filters(sampling: SamplingParams) -> bool:
    """Whether tokens are sampled from a part of the vocabulary. Log-probs are always over all of it."""
    return sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0 or sampling.min_new_tokens > 0


def rounding_limit(config: Config, device: str) -> float:
    trainer = config.actor_rollout_ref.actor.fsdp_config.dtype
    if trainer == "auto":
        trainer = "float32" if device == "cpu" else "bfloat16"
    rollout = config.actor_rollout_ref.rollout
    if rollout.mode == "server":  # the server chooses its type
        return HALF_LIMIT
    engine = trainer if rollout.name == "hf" or rollout.dtype == "auto" else rollout.dtype
    return FLOAT32_LIMIT if trainer == engine == "float32" else HALF_LIMIT


# ---- the log-probs


def diagnose(rollout: np.ndarray, at: ScoresAt, temperature: float, *, limit: float) -> str | None:
    """What is wrong with the engine's log-probs of its own tokens (float64, shape (N,)); None if nothing is.

    at: the trainer's scores at a temperature. temperature: of the run. limit: mean |difference| that rounding explains.
    """
    trainer = at(temperature)
    for owner, values in (("engine", rollout), ("trainer", trainer.log_probs)):
        if count := int(np.count_nonzero(~(values <= 1e-3) | np.isinf(values))):
            return (
                f"{count} of {len(values)} log-probs of the {owner} are not log-probs (nan, infinite or above 0): "
                "its weights are broken, or were not all set."
            )
    error, spread = trainer.error(rollout), float(np.abs(rollout - rollout.mean()).mean())
    other_model = error > limit or error > max(SPREAD_LIMIT * spread, limit / 10)
    if not other_model and abs(trainer.slope(rollout)) < SLOPE:
        return None

    best, fit = closest_temperature(rollout, at, temperature)
    found = (
        f"their log-probs of {len(rollout)} tokens differ by {error:.2g} nats on average (rounding: at most {limit:g})"
    )
    if fit <= min(limit, SPREAD_EXPLAINED * spread) and _is_better(rollout, trainer, at(best), certain=other_model):
        return (
            f"{found}, but by {fit:.2g} if the trainer's are taken at temperature {best:.2g}. "
            f"So the engine's log-probs are of temperature {best:.2g}, those of the trainer of "
            f"actor_rollout_ref.rollout.temperature={temperature:g}."
        )
    if other_model:
        return (
            f"{found}, and no temperature explains it (nearest: {best:.2g}, {fit:.2g} nats). So the engine holds "
            "other weights than the trainer, or another model, or computes with far fewer bits (fp8, int4)."
        )
    return None


def closest_temperature(rollout: np.ndarray, at: ScoresAt, temperature: float) -> tuple[float, float]:
    """The temperature, other than the run's, at which the trainer's log-probs are closest to the engine's, and their
    mean |difference| there."""
    tried = {other: at(other).error(rollout) for other in {1.0, *(temperature * f for f in FACTORS)} - {temperature}}
    best = min(tried, key=lambda other: tried[other])
    for _ in range(2):  # refine between the points of the grid
        refined = best / max(1.0 + at(best).slope(rollout), 0.1)
        if at(refined).error(rollout) >= at(best).error(rollout):
            break
        best = refined
    return best, at(best).error(rollout)


def _is_better(rollout: np.ndarray, trainer: Scores, other: Scores, *, certain: bool) -> bool:
    """Whether the other temperature's differences are smaller beyond chance, by enough to report."""
    if other.error(rollout) > BETTER * trainer.error(rollout):
        return False
    gains = np.abs(rollout - trainer.log_probs) - np.abs(rollout - other.log_probs)
    return certain or float(gains.mean()) > SIGMAS * float(gains.std()) / math.sqrt(len(gains))


# ---- the tokens


def diagnose_draws(at: ScoresAt, temperature: float) -> str | None:
    """What is wrong if the tokens were sampled at another temperature than the run's, beyond chance; else None."""
    scores = at(temperature)
    surplus = float((scores.log_probs + scores.entropy).sum())
    gains = {}
    for factor in DRAWN_FACTORS:
        bound = (1.0 / factor - 1.0) * surplus  # of the gain, as log-sum-exp is convex: spares most forwards
        if bound > DRAWN_LIMIT:
            gains[factor] = float((at(temperature * factor).log_probs - scores.log_probs).sum())
    best = max(gains, key=lambda factor: gains[factor], default=1.0)
    if gains.get(best, 0.0) <= DRAWN_LIMIT:
        return None
    return (
        f"the {len(scores.log_probs)} tokens drawn are e^{gains[best]:.0f} times likelier at temperature "
        f"{temperature * best:.2g} than at actor_rollout_ref.rollout.temperature={temperature:g}, at which the engine "
        "gives their log-probs. So it draws from another distribution than it reports."
    )

"""The registry of advantage estimators. They work on ragged numpy columns, on the driver.

An estimator is a function ``AdvantageInputs -> (advantages, returns)``. Both results are float32 columns of the
response tokens, zero on tokens that the policy did not write. ``algorithm.adv_estimator`` names an entry of the
registry, or your own function as ``package.module:function``. The attributes ``needs_critic = True`` and
``needs_greedy = True`` of your function request a critic and greedy responses.
"""

from __future__ import annotations

from verl.algorithms.advantages.base import AdvantageInputs, AdvantageSettings, Compute, Estimator
from verl.algorithms.advantages.per_group import gpg, grpo, grpo_passk, opo, reinforce_plus_plus_baseline, rloo
from verl.algorithms.advantages.per_token import gae, reinforce_plus_plus, remax
from verl.algorithms.plugins import users_function

__all__ = ["ESTIMATORS", "AdvantageInputs", "AdvantageSettings", "Compute", "Estimator", "resolve"]

STD = frozenset({"norm_adv_by_std_in_grpo"})

ESTIMATORS = {
    estimator.name: estimator
    for estimator in (
        Estimator("gae", gae, needs_critic=True, reads=frozenset({"gamma", "lam"})),
        Estimator("grpo", grpo, compares_group=True, reads=STD),
        Estimator("rloo", rloo, compares_group=True),
        Estimator("reinforce_plus_plus", reinforce_plus_plus, reads=frozenset({"gamma"})),
        Estimator("reinforce_plus_plus_baseline", reinforce_plus_plus_baseline, compares_group=True),
        Estimator("remax", remax, needs_greedy=True),
        Estimator("opo", opo, compares_group=True),
        Estimator("grpo_passk", grpo_passk, compares_group=True, reads=STD),
        Estimator("gpg", gpg, compares_group=True),
    )
}


def resolve(name: str) -> Estimator:
    """The estimator that ``algorithm.adv_estimator`` names. UserError if there is none."""
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    compute = users_function("algorithm.adv_estimator", name, ESTIMATORS)
    critic, greedy = (bool(getattr(compute, needs, False)) for needs in ("needs_critic", "needs_greedy"))
    return Estimator(name, compute, needs_critic=critic, needs_greedy=greedy, reads=None)

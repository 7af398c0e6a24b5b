"""The pieces together, on a policy small enough to know the answer: a table of logits that writes two tokens."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from verl.algorithms.advantages import ESTIMATORS, AdvantageInputs, resolve
from verl.algorithms.batches import mini_batches
from verl.algorithms.kl import apply_kl_penalty, place_scores
from verl.algorithms.loss_modes import LOSS_MODES
from verl.algorithms.losses import aggregation_weights, policy_loss, value_loss
from verl.config.sections.models import ActorConfig
from verl.data.ragged import Ragged

VOCABULARY, PROMPTS, SAMPLES = 5, 8, 8
SETTINGS = ActorConfig(clip_ratio_low=0.2, clip_ratio_high=0.2)


def reward_of(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.where(first == 3, torch.where(second == 1, 1.0, 0.3), 0.0).double()


def train(estimator: str, kl_coef: float, steps: int, loss_mode: str = "vanilla") -> torch.Tensor:
    """PPO towards the answer (3, 1), with reward 1 for it and 0.3 for its first token alone; returns the policy's
    probabilities, shape (2, VOCABULARY): first token, and second after a right first one."""
    loss = LOSS_MODES[loss_mode].load()
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(1 + VOCABULARY, VOCABULARY, requires_grad=True)  # row 0: first token; row 1 + a: after a
    values = torch.zeros(1 + VOCABULARY, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=0.05)
    algorithm = SimpleNamespace(gamma=1.0, lam=0.95, norm_adv_by_std_in_grpo=True)
    batch_rows = PROMPTS * SAMPLES
    mask = Ragged(np.ones(2 * batch_rows, np.int8), 2 * np.arange(batch_rows + 1))
    group = np.repeat(np.arange(PROMPTS), SAMPLES)

    for step in range(steps):
        with torch.no_grad():
            first = torch.multinomial(logits[0].softmax(0).expand(batch_rows, -1), 1, generator=generator)[:, 0]
            second = torch.multinomial(logits[1 + first].softmax(-1), 1, generator=generator)[:, 0]
            contexts = torch.stack([torch.zeros_like(first), 1 + first], 1).flatten()
            actions = torch.stack([first, second], 1).flatten()
            old = logits.log_softmax(-1)[contexts, actions]
            old_values = values[contexts].clone()
        scores = reward_of(first, second).numpy()
        if kl_coef:
            reference = mask.like(np.full(2 * batch_rows, -np.log(VOCABULARY)))
            rewards, _ = apply_kl_penalty(scores, mask.like(old.numpy()), reference, mask, kl_coef, "k1")
        else:
            rewards = place_scores(scores, mask)
        best = int(logits[0].argmax())
        greedy = reward_of(torch.tensor(best), logits[1 + best].argmax()).expand(batch_rows).numpy()
        inputs = AdvantageInputs(rewards, mask.like(old_values.numpy()), mask, group, algorithm, greedy)
        advantages, returns = resolve(estimator)(inputs)

        for chosen in mini_batches(group, 4, epochs=2, shuffle=True, seed=0, step=step):
            tokens = torch.from_numpy((2 * chosen[:, None] + [0, 1]).flatten())
            own_mask = Ragged(np.ones(len(tokens), np.int8), 2 * np.arange(len(chosen) + 1))
            batch = {
                "response_mask": torch.ones(len(tokens)),
                "loss_weights": torch.from_numpy(aggregation_weights(own_mask, "token-mean", 2).values),
                "advantages": torch.from_numpy(advantages.values)[tokens],
                "returns": torch.from_numpy(returns.values)[tokens],
                "old_log_probs": old[tokens],
                "values": old_values[tokens],
                "row_ids": torch.from_numpy(np.repeat(chosen, 2)),
                "selected": torch.arange(len(tokens)) % 50 == 0,
            }
            outputs = {
                "log_probs": logits.log_softmax(-1)[contexts[tokens], actions[tokens]],
                "values": values[contexts[tokens]],
            }
            policy = partial(policy_loss, token_loss=loss, settings=SETTINGS, num_tokens=len(tokens))
            critic = partial(value_loss, cliprange_value=0.5, num_tokens=len(tokens))
            optimizer.zero_grad()
            (policy(outputs, batch)[0] + critic(outputs, batch)[0]).backward()
            optimizer.step()
    return logits.detach()[[0, 4]].softmax(-1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ppo_finds_the_rewarded_answer(estimator):
    policy = train(estimator, kl_coef=0.0, steps=60)
    enough = 0.75 if estimator == "grpo_passk" else 0.95  # with two right ones of 8, pass@8 has nothing left to learn
    assert policy[0, 3] > enough
    assert policy[1, 1] > enough


@pytest.mark.parametrize("loss_mode", LOSS_MODES)
def test_every_policy_loss_finds_the_rewarded_answer(loss_mode):
    policy = train("grpo", kl_coef=0.0, steps=60, loss_mode=loss_mode)
    assert policy[0, 3] > 0.95
    assert policy[1, 1] > 0.95


def test_the_kl_penalty_leads_to_the_policy_that_theory_gives():
    """The best policy under reward - beta * KL(policy || uniform) is proportional to exp(reward / beta)."""
    beta = 0.5
    policy = train("gae", kl_coef=beta, steps=300)
    after_right = torch.full((VOCABULARY,), 0.3 / beta)
    after_right[1] = 1.0 / beta
    expected_second = after_right.softmax(0)
    soft_value = torch.zeros(VOCABULARY)
    soft_value[3] = (after_right.exp().mean()).log()
    torch.testing.assert_close(policy[1], expected_second, atol=0.08, rtol=0)
    torch.testing.assert_close(policy[0], soft_value.softmax(0), atol=0.08, rtol=0)

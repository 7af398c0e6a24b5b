"""Adding an estimator, a policy loss, a scorer or an engine takes a file and a row of a registry. Checks, plan and
defaults, warnings and the run itself follow the row."""

from __future__ import annotations

import dataclasses

import added
import numpy as np
import pytest
import torch

from verl.algorithms.advantages import ESTIMATORS, AdvantageInputs, resolve
from verl.algorithms.loss_modes import LOSS_MODES
from verl.algorithms.loss_modes import resolve as resolve_loss
from verl.algorithms.losses import policy_loss
from verl.checks.dry_run import plan_text
from verl.data.ragged import Ragged
from verl.plan import engine_of
from verl.reward.scorers import SCORERS, ScorerSpec, make_scorer, settings_of
from verl.rollout.engines.registry import ADAPTERS
from verl.rollout.engines.vllm.arguments import VLLM
from verl.rollout.processes.adapter import WHOLE
from verl.trainer.ppo.engines import engine_settings
from verl.trainer.ppo.worker import reads_of

LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode"
ROLLOUT = "actor_rollout_ref.rollout"


def inert(findings) -> list[str]:
    return [text for text in findings.warnings if "has no effect" in text]


def test_an_estimator(monkeypatch, checked, load_run):
    monkeypatch.setitem(ESTIMATORS, "values_alone", added.ESTIMATOR)
    keys = ("algorithm.adv_estimator=values_alone", "algorithm.gamma=0.5", "algorithm.lam=0.5")
    plan, findings = checked(*keys, dry_run=True)
    assert not findings.problems
    assert plan.roles["critic"] == "algorithm.adv_estimator=values_alone needs values"
    assert inert(findings) == ["algorithm.lam=0.5 has no effect: it belongs to algorithm.adv_estimator=gae."]
    assert "values_alone" in plan_text(load_run(*keys).config, plan)
    ones = Ragged.from_rows([[1.0, 1.0]], np.float32)
    mask = Ragged.from_rows([[1, 1]], np.int8)
    inputs = AdvantageInputs(ones, ones, mask, np.array([0]), load_run(*keys).config.algorithm)
    np.testing.assert_array_equal(resolve("values_alone")(inputs)[0].values, [-0.5, -0.5])


def test_a_policy_loss(monkeypatch, checked, load_run):
    monkeypatch.setitem(LOSS_MODES, "off_engine", added.LOSS)
    keys = (f"{LOSS}=off_engine", "actor_rollout_ref.actor.tau_pos=2", "actor_rollout_ref.actor.tau_neg=2")
    loaded = load_run(*keys)
    actor = loaded.config.actor_rollout_ref.actor
    assert actor.loss_agg_mode == "seq-mean-token-sum"
    plan, findings = checked(*keys, dry_run=True)
    assert not findings.problems
    assert inert(findings) == [f"actor_rollout_ref.actor.tau_neg=2.0 has no effect: it belongs to {LOSS}=sapo."]
    assert "off_engine, seq-mean-token-sum" in plan_text(loaded.config, plan)
    assert "rollout_log_probs" in reads_of(loaded.config)["update_actor"]
    assert "rollout_log_probs" not in reads_of(load_run().config)["update_actor"]
    one, half = torch.ones(1), torch.full((1,), 0.5)
    batch = {"response_mask": one, "loss_weights": one, "advantages": one, "old_log_probs": -one}
    batch["rollout_log_probs"] = torch.log(half)
    loss, _ = policy_loss(
        {"log_probs": -one}, batch, token_loss=resolve_loss("off_engine").load(), settings=actor, num_tokens=1
    )
    assert loss.item() == pytest.approx(1.0)  # 0.5 * 2 * 1 * 1


def test_a_scorer(monkeypatch, checked, load_run, make_parquet, tmp_path):
    monkeypatch.setitem(SCORERS, "starts_with", added.SCORER)
    train, test = (make_parquet(tmp_path / f"{name}.parquet", 64, "starts_with") for name in ("train", "test"))
    keys = (f"data.train_files={train}", f"data.val_files={test}")
    _, findings = checked(*keys, dry_run=True)
    assert not findings.problems
    score = make_scorer(ScorerSpec(kwargs=settings_of(load_run(*keys).config.reward)))
    sample = {"data_source": "starts_with", "solution_str": "42 it is", "ground_truth": "42", "extra_info": "{}"}
    assert score(sample)[0] == 1.0


def test_an_engine(monkeypatch, checked, load_run):
    adapter = dataclasses.replace(
        VLLM, name="mine", title="Mine", distributions=("pytest",), no_min_new_tokens="it has none", pass_has_all=False
    )
    monkeypatch.setitem(ADAPTERS, "mine", adapter)
    keys = (f"{ROLLOUT}.name=mine", f"{ROLLOUT}.max_num_seqs=7", f"{ROLLOUT}.engine_kwargs.vllm={{seed:1}}")
    plan, findings = checked(*keys, dry_run=False)
    assert not findings.problems
    assert inert(findings) == [
        f"{ROLLOUT}.engine_kwargs.vllm={{seed:1}} has no effect: the engine is not vllm (rollout.name)."
    ]
    config = load_run(*keys).config
    assert "mine, 1 replica" in plan_text(config, plan)
    settings = engine_settings(engine_of(config, plan))
    assert (settings.max_num_seqs, settings.extra) == (7, {})
    assert adapter.arguments(settings, WHOLE)["max_num_seqs"] == 7
    _, findings = checked(*keys, f"{ROLLOUT}.min_new_tokens=3")
    assert [problem.key for problem in findings.problems] == [f"{ROLLOUT}.min_new_tokens"]

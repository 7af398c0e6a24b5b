"""Batch arithmetic and contradictions: found before anything starts, each with a value that works."""

from __future__ import annotations

import re

import pytest

from verl.checks.preflight import check
from verl.config.loading.load import load

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"


def keys(findings) -> list[str]:
    return [problem.key for problem in findings.problems]


def test_a_sound_run_has_no_problem_and_no_warning(checked):
    plan, findings = checked()
    assert findings.problems == []
    assert findings.warnings == []
    assert findings.unchecked == []
    assert plan.device == "cpu"


@pytest.mark.parametrize(
    ("batch", "mini", "samples", "world", "why"),
    [
        (64, 128, 1, 1, "has only data.train_batch_size=64"),
        (64, 24, 1, 1, "not a multiple"),
        (64, 2, 1, 4, "leave some of 4 ranks idle"),
        (60, 30, 1, 4, "do not spread over 4 ranks"),
        (64, 24, 2, 4, "not a multiple"),
    ],
)
def test_a_mini_batch_that_does_not_fit_comes_with_one_that_does(checked, batch, mini, samples, world, why):
    def run(mini):
        return checked(
            f"data.train_batch_size={batch}",
            f"{ACTOR}.ppo_mini_batch_size={mini}",
            f"{ROLLOUT}.n={samples}",
            f"trainer.n_gpus_per_node={world}",
            dry_run=True,
        )[1]

    (problem,) = run(mini).problems
    assert problem.key == f"{ACTOR}.ppo_mini_batch_size"
    assert why in problem.why
    working = int(re.search(r"set it to (\d+)", problem.fix)[1])
    assert run(working).problems == []


def test_a_batch_that_works_with_the_mini_batch_is_offered_too(checked):
    _, findings = checked("data.train_batch_size=100")
    (problem,) = findings.problems
    batch = re.search(r"set data.train_batch_size to (\d+)", problem.fix)[1]
    assert checked(f"data.train_batch_size={batch}")[1].problems == []


def test_the_critics_own_mini_batch_is_checked_as_well(checked):
    assert keys(checked("critic.ppo_mini_batch_size=24")[1]) == ["critic.ppo_mini_batch_size"]
    _, without_critic = checked("critic.ppo_mini_batch_size=24", "algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=4")
    assert without_critic.problems == []


def test_a_micro_batch_over_the_ranks_share_is_capped_with_a_notice(checked):
    plan, findings = checked(f"{ACTOR}.ppo_micro_batch_size_per_gpu=50")
    assert plan.actor.micro_batching.micro_batch_size == 32
    assert any(f"{ACTOR}.ppo_micro_batch_size_per_gpu: 32 instead of 50" in notice for notice in findings.notices)


def test_a_data_set_smaller_than_a_batch_is_a_problem(checked):
    _, findings = checked("data.train_batch_size=8000", f"{ACTOR}.ppo_mini_batch_size=4000")
    (problem,) = findings.problems
    assert problem.key == "data.train_batch_size"
    assert "7473 rows" in problem.why
    assert checked("data.train_max_samples=10", dry_run=True)[0].steps_per_epoch == 0


def test_the_tensor_parallel_size_divides_the_devices(checked):
    _, findings = checked(
        f"{ROLLOUT}.name=sglang", f"{ROLLOUT}.tensor_model_parallel_size=3", "trainer.n_gpus_per_node=8", dry_run=True
    )
    (problem,) = findings.problems
    assert problem.key == f"{ROLLOUT}.tensor_model_parallel_size"
    assert "1, 2, 4, 8" in problem.fix


def test_lengths_must_fit_the_model_and_the_engine(checked):
    _, findings = checked("data.max_response_length=1000", f"{ROLLOUT}.max_model_len=600")  # the model takes 1024
    assert sorted(keys(findings)) == [f"{ROLLOUT}.max_model_len", "data.max_response_length"]
    (length,) = (problem for problem in findings.problems if problem.key == "data.max_response_length")
    assert "1256 tokens" in length.why
    assert "768" in length.fix
    assert checked("data.max_response_length=768")[1].problems == []


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([f"{ROLLOUT}.val_kwargs.n=4"], f"{ROLLOUT}.val_kwargs.n"),
        ([f"{ROLLOUT}.val_kwargs.do_sample=True"], f"{ROLLOUT}.val_kwargs.temperature"),
        (["critic.enable=False"], "critic.enable"),
        (["algorithm.adv_estimator=gea"], "algorithm.adv_estimator"),
        (["algorithm.adv_estimator=no_such_package:f"], "algorithm.adv_estimator"),
        ([f"{ACTOR}.policy_loss.loss_mode=gsop"], f"{ACTOR}.policy_loss.loss_mode"),
        (["algorithm.filter_groups.enable=True"], f"{ROLLOUT}.n"),
        (
            [
                "algorithm.filter_groups.enable=True",
                "algorithm.filter_groups.metric=acc",
                f"{ROLLOUT}.n=4",
                "reward_model.enable=True",
            ],
            "algorithm.filter_groups.metric",
        ),
        (["reward_model.overlong_buffer.enable=True"], "reward_model.overlong_buffer.len"),
        (
            ["reward_model.overlong_buffer.enable=True", "reward_model.overlong_buffer.len=257"],
            "reward_model.overlong_buffer.len",
        ),
        (["data.val_files=null"], "data.val_files"),
        (["trainer.resume_mode=resume_path"], "trainer.resume_from_path"),
        (["trainer.resume_mode=resume_path", "trainer.resume_from_path=/no/global_step_3"], "trainer.resume_from_path"),
        (["trainer.default_hdfs_dir=hdfs://somewhere"], "trainer.default_hdfs_dir"),
        (["trainer.logger=[console,tensorbord]"], "trainer.logger"),
        (["custom_reward_function.path=/no/reward.py"], "custom_reward_function.path"),
        ([f"{ROLLOUT}.name=vlm"], f"{ROLLOUT}.name"),
        ([f"{ROLLOUT}.name=sglang"], f"{ROLLOUT}.name"),
        ([f"{ROLLOUT}.name=vllm"], f"{ROLLOUT}.name"),
        (["trainer.n_gpus_per_node=2", "trainer.executor=local"], "trainer.executor"),
        (["trainer.n_gpus_per_node=2", f"{ROLLOUT}.mode=server"], f"{ROLLOUT}.mode"),
        (["data.prompt_key=question"], "data.train_files"),
    ],
)
def test_contradictions_stop_a_real_run(checked, overrides, key):
    _, findings = checked(*overrides)
    assert key in keys(findings)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.adv_estimator=grpo"], "n=1"),
        (["algorithm.adv_estimator=rloo"], "n=1"),
        ([f"{ACTOR}.policy_loss.loss_mode=gspo"], "next to nothing"),
        (["algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=4", "critic.enable=True"], "never asks"),
        ([f"{ACTOR}.use_kl_loss=True", "algorithm.use_kl_in_reward=True"], "counts twice"),
        ([f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_coef=0"], "only to measure"),
        ([f"{ROLLOUT}.ignore_eos=True"], "runs on to"),
        (["trainer.total_training_steps=5", "trainer.critic_warmup=6"], "the actor never trains"),
        (["trainer.total_training_steps=5", f"{ACTOR}.optim.lr_warmup_steps=5"], "never reaches"),
        ([f"{ACTOR}.use_dynamic_bsz=True", f"{ACTOR}.ppo_max_token_len_per_gpu=300"], "by itself"),
        ([f"{ACTOR}.fsdp_config.dtype=bfloat16"], "on a CPU"),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(checked, overrides, words):
    _, findings = checked(*overrides)
    assert findings.problems == []
    assert any(words in warning for warning in findings.warnings)


def test_misspelt_engines_and_loggers_get_the_nearest_name(checked):
    _, findings = checked(f"{ROLLOUT}.name=sg-lang", "trainer.logger=[tensorbord]")
    assert ["sglang" in problem.fix or "tensorboard" in problem.fix for problem in findings.problems] == [True, True]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}, None),
        ({"num_labels": 1}, None),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "it has 2 labels, and a score is one number"),
        ({"id2label": {"0": "bad", "1": "fair", "2": "good"}}, "it has 3 labels, and a score is one number"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "it is no sequence classifier (architectures in its config.json)"),
    ],
    ids=str,
)
def test_a_reward_model_gives_one_number(checked, make_model, tmp_path, config, why):
    path = make_model(tmp_path / "judge", **config)
    keys = ["reward_model.enable=True", f"reward_model.model.path={path}", "reward_model.micro_batch_size_per_gpu=8"]
    found = checked(*keys)[1].problems
    assert [(problem.key, problem.why) for problem in found] == ([("reward_model.model.path", why)] if why else [])
    if why:
        assert checked(*keys, "+reward_model.model.override_config.num_labels=1")[1].problems == []


def test_whether_prompts_fit_is_told_to_be_unchecked_in_a_dry_run(checked):
    assert any("data.max_prompt_length" in text for text in checked(dry_run=True)[1].unchecked)
    assert any("left out" in text for text in checked("data.filter_overlong_prompts=True", dry_run=True)[1].unchecked)
    assert not checked()[1].unchecked


def test_what_only_another_machine_could_tell_is_unchecked_in_a_dry_run(checked):
    overrides = [f"{ROLLOUT}.name=sglang", "trainer.n_gpus_per_node=4", "trainer.device=cuda"]
    _, dry = checked(*overrides, dry_run=True)
    assert dry.problems == []
    assert len(dry.unchecked) == 3
    assert any("whether the Ray cluster has them (the torch that is installed" in text for text in dry.unchecked)
    _, real = checked(*overrides)
    assert {"trainer.n_gpus_per_node", f"{ROLLOUT}.name"} <= set(keys(real))


def test_a_disk_too_small_for_the_checkpoints_is_a_problem(checked, tmp_path, make_model):
    huge = make_model(tmp_path / "huge", parameters=10**12)
    where = [f"actor_rollout_ref.model.path={huge}", f"critic.model.path={huge}"]
    _, findings = checked(*where, "trainer.save_freq=1", "trainer.max_ckpt_to_keep=2")
    assert keys(findings) == ["trainer.default_local_dir"]
    assert "max_ckpt_to_keep" in findings.problems[0].fix
    assert checked(*where)[1].problems == []  # nothing is saved


def test_settings_that_cannot_be_read_do_not_hide_other_problems(checked):
    _, findings = checked(
        f"{ROLLOUT}.temprature=0.7",  # no such key
        f"{ROLLOUT}.n=many",  # not a number
        "actor_rollout_ref.model.path=/no/model",
        "data.train_batch_size=100",
        "data.val_files=/no/test.parquet",
    )
    assert keys(findings) == [
        f"{ROLLOUT}.temprature",
        f"{ROLLOUT}.n",
        "data.val_files",
        f"{ACTOR}.ppo_mini_batch_size",
        "actor_rollout_ref.model.path",
    ]


@pytest.mark.parametrize("fault", ["data.train_batch_sise=96", "data.train_batch_size=lots", "data.train_batch_size=0"])
def test_a_problem_that_only_follows_from_another_is_not_reported(checked, fault):
    _, findings = checked(fault, f"{ACTOR}.ppo_mini_batch_size=48")  # fits 96, not the default of 1024
    assert keys(findings) == [fault.partition("=")[0]]


def test_a_required_key_that_is_missing_is_reported_once_and_with_the_rest(gsm8k, tmp_path):
    loaded = load([f"data.train_files={gsm8k}/train.parquet", "data.val_files=/no/test.parquet", "trainer.device=cpu"])
    _, findings = check(loaded, dry_run=False)
    assert sorted(keys(findings)) == ["actor_rollout_ref.model.path", f"{ROLLOUT}.name", "data.val_files"]


def test_everything_wrong_is_reported_at_once(checked, tmp_path):
    _, findings = checked(
        f"data.train_files=[{tmp_path}/a.parquet,{tmp_path}/b.parquet]",
        "actor_rollout_ref.model.path=/no/model",
        "critic.model.path=/no/other",
        f"{ROLLOUT}.name=vlm",
        "data.train_batch_size=100",
        "trainer.logger=[paper]",
    )
    assert sorted(keys(findings)) == sorted(
        [
            "data.train_files",
            "data.train_files",
            "actor_rollout_ref.model.path",
            "critic.model.path",
            f"{ROLLOUT}.name",
            f"{ACTOR}.ppo_mini_batch_size",
            "trainer.logger",
        ]
    )


def test_what_sglang_cannot_do_is_said_before_it_starts(checked, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    rollout = "actor_rollout_ref.rollout"
    _, findings = checked(
        f"{rollout}.name=sglang",
        f"{rollout}.min_new_tokens=4",
        f"+{rollout}.engine_kwargs.sglang.dp_size=2",
        dry_run=True,
    )
    assert {problem.key for problem in findings.problems} == {
        f"{rollout}.min_new_tokens",
        f"{rollout}.engine_kwargs.sglang.dp_size",
    }
    assert any("expandable_segments" in warning for warning in findings.warnings)


def test_what_vllm_cannot_do_is_said_before_it_starts(checked):
    rollout = "actor_rollout_ref.rollout"
    _, findings = checked(
        f"{rollout}.name=vllm",
        f"{rollout}.min_new_tokens=4",
        f"{rollout}.max_num_batched_tokens=512",
        f"{rollout}.tensor_model_parallel_size=4",
        f"+{rollout}.engine_kwargs.vllm.data_parallel_size=2",
        "trainer.nnodes=2",
        "trainer.n_gpus_per_node=2",
        "trainer.device=cuda",
        dry_run=True,
    )
    assert {problem.key for problem in findings.problems} == {
        f"{rollout}.max_num_batched_tokens",
        f"{rollout}.tensor_model_parallel_size",
        f"{rollout}.engine_kwargs.vllm.data_parallel_size",
    }


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_an_engine_that_is_not_installed_is_named_with_the_commands_that_install_it(checked, monkeypatch, engine):
    monkeypatch.setattr("verl.rollout.processes.adapter.installed", lambda distribution: False)
    _, findings = checked(f"actor_rollout_ref.rollout.name={engine}")
    (fix,) = [problem.fix for problem in findings.problems if problem.key.endswith("rollout.name")]
    assert f'pip install -e ".[{engine}]"' in fix
    assert f"make {engine}-cpu" in fix

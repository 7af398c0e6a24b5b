"""The command line's forms, each by the configuration that it gives."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("trainer.experiment_name=abc", "abc"),
        ("trainer.experiment_name='a b, c'", "a b, c"),
        ('trainer.experiment_name="it\'s"', "it's"),
        ("trainer.experiment_name=", ""),
        ("trainer.experiment_name=5", "5"),
        ("trainer.experiment_name=2024_05", "2024_05"),
        ("trainer.experiment_name=1e-6", "1e-6"),
        ("trainer.experiment_name=true", "true"),
        ("trainer.experiment_name='5'", "5"),
        ("trainer.experiment_name=a=b", "a=b"),
        ("trainer.experiment_name=~/runs/a#1", "~/runs/a#1"),
        ("trainer.experiment_name=Größe", "Größe"),
        ("+trainer.experiment_name=added", "added"),
        ("++trainer.experiment_name=forced", "forced"),
    ],
)
def test_text_is_taken_as_it_is_written(load_valid, override, value):
    assert load_valid(override).config.trainer.experiment_name == value


def test_numbers_flags_and_null_take_the_types_of_their_keys(load_valid):
    config = load_valid(
        "data.train_batch_size=1e3",
        "actor_rollout_ref.actor.optim.lr=3",
        "trainer.val_before_train=false",
        "trainer.total_training_steps=null",
        "actor_rollout_ref.actor.optim.betas=[0.9,0.95]",
    ).config
    assert config.data.train_batch_size == 1000
    assert isinstance(config.data.train_batch_size, int)
    assert isinstance(config.actor_rollout_ref.actor.optim.lr, float)
    assert config.trainer.val_before_train is False
    assert config.trainer.total_training_steps is None
    assert config.actor_rollout_ref.actor.optim.betas == (0.9, 0.95)


@pytest.mark.parametrize("logger", ["[console]", "console", "['console']"])
def test_one_value_where_a_list_is_wanted_is_a_list_of_one(load_valid, logger):
    assert load_valid(f"trainer.logger={logger}").config.trainer.logger == ["console"]


def test_lists_of_text_keep_numbers_as_text(load_valid):
    rollout = load_valid("actor_rollout_ref.rollout.stop=[1,'</answer>']").config.actor_rollout_ref.rollout
    assert rollout.stop == ["1", "</answer>"]


def test_a_group_of_keys_can_be_set_as_a_mapping(load_valid):
    loaded = load_valid("actor_rollout_ref.actor={ppo_epochs:2,optim:{lr:1e-4}}")
    actor = loaded.config.actor_rollout_ref.actor
    assert (actor.ppo_epochs, actor.optim.lr) == (2, 1e-4)
    assert {"actor_rollout_ref.actor.ppo_epochs", "actor_rollout_ref.actor.optim.lr"} <= loaded.set_keys


def test_entries_of_a_free_mapping_are_set_one_by_one_or_together(load_valid):
    loaded = load_valid(
        "custom_reward_function.reward_kwargs={a:1,b:{c:[x]}}",
        "+custom_reward_function.reward_kwargs.b.d=2",
        "actor_rollout_ref.rollout.engine_kwargs.sglang.attention_backend=triton",
    )
    assert loaded.config.custom_reward_function.reward_kwargs == {"a": 1, "b": {"c": ["x"], "d": 2}}
    assert loaded.config.actor_rollout_ref.rollout.engine_kwargs.sglang == {"attention_backend": "triton"}
    assert "custom_reward_function.reward_kwargs" in loaded.set_keys


def test_the_last_of_two_values_wins(load_valid):
    assert load_valid("trainer.seed=2", "trainer.seed=3").config.trainer.seed == 3


def test_a_tilde_takes_a_key_back_to_its_default(load_valid):
    loaded = load_valid("trainer.seed=2", "~trainer.seed")
    assert loaded.config.trainer.seed == 1
    assert "trainer.seed" not in loaded.set_keys


def test_references_give_the_values_of_other_keys_and_defaults(load_valid, monkeypatch):
    monkeypatch.setenv("RUN_STEPS", "7")
    trainer = load_valid(
        "trainer.experiment_name=2024_05",
        "trainer.rollout_data_dir=${trainer.default_local_dir}/rollouts_${data.train_batch_size}",
        "trainer.total_training_steps='${oc.env:RUN_STEPS}'",
    ).config.trainer
    assert trainer.rollout_data_dir == "checkpoints/verl/2024_05/rollouts_1024"
    assert trainer.total_training_steps == 7


def test_a_key_without_a_value_of_its_own_follows_the_key_it_derives_from(load_valid):
    config = load_valid(
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.clip_ratio=0.1",
        "actor_rollout_ref.actor.clip_ratio_high=0.3",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.actor.fsdp_config.dtype=bfloat16",
        "critic.forward_max_token_len_per_gpu=null",
        "critic.ppo_max_token_len_per_gpu=99",
        "trainer.seed=5",
    ).config
    policy = config.actor_rollout_ref
    assert config.critic.model.path == policy.model.tokenizer_path == "model"
    assert config.critic.ppo_mini_batch_size == 8
    assert (policy.actor.clip_ratio_low, policy.actor.clip_ratio_high) == (0.1, 0.3)
    assert policy.ref.log_prob_micro_batch_size_per_gpu == policy.rollout.log_prob_micro_batch_size_per_gpu == 4
    assert config.critic.forward_micro_batch_size_per_gpu == config.critic.ppo_micro_batch_size_per_gpu == 4
    assert config.critic.forward_max_token_len_per_gpu == 99
    assert policy.ref.fsdp_config.dtype == config.critic.model.fsdp_config.dtype == "bfloat16"
    assert config.data.seed == 5


def test_setting_the_kl_coefficient_turns_the_penalty_on_and_says_so(load_valid):
    loaded = load_valid("algorithm.kl_ctrl.kl_coef=0.001")
    assert loaded.config.algorithm.use_kl_in_reward is True
    assert any("algorithm.use_kl_in_reward=True" in notice for notice in loaded.notices)
    assert "algorithm.use_kl_in_reward" not in loaded.set_keys


def test_a_coefficient_from_the_environment_turns_the_penalty_on_too(load_valid, monkeypatch):
    monkeypatch.setenv("KL", "0.02")
    algorithm = load_valid("algorithm.kl_ctrl.kl_coef='${oc.env:KL}'").config.algorithm
    assert (algorithm.kl_ctrl.kl_coef, algorithm.use_kl_in_reward) == (0.02, True)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["algorithm.kl_ctrl.kl_coef=0"],
        ["algorithm.kl_ctrl.kl_coef=0.1", "algorithm.use_kl_in_reward=False"],
        ["algorithm.kl_ctrl.target_kl=0.2"],
    ],
)
def test_the_penalty_stays_off_otherwise(load_valid, arguments):
    loaded = load_valid(*arguments)
    assert loaded.config.algorithm.use_kl_in_reward is False
    assert not loaded.notices


@pytest.mark.parametrize(
    ("loss", "mode", "notices"),
    [("gspo", "seq-mean-token-mean", 1), ("vanilla", "token-mean", 0), ("my.own:function", "token-mean", 0)],
)
def test_losses_of_whole_responses_are_averaged_over_them(load_valid, loss, mode, notices):
    loaded = load_valid(f"actor_rollout_ref.actor.policy_loss.loss_mode={loss}")
    assert loaded.config.actor_rollout_ref.actor.loss_agg_mode == mode
    assert len(loaded.notices) == notices


def test_an_average_that_the_user_chose_stays(load_valid):
    key = "actor_rollout_ref.actor.loss_agg_mode"
    loaded = load_valid("actor_rollout_ref.actor.policy_loss.loss_mode=gspo", f"{key}=token-mean")
    assert loaded.config.actor_rollout_ref.actor.loss_agg_mode == "token-mean"
    assert not loaded.notices


def test_the_configuration_imports_without_torch_or_numpy():
    code = "import sys, verl.config; verl.config.load(['trainer.seed=1']); print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

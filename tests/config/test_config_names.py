"""Names of other versions, and batch sizes over all ranks."""

import pytest

from verl.config.loading.aliases import RENAMED, WITHOUT_EFFECT


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ("ray_init.num_cpus=4", "ray_kwargs.ray_init", {"num_cpus": 4}),
        (
            "actor_rollout_ref.actor.optim.warmup_style=cosine",
            "actor_rollout_ref.actor.optim.lr_scheduler_type",
            "cosine",
        ),
        ("critic.fsdp.param_offload=True", "critic.model.fsdp_config.param_offload", True),
        ("critic.fsdp={optimizer_offload:True}", "critic.model.fsdp_config.optimizer_offload", True),
        ("critic.fsdp_config.fsdp_size=2", "critic.model.fsdp_config.fsdp_size", 2),
        ("reward.custom_reward_function.path=a.py", "custom_reward_function.path", "a.py"),
        ("reward.reward_manager.name=naive", "reward_model.reward_manager", "naive"),
        ("trainer.max_actor_ckpt_to_keep=2", "trainer.max_ckpt_to_keep", 2),
        ("actor_rollout_ref.rollout.response_length=9", "data.max_response_length", 9),
        (
            "actor_rollout_ref.actor.checkpoint.contents=[model]",
            "actor_rollout_ref.actor.checkpoint.save_contents",
            ["model"],
        ),
        ("algorithm.rollout_correction.rollout_is=token", "algorithm.rollout_correction.level", "token"),
        ("algorithm.rollout_correction={rollout_is_threshold:3}", "algorithm.rollout_correction.threshold", 3),
        ("data.tokenizer=tok", "actor_rollout_ref.model.tokenizer_path", "tok"),
    ],
)
def test_an_old_name_sets_the_key_and_is_noticed(load_valid, given, key, value):
    loaded = load_valid(given)
    config = loaded.config
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value
    assert key in loaded.set_keys
    (notice,) = loaded.notices
    assert key in notice


def test_an_old_engine_name_is_read_as_the_engine(load_valid):
    loaded = load_valid("actor_rollout_ref.rollout.name=sglang_async")
    assert loaded.config.actor_rollout_ref.rollout.name == "sglang"
    assert "sglang_async" in loaded.notices[0]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_old_rollout_mode_is_read_as_the_one_on_the_trainers_devices(load_valid, mode):
    loaded = load_valid(f"actor_rollout_ref.rollout.mode={mode}")
    assert loaded.config.actor_rollout_ref.rollout.mode == "colocated"


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_a_key_with_nothing_left_to_decide_is_named_as_such(load_valid, key):
    loaded = load_valid(f"{key}=1")
    assert len(loaded.notices) == 1
    assert f"{key} has no effect" in loaded.notices[0]


@pytest.mark.parametrize(
    ("nodes", "gpus", "given", "share"), [(2, 8, 16, 1), (1, 4, 16, 4), (1, 4, 18, 4), (2, 8, 3, 1), (1, 1, 6, 6)]
)
def test_a_batch_size_over_all_ranks_is_divided(load_valid, nodes, gpus, given, share):
    loaded = load_valid(
        f"critic.ppo_micro_batch_size={given}", f"trainer.nnodes={nodes}", f"trainer.n_gpus_per_node={gpus}"
    )
    assert loaded.config.critic.ppo_micro_batch_size_per_gpu == share
    assert "critic.ppo_micro_batch_size_per_gpu" in loaded.set_keys
    (notice,) = loaded.notices
    assert f"critic.ppo_micro_batch_size={given}" in notice
    assert f"per_gpu={share}" in notice


def test_the_old_and_the_new_form_of_a_batch_size_together_are_a_problem(problems_of):
    found = problems_of("critic.ppo_micro_batch_size=16", "critic.ppo_micro_batch_size_per_gpu=4")
    assert "critic.ppo_micro_batch_size=16" in found["critic.ppo_micro_batch_size_per_gpu"].why


def test_a_null_old_form_is_as_if_it_were_not_there(load_valid):
    loaded = load_valid("critic.ppo_micro_batch_size_per_gpu=4", "critic.ppo_micro_batch_size=null")
    assert loaded.config.critic.ppo_micro_batch_size_per_gpu == 4
    assert not loaded.notices


def test_two_names_of_one_key_may_agree_but_not_differ(load_valid, problems_of):
    both = ["trainer.max_actor_ckpt_to_keep=2", "trainer.max_critic_ckpt_to_keep={}"]
    assert load_valid(both[0], both[1].format(2)).config.trainer.max_ckpt_to_keep == 2
    assert load_valid(both[0], both[1].format("null")).config.trainer.max_ckpt_to_keep == 2
    assert list(problems_of(both[0], both[1].format(3))) == ["trainer.max_critic_ckpt_to_keep"]


def test_every_old_name_leads_to_a_key_or_a_group(load_valid):
    from verl.config import Config, SFTConfig
    from verl.config.loading.schema import keys_of, sections_of

    names = {name for schema in (Config, SFTConfig) for name in [*keys_of(schema), *sections_of(schema)]}
    assert set(RENAMED.values()) <= names
    assert not set(RENAMED) & names

"""A key that the user sets either takes effect or is named in a warning."""

from __future__ import annotations

import pytest

from verl.checks.inert import REGISTRIES, Run, find_inert
from verl.config.loading.load import load
from verl.config.loading.schema import conditions_of, keys_of
from verl.config.sections.effects import ReadBy
from verl.config.sections.models import Config
from verl.plan import plan_run

ACTOR = "actor_rollout_ref.actor"
REF = "actor_rollout_ref.ref"
ROLLOUT = "actor_rollout_ref.rollout"
CORRECTION = "algorithm.rollout_correction"


def inert(*overrides: str, device: str = "cuda") -> set[str]:
    """The keys that are said to have no effect."""
    loaded = load([*overrides, "actor_rollout_ref.model.path=some/model"])
    assert loaded.config is not None, loaded.problems
    plan = plan_run(loaded.config, device=device, train_rows=10000)
    named = [
        text.split(" has no effect: ")[0] for text in find_inert(Run.of_plan(loaded.config, plan, loaded.set_keys))
    ]
    return {setting.partition("=")[0] for text in named for setting in text.split(", ")}


HF, SGLANG = f"{ROLLOUT}.name=hf", f"{ROLLOUT}.name=sglang"
SERVER, DISK = f"{ROLLOUT}.mode=server", f"{ROLLOUT}.server_weight_update=disk"
GRPO = "algorithm.adv_estimator=grpo"
LOSS = f"{ACTOR}.policy_loss.loss_mode"
RLOO = "algorithm.adv_estimator=rloo"
RM = "reward_model.enable=True"
MANY = "trainer.n_gpus_per_node=4"


@pytest.mark.parametrize(
    ("override", "inert_with", "effective_with"),
    [
        ("critic.optim.lr=1e-5", [HF, GRPO], [HF]),
        ("critic.optim.lr=1e-5", [HF, GRPO], [HF, GRPO, "critic.enable=True"]),
        ("trainer.critic_warmup=3", [HF, GRPO], [HF]),
        (f"{REF}.log_prob_micro_batch_size_per_gpu=4", [HF], [HF, f"{ACTOR}.use_kl_loss=True"]),
        (f"{REF}.fsdp_config.param_offload=True", [HF], [HF, "algorithm.kl_ctrl.kl_coef=0.1"]),
        ("algorithm.kl_ctrl.kl_coef=0.1", [HF, "algorithm.use_kl_in_reward=False"], [HF]),
        ("algorithm.kl_penalty=abs", [HF], [HF, "algorithm.use_kl_in_reward=True"]),
        (
            "algorithm.kl_ctrl.horizon=5",
            [HF, "algorithm.use_kl_in_reward=True"],
            [HF, "algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.type=adaptive"],
        ),
        (f"{ACTOR}.kl_loss_coef=0.1", [HF], [HF, f"{ACTOR}.use_kl_loss=True"]),
        ("algorithm.gamma=0.9", [HF, GRPO], [HF]),
        ("algorithm.lam=0.9", [HF, GRPO], [HF]),
        ("algorithm.norm_adv_by_std_in_grpo=False", [HF], [HF, GRPO]),
        ("algorithm.norm_adv_by_std_in_grpo=False", [HF, RLOO], [HF, "algorithm.adv_estimator=grpo_passk"]),
        ("algorithm.gamma=0.9", [HF, RLOO], [HF, "algorithm.adv_estimator=reinforce_plus_plus"]),
        ("algorithm.gamma=0.9", [HF, RLOO], [HF, "algorithm.adv_estimator=my.own:function"]),
        (f"{ACTOR}.clip_ratio_c=5", [HF, f"{LOSS}=gspo"], [HF]),
        (f"{ACTOR}.clip_ratio=0.1", [HF, f"{LOSS}=gpg"], [HF, f"{LOSS}=cispo"]),
        (f"{ACTOR}.tau_neg=1.2", [HF], [HF, f"{LOSS}=sapo"]),
        (f"{ACTOR}.policy_loss.clip_cov_lb=0.5", [HF], [HF, f"{LOSS}=clip_cov"]),
        (f"{ACTOR}.policy_loss.ppo_kl_coef=1", [HF, f"{LOSS}=clip_cov"], [HF, f"{LOSS}=kl_cov"]),
        (f"{ACTOR}.policy_loss.ppo_kl_coef=1", [HF], [HF, f"{LOSS}=my.own:function"]),
        (
            f"{ACTOR}.clip_ratio=0.1",
            [HF, f"{ACTOR}.clip_ratio_low=0.1", f"{ACTOR}.clip_ratio_high=0.3"],
            [HF, f"{ACTOR}.clip_ratio_high=0.3"],
        ),
        ("algorithm.filter_groups.metric=acc", [HF], [HF, "algorithm.filter_groups.enable=True"]),
        ("reward_model.overlong_buffer.len=9", [HF], [HF, "reward_model.overlong_buffer.enable=True"]),
        (f"{CORRECTION}.threshold=3", [HF], [HF, f"{CORRECTION}.level=token"]),
        (f"{CORRECTION}.mode=mask", [HF], [HF, f"{CORRECTION}.level=sequence"]),
        (
            f"{CORRECTION}.threshold_lower=0.5",
            [HF, f"{CORRECTION}.level=token"],
            [HF, f"{CORRECTION}.level=token", f"{CORRECTION}.mode=mask"],
        ),
        (f"{ACTOR}.ppo_micro_batch_size_per_gpu=4", [HF, f"{ACTOR}.use_dynamic_bsz=True"], [HF]),
        (
            f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",
            [HF, f"{ACTOR}.use_dynamic_bsz=True"],
            [HF, f"{ACTOR}.use_dynamic_bsz=True", "critic.use_dynamic_bsz=False"],  # the critic's follows it
        ),
        (f"{ACTOR}.ppo_max_token_len_per_gpu=4000", [HF, f"{ACTOR}.ppo_micro_batch_size_per_gpu=2"], [HF]),
        (
            "critic.forward_max_token_len_per_gpu=4000",
            [HF, "critic.forward_micro_batch_size_per_gpu=2"],
            [HF, "critic.forward_micro_batch_size_per_gpu=2", "critic.use_dynamic_bsz=True"],
        ),
        (f"{ROLLOUT}.gpu_memory_utilization=0.8", [HF], [SGLANG, MANY]),
        (f"{ROLLOUT}.tensor_model_parallel_size=2", [HF], [SGLANG, MANY]),
        (f"{ROLLOUT}.engine_kwargs.sglang={{x:1}}", [HF], [SGLANG]),
        (f"{ROLLOUT}.gpu_memory_utilization=0.8", [SGLANG, SERVER], [SGLANG]),
        (f"{ROLLOUT}.engine_kwargs.sglang={{x:1}}", [SGLANG, SERVER], [SGLANG]),
        (f"{ROLLOUT}.max_num_seqs=8", [SGLANG, SERVER], [SGLANG]),
        (f"{ROLLOUT}.server_urls=[http://127.0.0.1:1]", [SGLANG], [SGLANG, SERVER]),
        (f"{ROLLOUT}.engine_kwargs.vllm={{seed:1}}", [SGLANG], [f"{ROLLOUT}.name=vllm"]),
        (f"{ROLLOUT}.engine_kwargs.sglang={{log_level:info}}", [f"{ROLLOUT}.name=vllm"], [SGLANG]),
        (f"{ROLLOUT}.server_weight_update=disk", [SGLANG], [SGLANG, SERVER]),
        (f"{ROLLOUT}.server_weights_dir=/w", [SGLANG, SERVER], [SGLANG, SERVER, DISK]),
        (f"{ROLLOUT}.update_weights_bucket_megabytes=9", [SGLANG, SERVER, DISK], [SGLANG, SERVER]),
        (f"{ROLLOUT}.val_kwargs.temperature=1", [HF], [HF, f"{ROLLOUT}.val_kwargs.do_sample=True"]),
        ("data.seed=3", [HF, "data.shuffle=False"], [HF]),
        ("data.truncation=left", [HF, "data.filter_overlong_prompts=True"], [HF]),
        ("data.val_files=x.parquet", [HF, "trainer.val_before_train=False"], [HF]),
        ("trainer.max_ckpt_to_keep=2", [HF], [HF, "trainer.save_freq=5"]),
        ("trainer.total_epochs=2", [HF, "trainer.total_training_steps=5"], [HF]),
        ("trainer.resume_from_path=x", [HF], [HF, "trainer.resume_mode=resume_path"]),
        ("custom_reward_function.name=f", [HF], [HF, "custom_reward_function.path=x.py"]),
        ("reward.gsm8k.method=flexible", [HF, "custom_reward_function.path=x.py"], [HF]),
        ("reward.num_workers=3", [HF, "reward_model.reward_manager=batch"], [HF]),
        ("reward.code.score_by=share", [HF, RM], [HF, RM, "reward_model.combine=add"]),
        ("reward_model.combine=add", [HF], [HF, RM]),
        ("reward_model.model.path=x", [HF], [HF, RM]),
        ("reward_model.micro_batch_size_per_gpu=2", [HF, RM, "reward_model.use_dynamic_bsz=True"], [HF, RM]),
        (f"{ACTOR}.optim.lr_warmup_steps_ratio=0.1", [HF, f"{ACTOR}.optim.lr_warmup_steps=3"], [HF]),
        (f"{ACTOR}.optim.min_lr_ratio=0.1", [HF], [HF, f"{ACTOR}.optim.lr_scheduler_type=cosine"]),
        (f"{ACTOR}.fsdp_config.fsdp_size=2", [HF], [HF, MANY]),
        ("trainer.balance_batch=True", [HF], [HF, MANY]),
        ("ray_kwargs.ray_init={num_cpus:8}", [HF], [HF, MANY]),
        ("ray_kwargs.ray_init={num_cpus:8}", [HF, "trainer.executor=local"], [HF, "trainer.executor=ray"]),
        ("trainer.worker_timeout=9", [HF], [HF, MANY]),
        ("trainer.rollout_restarts=1", [SGLANG], [SGLANG, MANY]),
        ("trainer.rollout_restarts=1", [HF, MANY], [SGLANG, MANY]),
    ],
)
def test_a_key_is_named_where_it_does_nothing_and_only_there(override, inert_with, effective_with):
    key = override.partition("=")[0]
    assert key in inert(override, *inert_with)
    assert key not in inert(override, *effective_with)


@pytest.mark.parametrize(
    "override",
    [
        f"{ACTOR}.fsdp_config.param_offload=True",
        f"{ACTOR}.fsdp_config.use_torch_compile=False",
        "actor_rollout_ref.model.use_remove_padding=True",
    ],
)
def test_what_is_for_gpus_means_nothing_on_a_cpu(override):
    assert inert(override, HF, device="cpu") == {override.partition("=")[0]}
    assert inert(override, HF, device="cuda") == set()


def test_a_key_set_to_null_is_not_named():
    assert inert(HF, GRPO, "critic.enable=null", "critic.ppo_micro_batch_size_per_gpu=null") == set()


def test_defaults_that_the_user_did_not_set_are_never_named():
    assert inert(HF, GRPO) == set()


def registry_keys() -> dict[str, set[str]]:
    """A key that names a registry's entry -> the keys that say that their effect depends on it."""
    marked: dict[str, set[str]] = {choice: set() for choice in REGISTRIES}
    for key in keys_of(Config):
        for _, condition in conditions_of(Config, key):
            if isinstance(condition, ReadBy):
                marked[condition.choice].add(key)
    return marked


def test_keys_that_only_some_entries_of_a_registry_read_say_so_and_no_others():
    read = {
        choice: {f"{section}.{name}" for entry in registry.values() for name in entry.reads or ()}
        for choice, (section, registry) in REGISTRIES.items()
    }
    assert registry_keys() == read


def test_to_name_no_validation_files_is_to_say_what_then_happens():
    assert not inert(HF, "data.val_files=null", "trainer.val_before_train=False")

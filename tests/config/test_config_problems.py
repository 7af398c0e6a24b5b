"""What a user reads when settings do not fit."""

import pytest

from verl.config import Config, load, report
from verl.config.loading.names import nearest
from verl.config.loading.schema import MISSING, keys_of


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("data.train_batchsize", "data.train_batch_size"),
        ("train_batch_size", "data.train_batch_size"),
        ("trainer.total_epoch", "trainer.total_epochs"),
        ("actor_rollout_ref.actor.lr", "actor_rollout_ref.actor.optim.lr"),
        ("actor_rollout_ref.rollout.gpu_mem_utilization", "actor_rollout_ref.rollout.gpu_memory_utilization"),
        ("actor.ppo_mini_batch_size", "actor_rollout_ref.actor.ppo_mini_batch_size"),
        ("algorithm.kl_coef", "algorithm.kl_ctrl.kl_coef"),
        ("critic.fsdp_confg.param_offload", "critic.model.fsdp_config.param_offload"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(problems_of, typed, meant):
    found = problems_of(f"{typed}=1")
    assert meant in found[typed].fix


def test_a_key_with_a_letter_too_few_is_found_again():
    known = [*keys_of(Config)]
    assert [nearest(key[:-1], known) for key in known[::7]] == known[::7]


@pytest.mark.parametrize(
    ("argument", "key", "says"),
    [
        ("data.train_batch_size=0", "data.train_batch_size", "at least 1"),
        ("data.train_batch_size=True", "data.train_batch_size", "whole number"),
        ("data.train_batch_size=1.5", "data.train_batch_size", "whole number"),
        ("data.train_batch_size=many", "data.train_batch_size", "whole number"),
        ("data.train_batch_size=[1]", "data.train_batch_size", "whole number"),
        ("data.train_batch_size=null", "data.train_batch_size", "whole number"),
        ("data.train_batch_size.x=1", "data.train_batch_size.x", "no such key"),
        ("data.train_files=null", "data.train_files", "1 or more"),
        ("actor_rollout_ref.actor.optim.lr=nan", "actor_rollout_ref.actor.optim.lr", "over 0"),
        ("actor_rollout_ref.actor.optim.betas=[1,2,3]", "actor_rollout_ref.actor.optim.betas", "list of 2"),
        ("actor_rollout_ref.rollout.top_k=0", "actor_rollout_ref.rollout.top_k", "not 0"),
        ("actor_rollout_ref.rollout.temperature=0", "actor_rollout_ref.rollout.temperature", "over 0"),
        ("trainer.val_before_train=maybe", "trainer.val_before_train", "True or False"),
        ("trainer.experiment_name=null", "trainer.experiment_name", "text"),
        ("critic.optim=5", "critic.optim", "group of keys"),
        ("critic.ppo_micro_batch_size=x", "critic.ppo_micro_batch_size", "whole number"),
        ("trainer.max_ckpt_to_keep='${nope.x}'", "trainer.max_ckpt_to_keep", "nope"),
        ("ray_kwargs.ray_init.num_cpus='${nope.x}'", "ray_kwargs.ray_init.num_cpus", "nope"),
        ("data.seed='${actor_rollout_ref.rollout.max_len}'", "data.seed", "max_len"),
        ("trainer.experiment_name='${a'", "trainer.experiment_name", "no viable alternative"),
        ("trainer.experiment_name='${trainer.experiment_name}'", "trainer.experiment_name", "Recursive"),
        ("trainer.experiment_name='${oc.env:NO_SUCH_VARIABLE}'", "trainer.experiment_name", "NO_SUCH_VARIABLE"),
        ("data.train_batch_size=1,2", "data.train_batch_size", "sweep"),
        ("data.train_batch_size=choice(1,2)", "data.train_batch_size", "sweep"),
        ("trainer.experiment_name=[a", "trainer.experiment_name=[a", "cannot be read"),
        ("nonsense", "nonsense", "key=value"),
        ("data@other=1", "data@other=1", "not a key"),
        ("--cfg=job", "--cfg=job", "no such option"),
        ("--config", "--config", "needs a file"),
    ],
)
def test_what_does_not_fit_is_named_with_what_would(problems_of, argument, key, says):
    found = problems_of(argument)
    assert list(found) == [key]
    assert says in found[key].why
    assert found[key].fix


def test_a_word_outside_the_choices_names_the_nearest_choice(problems_of):
    found = problems_of("actor_rollout_ref.actor.loss_agg_mode=token_mean")
    assert "token-mean" in found["actor_rollout_ref.actor.loss_agg_mode"].fix


def test_a_default_taken_from_a_misfit_is_no_second_problem(problems_of):
    assert list(problems_of("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=x")) == [
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    ]


def test_a_default_that_does_not_fit_where_it_is_taken_names_its_source(problems_of):
    found = problems_of("actor_rollout_ref.actor.clip_ratio=1.5")
    assert "${actor_rollout_ref.actor.clip_ratio}" in found["actor_rollout_ref.actor.clip_ratio_low"].why


def test_missing_keys_are_named_once_each(problems_of):
    found = problems_of(required=())
    assert set(found) == {"actor_rollout_ref.model.path", "actor_rollout_ref.rollout.name"}
    assert all(problem.why.startswith("it must be set") for problem in found.values())


def test_all_problems_come_together_in_one_numbered_report(yaml_file):
    file = yaml_file("trainer: {epochs: 3, nnodes: zero}\nreward: 5")
    loaded = load(["--config", file, "data.train_batch_size=-1", "a.b=[", "algorithm.lam=2", "-x"])
    assert loaded.config is None
    text = report(loaded.problems)
    names = [
        "trainer.epochs=3",
        "trainer.nnodes=zero",
        "reward=5",
        "data.train_batch_size=-1",
        "a.b=[",
        "algorithm.lam=2",
    ]
    names += ["-x", "actor_rollout_ref.model.path", "actor_rollout_ref.rollout.name"]
    assert all(name in text for name in names)
    assert text.startswith(f"{len(names)} problems")
    assert f"{len(names):3}. " in text


def test_with_problems_there_is_a_draft_in_which_what_is_at_fault_is_at_its_default():
    faulty = ["data.train_batch_size=x", "actor_rollout_ref.actor.clip_ratio=1.5", "trainer.foo=1"]
    loaded = load([*faulty, "trainer.seed=4", "actor_rollout_ref.rollout.name=hf", "critic.model.path=null"])
    assert loaded.config is None
    assert loaded.draft.data.train_batch_size == 1024
    assert loaded.draft.actor_rollout_ref.actor.clip_ratio == 0.2
    assert loaded.draft.trainer.seed == 4
    assert loaded.draft.actor_rollout_ref.rollout.name == "hf"
    assert loaded.draft.actor_rollout_ref.model.path == MISSING


def test_without_problems_the_draft_is_the_configuration(load_valid):
    loaded = load_valid("trainer.seed=4")
    assert loaded.draft is loaded.config

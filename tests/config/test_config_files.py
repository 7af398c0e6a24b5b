"""YAML files, alone and under the command line."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from verl.config import Config, load, report, resolved_yaml
from verl.config.loading.schema import get, keys_of, put

BASE = """
actor_rollout_ref:
  model: {path: from_file}
  rollout: {name: hf}
  actor:
    optim:
      lr: 1e-5
data.train_batch_size: 64
trainer:
  experiment_name: 2024
  default_local_dir: runs/${trainer.experiment_name}
ray_kwargs:
"""


def test_a_file_sets_keys_nested_or_dotted(load_valid, yaml_file):
    loaded = load_valid("--config", yaml_file(BASE), required=())
    assert loaded.config.actor_rollout_ref.model.path == "from_file"
    assert loaded.config.actor_rollout_ref.actor.optim.lr == 1e-5
    assert loaded.config.data.train_batch_size == 64
    assert loaded.config.trainer.default_local_dir == "runs/2024"
    assert {"data.train_batch_size", "actor_rollout_ref.actor.optim.lr"} <= loaded.set_keys


def test_later_files_win_over_earlier_ones_and_the_command_line_over_all(load_valid, yaml_file):
    first = yaml_file(BASE, "a.yaml")
    second = yaml_file("trainer: {experiment_name: second, seed: 2}\ndata: {train_batch_size: 2}", "b.yaml")
    loaded = load_valid("data.train_batch_size=3", "--config", first, f"--config={second}", required=())
    assert loaded.config.data.train_batch_size == 3
    assert (loaded.config.trainer.experiment_name, loaded.config.trainer.seed) == ("second", 2)
    assert loaded.config.trainer.default_local_dir == "runs/second"


def test_a_tilde_undoes_what_a_file_set(load_valid, yaml_file):
    loaded = load_valid("--config", yaml_file(BASE), "~data.train_batch_size", required=())
    assert loaded.config.data.train_batch_size == 1024
    assert "data.train_batch_size" not in loaded.set_keys


def test_old_names_in_a_file_give_way_to_the_command_line(load_valid, yaml_file):
    file = yaml_file(BASE + "\ncritic: {ppo_micro_batch_size: 32, fsdp: {param_offload: true}}")
    loaded = load_valid("--config", file, "critic.ppo_micro_batch_size_per_gpu=2", required=())
    assert loaded.config.critic.ppo_micro_batch_size_per_gpu == 2
    assert loaded.config.critic.model.fsdp_config.param_offload is True


def test_files_that_cannot_be_read_are_named_with_the_reason(yaml_file, tmp_path):
    broken = yaml_file("a: [1", "broken.yaml")
    words = yaml_file("- a list\n- of words", "words.yaml")
    loaded = load(["--config", broken, "--config", str(tmp_path / "none.yaml"), "--config", words])
    text = report(loaded.problems)
    assert "broken.yaml" in text
    assert "line 1" in text
    assert "No such file" in text
    assert "the file holds no keys" in text


def test_a_run_from_its_resolved_file_knows_what_the_user_chose(load_valid, yaml_file):
    first = load_valid("data.train_batch_size=64", "critic.ppo_micro_batch_size=4", "algorithm.kl_ctrl.kl_coef=0.1")
    text = resolved_yaml(first.config, first.set_keys)
    second = load_valid("--config", yaml_file(text), "trainer.seed=9", required=())
    assert second.set_keys == first.set_keys | {"trainer.seed"}
    assert second.config.data.train_batch_size == 64
    assert not second.notices


def test_a_penalty_that_a_resolved_file_has_off_by_default_comes_on_with_its_coefficient(load_valid, yaml_file):
    first = load_valid()
    file = yaml_file(resolved_yaml(first.config, first.set_keys))
    assert load_valid("--config", file, required=()).config.algorithm.use_kl_in_reward is False
    on = load_valid("--config", file, "algorithm.kl_ctrl.kl_coef=0.1", required=())
    assert on.config.algorithm.use_kl_in_reward is True


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20) | st.sampled_from(
    ["${trainer.seed}", "\\${x}", "a\\\\${b}", "1e-6", "null", "true", "0x10", "1_000", "2024-01-01", "~", "on", "???"]
)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), inner),
    max_leaves=5,
)
mappings = st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), plain_values, max_size=3)
some_settings = st.fixed_dictionaries(
    {"actor_rollout_ref.model.path": texts, "actor_rollout_ref.rollout.name": texts},
    optional={
        "trainer.experiment_name": texts,
        "trainer.rollout_data_dir": st.none() | texts,
        "trainer.total_training_steps": st.none() | st.integers(1, 10**9),
        "trainer.dry_run": st.booleans(),
        "data.train_files": st.lists(texts, min_size=1, max_size=3),
        "data.seed": st.integers(),
        "actor_rollout_ref.actor.optim.lr": st.floats(1e-12, 1e3),
        "actor_rollout_ref.actor.optim.betas": st.tuples(st.floats(0, 1), st.floats(0, 1)),
        "actor_rollout_ref.rollout.stop": st.lists(texts, max_size=3),
        "actor_rollout_ref.model.override_config": mappings,
        "custom_reward_function.reward_kwargs": mappings,
        "algorithm.use_kl_in_reward": st.booleans(),
        "critic.enable": st.none() | st.booleans(),
    },
)


@given(chosen=some_settings)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_resolved_configuration_reads_back_to_the_same(tmp_path, chosen):
    tree: dict = {"algorithm": {"use_kl_in_reward": False}}
    for key, value in chosen.items():
        put(tree, key, value)
    config = Config.model_validate(tree)
    file = tmp_path / "resolved.yaml"
    file.write_text(resolved_yaml(config, chosen))
    loaded = load(["--config", str(file)])
    assert not loaded.problems, report(loaded.problems)
    assert loaded.config == config
    assert loaded.set_keys == set(chosen)


def test_a_resolved_configuration_holds_every_key(load_valid, yaml_file):
    from omegaconf import OmegaConf

    loaded = load_valid()
    content = OmegaConf.to_container(OmegaConf.load(yaml_file(resolved_yaml(loaded.config))))
    assert not [key for key in keys_of(Config) if get(content, key) is get({}, "absent")]

"""The budget of host memory, worked out by hand, and what is said of machines that have too little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from verl.checks import host_memory
from verl.checks.host_memory import budget_table, judge, require_host_memory
from verl.config.sections.parts import FSDPConfig
from verl.errors import UserError
from verl.machine import HostMemory
from verl.memory.host_budget import FILES, PIECE, Devices, HostBudget, Model, budget_of, budget_of_run
from verl.plan import ModelSize

BILLION = 10**9
GB = 10**9


def model(role: str = "actor", billions: int = 7, files: str | None = "bfloat16", trained: bool = True, **keys: Any):
    exports = keys.pop("exports", False)
    size = ModelSize(billions * BILLION, files)
    return Model(role, f"{role}.fsdp_config", FSDPConfig(**keys), size, trained, exports)


def everything(**keys: Any) -> list[Model]:
    """Actor, critic and reference of 7 billion parameters."""
    keys = {"param_offload": True, "optimizer_offload": True} | keys
    return [model("actor", **keys), model("critic", **keys), model("reference", trained=False, **keys)]


def held(models: list[Model], devices: Devices) -> list[tuple[int, int]]:
    """GB of weights and optimizer."""
    found = budget_of(models, devices, saves=False).models
    return [(round(each.weights / GB), round(each.optimizer / GB)) for each in found]


@pytest.mark.parametrize(
    ("devices", "keys", "expected"),
    [
        (Devices("cuda"), {}, [(14, 84), (14, 84), (14, 0)]),
        (Devices("cuda"), {"dtype": "float32"}, [(28, 56), (28, 56), (28, 0)]),
        (Devices("cuda", 1, 8), {}, [(28, 56), (28, 56), (14, 0)]),
        (Devices("cuda", 2, 8), {}, [(14, 28), (14, 28), (7, 0)]),
        (Devices("cuda", 2, 8), {"fsdp_size": 8}, [(28, 56), (28, 56), (14, 0)]),
        (Devices("cuda", 2, 8), {"fsdp_size": 4}, [(56, 112), (56, 112), (28, 0)]),
        (Devices("cuda"), {"param_offload": False}, [(0, 84), (0, 84), (0, 0)]),
        (Devices("cuda"), {"optimizer_offload": False}, [(14, 0), (14, 0), (14, 0)]),
        (Devices("cpu"), {"param_offload": False, "optimizer_offload": False}, [(28, 56), (28, 56), (28, 0)]),
        (Devices("cpu"), {"dtype": "bfloat16", "files": None}, [(14, 84), (14, 84), (0, 0)]),
    ],
)
def test_what_models_hold_on_a_machine(devices, keys, expected):
    assert held(everything(**keys), devices) == expected


def most(models: list[Model], devices: Devices, saves: bool = False, node: int = 0) -> tuple[int, str]:
    return budget_of(models, devices, saves=saves, node=node).most()


def test_a_model_is_read_whole_where_the_first_rank_is_and_only_if_its_files_are_of_another_type():
    devices = Devices("cuda", 2, 8)
    assert most([model()], devices) == (28 * GB, "while the actor is built")
    assert most([model()], devices, node=1)[0] == 0
    assert most([model(files="float32")], devices)[0] == 0
    assert most([model(trained=False, files="float32")], devices) == (14 * GB, "while the actor is built")


def test_a_model_is_built_beside_those_built_before():
    models = [model("actor", param_offload=True, optimizer_offload=True), model("critic")]
    assert most(models, Devices("cuda", 1, 8)) == ((84 + 28) * GB, "while the critic is built")


def test_a_state_on_its_way_to_where_it_stays_is_there_twice_in_part():
    alone = [model(optimizer_offload=True)]
    assert most(alone, Devices("cuda")) == (84 * GB + PIECE, "while the actor is built")
    assert most(alone, Devices("cuda", 1, 8)) == (56 * GB + 8 * PIECE, "while the actor is built")


def test_a_checkpoint_takes_two_files_of_each_rank_and_an_export_a_whole_model():
    models = [model(param_offload=True, optimizer_offload=True)]
    assert most(models, Devices("cuda", 1, 8), saves=True) == (84 * GB + 8 * FILES, "while a checkpoint is written")
    models = [model(param_offload=True, optimizer_offload=True, exports=True)]
    assert most(models, Devices("cuda"), saves=True) == ((98 + 14) * GB, "while the actor is exported")
    assert most(models, Devices("cuda", 2, 1), saves=True, node=1) == (42 * GB + FILES, "while a checkpoint is written")


def test_gradients_count_on_a_cpu():
    assert most([model()], Devices("cpu")) == ((28 + 56 + 28) * GB, "while the actor is updated")


def of(available: float, total: float = 128, limited: bool = False) -> HostMemory:
    return HostMemory(int(available * GB), int(total * GB), limited)


def budget() -> HostBudget:
    """210 GB between stages."""
    return budget_of(everything(), Devices("cuda"), saves=False)


def test_too_little_is_refused_with_what_each_model_holds_and_the_keys():
    with pytest.raises(UserError) as error:
        require_host_memory([budget()], [("this machine", of(120.13))], "cuda")
    assert str(error.value) == (
        "host memory: the run takes up to 210.0 GB on this machine, between stages, and 120.1 GB are available (all: "
        "128.0 GB):\n"
        "  model      weights  optimizer  keys\n"
        "  actor      14.0 GB    84.0 GB  actor.fsdp_config.*\n"
        "  critic     14.0 GB    84.0 GB  critic.fsdp_config.*\n"
        "  reference  14.0 GB          -  reference.fsdp_config.*\n"
        "Leave param_offload or optimizer_offload off where a model fits on the GPUs, or take a machine with more "
        "memory; several machines (trainer.nnodes, in PPO) share what is held."
    )


def test_a_model_that_cannot_even_be_read_is_not_blamed_on_offload():
    reading = budget_of([model()], Devices("cuda"), saves=False)
    with pytest.raises(UserError, match=r"(?s)while the actor is built.*\nTake a smaller model") as error:
        require_host_memory([reading], [("this machine", of(20))], "cuda")
    assert "Leave" not in str(error.value)


def test_hardly_enough_is_a_warning_and_enough_is_no_word():
    warning = require_host_memory([budget()], [("this machine", of(211, 256))], "cuda")
    assert warning is not None
    assert "up to 210.0 GB on this machine, between stages, and 211.0 GB are available" in warning
    assert require_host_memory([budget()], [("this machine", of(248, 256))], "cuda") is None


def test_every_machine_that_has_too_little_is_named():
    machines = [("node-a", of(100)), ("node-b", of(500, 512)), ("node-c", of(90, 100, limited=True))]
    found = judge([budget()] * 3, machines, "cuda")
    assert found is not None
    assert found.short
    assert "on node-a, between stages, and 100.0 GB are available (all: 128.0 GB)" in found.why
    assert "node-b" not in found.why
    assert "on node-c, between stages, and 90.0 GB are available (the limit of its container or job: 100.0" in found.why


# ---- in a dry run, and of a run's settings


@pytest.fixture
def measured(monkeypatch) -> Callable[[float], None]:
    """Sets this machine's memory, in GB."""
    return lambda available: monkeypatch.setattr(host_memory, "host_memory", lambda: of(available))


@pytest.fixture
def large(make_model, tmp_path) -> list[str]:
    """Of 2 billion parameters, all of them trained on a CPU."""
    folder = make_model(tmp_path / "large", parameters=2 * BILLION)
    return [f"actor_rollout_ref.model.path={folder}", f"critic.model.path={folder}", "trainer.save_freq=-1"]


def test_a_dry_run_finds_too_little_memory(checked, measured, large):
    measured(30)
    _, findings = checked(*large, dry_run=True)
    (problem,) = findings.problems
    assert (problem.key, problem.value) == ("trainer.device", "cpu")
    assert "56.0 GB on this machine, while the actor is updated, and 30.0 GB are available" in problem.why


def test_a_dry_run_warns_of_hardly_enough_and_is_silent_otherwise(checked, measured, large):
    measured(60)
    _, findings = checked(*large, dry_run=True)
    assert not findings.problems
    assert any("56.0 GB" in warning for warning in findings.warnings)
    measured(70)
    _, findings = checked(*large, dry_run=True)
    assert not [warning for warning in findings.warnings if "host memory" in warning]


def test_a_dry_run_for_other_machines_says_what_they_need(checked, measured, large):
    measured(1)
    keys = [
        "trainer.device=cuda",
        "trainer.n_gpus_per_node=8",
        "actor_rollout_ref.actor.fsdp_config.param_offload=True",
    ]
    _, findings = checked(*large, *keys, dry_run=True)
    (said,) = [text for text in findings.unchecked if text.startswith("host memory")]
    assert "whether each machine has 8.0 GB" in said


def test_a_run_of_small_models_needs_next_to_nothing(checked):
    plan, findings = checked(dry_run=True)
    assert not [text for text in (*findings.warnings, *findings.unchecked) if "host memory" in text]
    assert set(plan.models) == {"actor", "critic"}


def test_a_model_that_is_not_here_makes_the_budget_unknown(load_run, checked):
    path = "critic.model.path=some/hub-model"
    plan, findings = checked(path, dry_run=True)
    assert budget_of_run(load_run(path).config, plan) is None
    assert not findings.problems


def test_every_role_has_a_part_in_a_runs_budget(load_run, checked, model):
    keys = [
        "actor_rollout_ref.actor.use_kl_loss=True",
        "reward_model.enable=True",
        f"reward_model.model.path={model}",
        "actor_rollout_ref.ref.fsdp_config.param_offload=True",
        "trainer.device=cuda",
    ]
    plan, _ = checked(*keys, dry_run=True)
    found = budget_of_run(load_run(*keys).config, plan)
    assert found is not None
    assert [(each.role, each.weights) for each in found.models] == [
        ("actor", 0),
        ("critic", 0),
        ("reference", 2000),
        ("reward", 0),
    ]
    assert "actor_rollout_ref.ref.fsdp_config.*" in budget_table(found)[3]

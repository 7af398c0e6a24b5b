"""Settings of every test process and of the processes it starts; before torch reads them."""

import os
import re
from pathlib import Path

import pytest
from helpers import make_model, make_prompts
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads of one test do not spin against another's
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Property tests: no deadline (a busy machine is no failure), the same examples every time.
settings.register_profile("verl", deadline=None, derandomize=True)
settings.load_profile("verl")


# When several processes run tests (make test has two), the files of a group come one after the other. And the groups
# come first, as they wait more than they compute.
GROUPS = {
    "hosts of their own": (
        "tests/end_to_end/test_two_hosts.py",
        "tests/cluster/test_hosts.py",
        "tests/with_sglang/test_sglang_on_two_hosts.py",
    ),
    "Rays of this host, and its GPUs": (
        "tests/end_to_end/test_ppo_on_ray.py",
        "tests/end_to_end/test_reward_model.py",
        "tests/trainer/test_generation.py",
        "tests/cluster/test_worker_group.py",
        "tests/cluster/test_ray_start.py",
        "tests/with_engines/test_engine_on_ray.py",
        "tests/with_engines/test_generation_with_engine.py",
        "tests/with_sglang/test_multi_gpu_benchmark.py",
        "tests/gpu/test_engine_on_cuda.py",
        "tests/gpu/test_ppo_on_cuda.py",
        "tests/gpu/test_sglang_on_cuda.py",
        "tests/gpu/test_two_gpus.py",
    ),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
# The longest of the others, so that the processes end at about the same time.
LONG = (
    "tests/conformance/test_rollout_contract.py",
    "tests/end_to_end/test_resume.py",
    "tests/end_to_end/test_ppo_run.py",
    "tests/end_to_end/test_bad_input.py",
    "tests/end_to_end/test_gsm8k_smollm2.py",
    "tests/engine/test_engine_ranks.py",
)
ORDER = {name: place for place, name in enumerate((*GROUP_OF, *LONG))}


class WholeFiles(LoadScopeScheduling):
    """Gives a file's tests to one process; of the conformance suite, one engine's, which those share."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        if file in GROUP_OF:
            return GROUP_OF[file]
        engine = re.search(r"\[([^]-]*)", test) if file.startswith("tests/conformance/") else None
        return f"{file} of {engine[1]}" if engine else file


def pytest_xdist_make_scheduler(config: pytest.Config, log) -> WholeFiles:
    config.option.loadscopereorder = False  # the order is that of collection
    return WholeFiles(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.get(item.nodeid.partition("::")[0], len(ORDER)))


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A folder with model/, train.parquet, val.parquet and reward.py (a custom reward: the share of "a")."""
    folder = tmp_path_factory.mktemp("small")
    make_model(folder / "model")
    make_prompts(folder / "train.parquet", 24, seed=0)
    make_prompts(folder / "val.parquet", 6, seed=1)
    (folder / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return solution_str.count('a') / max(len(solution_str), 1)\n"
    )
    return folder

"""Settings of every test process and of the processes it starts; before torch reads them."""

import os
from pathlib import Path

import pytest
from helpers import make_model, make_prompts
from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads of one test do not spin against another's
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Property tests: no deadline (a busy machine is no failure), the same examples every time.
settings.register_profile("verl", deadline=None, derandomize=True)
settings.load_profile("verl")


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

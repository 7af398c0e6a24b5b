"""Generation with a real engine in a process of its own, which reads the model itself."""

from __future__ import annotations

import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from helpers import ROOT


@pytest.mark.parametrize("ranks", [1, 2])
def test_greedy_responses_are_those_of_the_embedded_engine(engine, small, tmp_path, ranks):
    for name in ("hf", engine.name):
        settings = [
            f"data.path={small / 'train.parquet'}",
            f"data.output_path={tmp_path / name}.parquet",
            "data.batch_size=12",
            "data.max_prompt_length=8",
            "data.max_response_length=12",
            f"model.path={small / 'model'}",
            f"rollout.name={name}",
            "rollout.temperature=0",
            "rollout.max_num_seqs=64",
            f"trainer.n_gpus_per_node={1 if name == 'hf' else ranks}",
            "trainer.device=cpu",
        ]
        command = [sys.executable, "-m", "verl.trainer.main_generation", *settings]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"{engine.title} 0." in done.stdout
    assert pq.read_table(tmp_path / "hf.parquet").equals(pq.read_table(tmp_path / f"{engine.name}.parquet"))

"""The same job on a GPU: bfloat16 compute, float32 masters, models that leave the GPU between stages."""

import numpy as np
import pytest
import torch
from helpers import OFFLOAD, arguments, metrics_of

from verl.trainer.main_ppo import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_job_learns_on_a_gpu_with_offload(small, tmp_path, dtype):
    keys = {
        "trainer__device": "cuda",
        "trainer__total_training_steps": 15,
        "trainer__save_freq": 15,
        "actor_rollout_ref__actor__optim__lr": 5e-3,
        "actor_rollout_ref__actor__fsdp_config__dtype": dtype,
        **OFFLOAD,
    }
    assert main(arguments(small, tmp_path, **keys)) == 0
    steps = [step for step in metrics_of(tmp_path) if "critic/score/mean" in step]
    scores = [step["critic/score/mean"] for step in steps]
    assert np.mean(scores[-3:]) > 3 * np.mean(scores[:3])
    largest = max(step["training/rollout_log_probs_diff_max"] for step in steps)
    assert largest < (0.1 if dtype == "bfloat16" else 1e-4)
    print(f"{dtype}: largest log-prob difference {largest:.2g}, score {scores[0]:.2f} -> {np.mean(scores[-3:]):.2f}")


def test_an_offloaded_engine_leaves_the_gpu_empty_and_comes_back_the_same(small):
    import pyarrow as pa

    from verl.engine import TrainEngine
    from verl.plan import MicroBatching

    config = _config(small)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine = TrainEngine(
        config.actor_rollout_ref.model,
        "policy",
        config.actor_rollout_ref.actor.fsdp_config,
        optim_config=config.actor_rollout_ref.actor.optim,
        device="cuda",
    )
    table = pa.table({"prompt_ids": [[3, 4, 5], [6, 7]], "response_ids": [[8, 9], [10, 11, 1]]})
    first = engine.log_probs(table, temperature=1.0, batching=MicroBatching())["log_probs"]
    engine.offload(params=True, optimizer=True)
    steps = len(list(engine.root.parameters()))  # the optimizer's counts, 512 bytes each by torch's allocator
    assert torch.cuda.memory_allocated() <= before + 512 * steps
    engine.onload(params=True, optimizer=True)
    assert engine.log_probs(table, temperature=1.0, batching=MicroBatching())["log_probs"].equals(first)


def _config(small):
    from verl.config.loading.load import load

    loaded = load(arguments(small, small / "run"))
    assert loaded.config is not None, loaded.problems
    return loaded.config

"""What bare libraries make of a PPO step's work on the same device: tokens a second to hold the step's own against.

Training: transformers on packed rows, as ``train_engine.py`` has it. Generation: ``sglang.Engine.generate`` alone on
the device, with the arguments of the run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROUNDS = 2


def training(model: Path, shape: str, device: str, prompt: int, response: int, micro: int) -> dict[str, float]:
    """``update`` (forward and backward, no optimizer) and ``infer`` (log-prob forward)."""
    script = Path(__file__).parent / "train_engine.py"
    options = ["--shape", shape, "--device", device, "--model", model, "--rounds", str(ROUNDS), "--one", "anchor"]
    options += ["--prompt", str(prompt), "--response", str(response), "--micro", str(micro)]
    found = subprocess.run([sys.executable, script, *options], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def generation(settings: Sequence[str], prompt: int, response: int) -> float:
    """Tokens a second, those of prompts and responses. settings: the run's. The first round, left out, warms up."""
    from rollout_sglang import BareSGLang

    from verl.config.loading.load import load
    from verl.config.sections.models import Config
    from verl.plan import engine_of, plan_run
    from verl.trainer.ppo.engines import engine_settings, vocab_size_of

    config: Config = load(settings).config
    plan = plan_run(config, device=config.trainer.device)
    engine, vocabulary = engine_settings(engine_of(config, plan)), vocab_size_of(config.actor_rollout_ref.model)
    started = time.perf_counter()
    bare = BareSGLang(engine, response)
    bare.wait()
    print(f"bare SGLang took {time.perf_counter() - started:.0f} s to start", file=sys.stderr)
    random, rates = np.random.default_rng(0), []
    for _ in range(ROUNDS + 1):
        rates.append(bare.tokens_per_s(random.integers(5, vocabulary, (plan.trajectories, prompt)).tolist()))
    bare.close()
    return float(np.median(rates[1:])) * (prompt + response) / response

"""A PPO job small enough to run many times: a 2-layer Qwen2 whose tokens are letters, and prompts to answer."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
# Every model leaves the GPU between stages.
OFFLOAD = {
    f"{owner}__{part}_offload": True
    for owner in ("actor_rollout_ref__actor__fsdp_config", "critic__model__fsdp_config")
    for part in ("param", "optimizer")
}
WORDS = ["<pad>", "<eos>", "<unk>", *"0123456789", "#", "+", "=", *"abcdefghijkl"]


def make_model(path: Path, seed: int = 0, **shape: int) -> None:
    """shape: sizes of the config, where they are not the small job's."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    qwen2 = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[]).backend_tokenizer
    letters = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]))
    letters.normalizer, letters.pre_tokenizer, letters.decoder = qwen2.normalizer, qwen2.pre_tokenizer, qwen2.decoder
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **shape,
    }
    config = Qwen2Config(
        **sizes,
        vocab_size=len(WORDS),
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)


def make_prompts(path: Path, count: int, seed: int, length: int = 5) -> None:
    draw = random.Random(seed)
    rows = [
        {
            "data_source": "tests/letters",
            "prompt": [{"role": "user", "content": "".join(draw.choices(WORDS[3:], k=draw.randint(2, length)))}],
            "ability": "none",
            "reward_model": {"style": "rule", "ground_truth": "a"},
            "extra_info": {"index": index},
        }
        for index in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def arguments(small: Path, run: Path, *more: str, **keys: object) -> list[str]:
    """The small job's command line, its keys replaced or added to by ``keys`` (dots written as __) and ``more``."""
    chosen = {
        "data.train_files": small / "train.parquet",
        "data.val_files": small / "val.parquet",
        "data.train_batch_size": 8,
        "data.max_prompt_length": 8,
        "data.max_response_length": 12,
        "actor_rollout_ref.model.path": small / "model",
        "actor_rollout_ref.rollout.name": "hf",
        "actor_rollout_ref.rollout.n": 2,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "critic.optim.lr": 1e-3,
        "custom_reward_function.path": small / "reward.py",
        "reward.num_workers": 1,
        "trainer.total_training_steps": 3,
        "trainer.default_local_dir": run,
        **{name.replace("__", "."): value for name, value in keys.items()},
    }
    return [f"{name}={value}" for name, value in chosen.items()] + list(more)


def start(arguments: list[str], *, script: str | Path | None = None) -> subprocess.CompletedProcess:
    """``python3 -m verl.trainer.main_ppo`` (or a script) in a process of its own."""
    return subprocess.run(command(arguments, script), capture_output=True, text=True, cwd=ROOT)


def command(arguments: list[str], script: str | Path | None = None) -> list[str]:
    return [sys.executable, *([str(script)] if script else ["-m", "verl.trainer.main_ppo"]), *arguments]


def with_tests_folder() -> str:
    """A PYTHONPATH by which processes find the modules that are here, too."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


def wait_for_steps(process: subprocess.Popen, run: Path, steps: int, told: Callable[[], object]) -> None:
    """Until a run that goes on has logged so many. told: what it printed, should it have ended."""
    deadline = time.monotonic() + 240
    while not ((run / "metrics.jsonl").exists() and len(metrics_of(run)) >= steps):
        assert process.poll() is None, told()
        assert time.monotonic() < deadline, "waited 240 s"
        time.sleep(0.05)


def descendant(process: subprocess.Popen, words: str) -> psutil.Process:
    """The one process that it started, or that those did, with these words in its command."""
    deadline = time.monotonic() + 10
    while True:
        commands: dict[psutil.Process, str] = {}
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                commands[child] = " ".join(child.cmdline())
        found = [child for child, command in commands.items() if words in command]
        if len(found) == 1:
            return found[0]
        assert time.monotonic() < deadline, (words, list(commands.values()))
        time.sleep(0.1)


def metrics_of(run: Path) -> list[dict[str, float]]:
    """A dict a step, in order; what was logged after the step (saving) is in it, too."""
    steps: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        steps.setdefault(metrics["step"], {}).update(metrics)
    return [steps[step] for step in sorted(steps)]


def repeatable(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without what a clock or a machine's load has a say in."""
    kept = []
    for step in metrics:
        kept.append({name: value for name, value in step.items() if not name.startswith(("timing_", "perf/"))})
    return kept

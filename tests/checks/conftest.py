"""Data sets and model folders of the right shape, without content: the checks read only footers and headers."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.checks.preflight import check
from verl.config.loading.load import Loaded, load
from verl.findings import Findings
from verl.plan import RunPlan

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def write_parquet(path: Path, rows: int, data_source: str = "openai/gsm8k") -> Path:
    """A data set of GSM8K's columns."""
    table = pa.table(
        {
            "data_source": pa.array([data_source] * rows, pa.string()),
            "prompt": pa.array([[{"role": "user", "content": "1 + 1?"}]] * rows, MESSAGES),
            "ability": pa.array(["math"] * rows, pa.string()),
            "reward_model": pa.array(
                [{"style": "rule", "ground_truth": "2"}] * rows,
                pa.struct([("style", pa.string()), ("ground_truth", pa.string())]),
            ),
        }
    )
    pq.write_table(table, path)
    return path


def write_model(
    folder: Path, *, max_positions: int = 1024, parameters: int = 1000, tokenizer: bool = True, **config: object
) -> Path:
    """config.json (with these entries, too), a safetensors file of so many parameters (a hole in place of their data),
    a tokenizer.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "max_position_embeddings": max_positions, **config})
    )
    weight = {"dtype": "F32", "shape": [parameters, 1], "data_offsets": [0, 4 * parameters]}
    header = json.dumps({"weight": weight, "__metadata__": {"format": "pt"}}).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(file, 8 + len(header) + 4 * parameters)
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def make_parquet() -> Callable[..., Path]:
    return write_parquet


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    return write_model


@pytest.fixture(scope="session")
def gsm8k(tmp_path_factory) -> Path:
    """A folder with train.parquet and test.parquet of GSM8K's row counts."""
    folder = tmp_path_factory.mktemp("gsm8k")
    write_parquet(folder / "train.parquet", 7473)
    write_parquet(folder / "test.parquet", 1319)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def load_run(gsm8k, model, tmp_path) -> Callable[..., Loaded]:
    """A run on one CPU in which nothing is wrong, with the given overrides on top (a later one wins)."""
    base = {
        "data.train_files": gsm8k / "train.parquet",
        "data.val_files": gsm8k / "test.parquet",
        "data.train_batch_size": 64,
        "data.max_prompt_length": 256,
        "data.max_response_length": 256,
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.rollout.name": "hf",
        "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 8,
        "critic.model.path": model,
        "trainer.device": "cpu",
        "trainer.default_local_dir": tmp_path / "run",
    }

    def load_with(*overrides: str) -> Loaded:
        changed = {override.partition("=")[0].lstrip("+~") for override in overrides}
        kept = [f"{key}={value}" for key, value in base.items() if key not in changed]
        return load([*kept, *overrides])

    return load_with


@pytest.fixture
def checked(load_run) -> Callable[..., tuple[RunPlan, Findings]]:
    """The same run's plan and findings, as a real run would get them."""

    def run(*overrides: str, dry_run: bool = False) -> tuple[RunPlan, Findings]:
        return check(load_run(*overrides), dry_run=dry_run)

    return run

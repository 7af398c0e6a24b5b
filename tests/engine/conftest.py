"""Tiny random models of real architectures, ragged tables, and plain-transformers references."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers

from verl.data.ragged import Ragged
from verl.engine import Batching, TrainEngine

VOCAB = 97


@dataclass
class Settings:
    """Builds engines with the settings of a test; unnamed ones are the usual."""

    path: str
    kind: str = "policy"
    model: dict[str, Any] = field(default_factory=dict)
    fsdp: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] | None = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)

    def build(self) -> TrainEngine:
        model = {
            "path": self.path,
            "trust_remote_code": False,
            "enable_gradient_checkpointing": False,
            "attn_implementation": None,
            "override_config": {},
        }
        fsdp = {"fsdp_size": -1, "reshard_after_forward": True, "dtype": "auto"}
        optim = {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "weight_decay": 0.01,
            "eps": 1e-8,
            "lr_warmup_steps": -1,
            "lr_warmup_steps_ratio": 0.0,
            "lr_scheduler_type": "constant",
            "min_lr_ratio": 0.0,
        }
        return TrainEngine(
            SimpleNamespace(**(model | self.model)),
            self.kind,
            SimpleNamespace(**(fsdp | self.fsdp)),
            optim_config=None if self.optim is None else SimpleNamespace(**(optim | self.optim)),
            **({"total_steps": 10, "device": "cpu", "seed": 0} | self.engine),
        )


def save_tiny_model(folder: Path, arch: str = "qwen2", tied: bool = False, dtype: torch.dtype = torch.float32) -> str:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config_class = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}[arch]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config_class(**shape), dtype=torch.float32)
    model.to(dtype).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session", params=["qwen2-untied", "qwen2-tied", "llama-untied", "llama-tied"])
def any_tiny(request, tmp_path_factory) -> str:
    arch, tied = request.param.split("-")
    return save_tiny_model(tmp_path_factory.mktemp(request.param), arch, tied == "tied")


def make_table(rows: int = 7, seed: int = 0, empty_row: int | None = None) -> pa.Table:
    """Rows of very different lengths with the columns of a policy and of a value update."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCAB, rng.integers(1, 9)) for _ in range(rows)]
    responses = [rng.integers(3, VOCAB, 0 if row == empty_row else rng.integers(1, 14)) for row in range(rows)]
    response = Ragged.from_rows(responses, np.int32)
    count = len(response.values)
    mask = (rng.random(count) < 0.8).astype(np.int8)

    def numbers(scale: float = 1.0) -> pa.ListArray:
        return response.like((rng.standard_normal(count) * scale).astype(np.float32)).to_column()

    return pa.table(
        {
            "uid": [f"row-{row}" for row in range(rows)],
            "prompt_ids": Ragged.from_rows(prompts, np.int32).to_column(),
            "response_ids": response.to_column(),
            "response_mask": response.like(mask).to_column(),
            "advantages": numbers(),
            "old_log_probs": numbers(0.1),
            "returns": numbers(),
            "loss_weights": response.like((mask / max(mask.sum(), 1)).astype(np.float32)).to_column(),
        }
    )


def policy_loss(outputs, batch):
    """Weighted policy gradient with an entropy bonus: exercises both outputs."""
    weights = batch["loss_weights"]
    loss = -(weights * (batch["advantages"] * outputs["log_probs"] + 0.1 * outputs["entropy"])).sum()
    return loss, {"loss": loss.detach(), "tokens": batch["response_mask"].sum()}


def value_loss(outputs, batch):
    loss = (batch["loss_weights"] * (outputs["values"] - batch["returns"]).square()).sum()
    return loss, {"loss": loss.detach()}


ALL = Batching()


def weights_of(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.weights()}

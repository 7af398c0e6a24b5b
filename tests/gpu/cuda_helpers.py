"""A model that takes a GPU milliseconds, rows for it, and a loss of all that it gives."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import transformers

from verl.data.ragged import Ragged
from verl.plan import MicroBatching

BATCHING = MicroBatching(max_tokens=600)
VOCAB = 1000


SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 64}


def save_model(folder: Path, *, experts: bool = False, vocab_size: int = VOCAB) -> str:
    """Qwen2, or Qwen3's mixture of experts."""
    shape = SHAPE | {"vocab_size": vocab_size}
    config = transformers.Qwen3MoeConfig(**shape, **EXPERTS) if experts else transformers.Qwen2Config(**shape)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def table() -> pa.Table:
    random = np.random.default_rng(0)
    prompts = [random.integers(3, VOCAB, random.integers(1, 60)) for _ in range(24)]
    response = Ragged.from_rows([random.integers(3, VOCAB, random.integers(1, 200)) for _ in range(24)], np.int32)
    weights = random.standard_normal(len(response.values)).astype(np.float32) / len(response.values)
    columns = {"response_ids": response, "loss_weights": response.like(weights)}
    prompt_ids = Ragged.from_rows(prompts, np.int32)
    return pa.table({name: each.to_column() for name, each in ({"prompt_ids": prompt_ids} | columns).items()})


def loss(outputs, batch):
    value = -(batch["loss_weights"] * (outputs["log_probs"] + 0.1 * outputs["entropy"])).sum()
    return value, {"loss": value.detach()}

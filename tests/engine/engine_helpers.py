"""Tiny random models of real architectures, ragged tables, plain references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers

from verl.config.sections.parts import FSDPConfig, ModelConfig, OptimConfig
from verl.data.ragged import Ragged
from verl.engine import TrainEngine
from verl.plan import MicroBatching

VOCAB = 97
ALL = MicroBatching()


def save_tiny_model(folder: Path, arch: str = "qwen2", tied: bool = False) -> str:
    """Large weights, so that distributions are far from uniform; head_dim 32."""
    config_class = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}[arch]
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def build(
    path: str,
    kind: str = "policy",
    *,
    trained: bool = True,
    dtype: str = "float32",
    checkpointing: bool = False,
    fsdp_size: int = -1,
    reshard_after_forward: bool = True,
    grad_clip: float | None = 1.0,
    total_steps: int = 10,
    seed: int = 0,
    override_config: dict[str, Any] | None = None,
    packed: bool = False,
    **optim: Any,
) -> TrainEngine:
    """packed: although there is no kernel for it on a CPU (``verl.engine.attention`` takes sequences one by one)."""
    model = ModelConfig(path=path, enable_gradient_checkpointing=checkpointing, override_config=override_config or {})
    engine = TrainEngine(
        model,
        kind,
        FSDPConfig(fsdp_size=fsdp_size, reshard_after_forward=reshard_after_forward, dtype=dtype),
        optim_config=OptimConfig(**{"lr": 1e-3, **optim}) if trained else None,
        grad_clip=grad_clip,
        total_steps=total_steps,
        device="cpu",
        seed=seed,
    )
    engine.packed = packed
    return engine


def make_table(rows: int = 7, empty_rows: tuple[int, ...] = (2,)) -> pa.Table:
    """Rows of very different lengths, with the columns of a policy and of a value update."""
    rng = np.random.default_rng(rows)
    prompts = [rng.integers(3, VOCAB, rng.integers(1, 9)) for _ in range(rows)]
    responses = [rng.integers(3, VOCAB, 0 if row in empty_rows else rng.integers(1, 14)) for row in range(rows)]
    response = Ragged.from_rows(responses, np.int32)
    mask = (rng.random(len(response.values)) < 0.8).astype(np.int8)

    def noise(scale: float) -> pa.ListArray:
        return response.like((rng.standard_normal(len(mask)) * scale).astype(np.float32)).to_column()

    return pa.table(
        {
            "uid": [f"row-{row}" for row in range(rows)],
            "prompt_ids": Ragged.from_rows(prompts, np.int32).to_column(),
            "response_ids": response.to_column(),
            "response_mask": response.like(mask).to_column(),
            "advantages": noise(1.0),
            "returns": noise(1.0),
            "loss_weights": response.like((mask / mask.sum()).astype(np.float32)).to_column(),
        }
    )


def policy_loss(outputs, batch):
    """A weighted policy gradient with an entropy bonus: exercises both outputs."""
    weights = batch["loss_weights"]
    loss = -(weights * (batch["advantages"] * outputs["log_probs"] + 0.1 * outputs["entropy"])).sum()
    return loss, {"loss": loss.detach(), "tokens": batch["response_mask"].sum()}


def value_loss(outputs, batch):
    loss = (batch["loss_weights"] * (outputs["values"] - batch["returns"]).square()).sum()
    return loss, {"loss": loss.detach(), "tokens": batch["response_mask"].sum()}


LOSSES = {"policy": policy_loss, "value": value_loss}


def reference_loss(kind: str, hf: transformers.PreTrainedModel, table: pa.Table) -> torch.Tensor:
    """The same losses, row by row, through transformers' own forward."""
    loss = torch.zeros(())
    for row in table.to_pylist():
        if not row["response_ids"]:
            continue
        logits = hf(torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0]
        logits = logits[len(row["prompt_ids"]) - 1 : -1]
        weights = torch.tensor(row["loss_weights"])
        if kind == "value":
            loss = loss + (weights * (logits[:, 0] - torch.tensor(row["returns"])).square()).sum()
            continue
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        chosen = log_probs[torch.arange(len(weights)), torch.tensor(row["response_ids"])]
        loss = loss - (weights * (torch.tensor(row["advantages"]) * chosen + 0.1 * entropy)).sum()
    return loss


def weights_of(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.weights()}


def state_of(engine: TrainEngine, folder: Path) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds, as plain tensors (one process)."""
    from safetensors.torch import load_file

    engine.save(folder)
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)

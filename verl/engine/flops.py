"""Floating point operations of a forward, and the peak of the device, for model FLOPs utilisation (arXiv:2204.02311).
Recomputation does not count."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from torch import nn

# Dense bfloat16 operations a second by a part of the device's name, from the vendor's data sheets (the SXM variant).
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


class ForwardFlops:
    """Counts two operations per token and weight, and four per (query, key) pair, head and dimension."""

    def __init__(self, hf: transformers.PreTrainedModel):
        config = hf.config.get_text_config()
        head = hf.get_output_embeddings() or getattr(hf, "score", None)
        self.head = 0 if head is None else head.weight.numel()
        layers = sum(_weights(module, config) for module in hf.base_model.modules())
        self.body = int(layers)
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.attention = config.num_hidden_layers * heads * head_dim

    def __call__(self, lengths: np.ndarray, predicted: np.ndarray) -> float:
        """Operations of a forward with causal attention. Sliding windows are counted as full attention.

        lengths: tokens of each sequence.
        predicted: tokens of each sequence that go through the head.
        """
        pairs = (lengths.astype(np.float64) * (lengths + 1) / 2).sum()
        return float(2.0 * (self.body * lengths.sum() + self.head * predicted.sum()) + 4.0 * self.attention * pairs)


def _weights(module: nn.Module, config: transformers.PreTrainedConfig) -> float:
    """Weights that multiply a token: all of a linear layer; the active ones of fused experts (E, ..., ...)."""
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    experts = [param for param in module.parameters(recurse=False) if param.ndim == 3]
    return sum(param.numel() * config.num_experts_per_tok / param.shape[0] for param in experts)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak operations a second; 0 if unknown."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), 0.0)

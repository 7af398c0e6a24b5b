"""What a forward costs in floating point operations, and what the device could do at most: for the share between them
(model FLOPs utilisation, arXiv:2204.02311), in which nothing that is computed twice counts twice."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from torch import nn

# Dense bfloat16 matrix products a second, by what the device's name contains (vendor's data sheets, SXM where there is
# a choice).
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
    """Two for each weight that a token is multiplied with, and four for each (query, key) pair, head and dimension."""

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
        """lengths: tokens of each sequence. predicted: those of them that go through the head. Causal attention, over
        all earlier tokens: a sliding window is not taken off."""
        pairs = (lengths.astype(np.float64) * (lengths + 1) / 2).sum()
        return float(2.0 * (self.body * lengths.sum() + self.head * predicted.sum()) + 4.0 * self.attention * pairs)


def _weights(module: nn.Module, config: transformers.PreTrainedConfig) -> float:
    """Of a linear layer all; of fused experts (E, ..., ...) those that a token goes through."""
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    experts = [param for param in module.parameters(recurse=False) if param.ndim == 3]
    return sum(param.numel() * config.num_experts_per_tok / param.shape[0] for param in experts)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """A second; 0 where it is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), 0.0)

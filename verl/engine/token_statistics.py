"""Log-probabilities and entropy from hidden states, without a (tokens, vocabulary) tensor.

Logits exist one block at a time, and the backward recomputes each block. Forward and backward read a block once: the
forward saves two numbers per token, which are enough for the gradient of each logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

# Elements of one (tokens, vocabulary) block, by type of device.
BLOCK = {"cpu": 1 << 27, "cuda": 1 << 29}


def token_statistics(
    hidden: torch.Tensor,
    head: nn.Linear,
    targets: torch.Tensor,
    temperature: float,
    entropy: bool,
    block: int | None = None,
    fused: bool = False,
) -> dict[str, torch.Tensor]:
    """``log_probs`` of ``log_softmax(logits / temperature)`` at the targets and, if wanted, ``entropy`` of that
    distribution in nats: float32 (T,) each.

    hidden: (T, H).
    targets: int64 (T,).
    block: logits in memory at a time; None for the default of the device.
    fused: whether torch compiles the work on a block.
    """
    block = BLOCK[hidden.device.type] if block is None else block
    tokens = max(1, block // head.weight.shape[0])
    log_probs, entropies = _TokenStatistics.apply(
        hidden, head.weight, head.bias, targets, temperature, entropy, tokens, fused
    )
    return {"log_probs": log_probs, "entropy": entropies} if entropy else {"log_probs": log_probs}


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, temperature, entropy, tokens, fused):
        measure: Callable[..., Any] = compiled(_measure) if fused else _measure
        log_probs, log_sums, entropies = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        for part in _parts(len(hidden), tokens):
            logits = nn.functional.linear(hidden[part], weight, bias)
            log_probs[part], log_sums[part], entropies[part] = measure(logits, targets[part], temperature, entropy)
        ctx.save_for_backward(hidden, weight, bias, targets, log_sums, entropies)
        ctx.options = temperature, entropy, tokens, fused
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        hidden, weight, bias, targets, log_sums, entropies = ctx.saved_tensors
        temperature, entropy, tokens, fused = ctx.options
        differentiate: Callable[..., Any] = compiled(_differentiate) if fused else _differentiate
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        to_hidden = torch.empty_like(hidden) if needs_hidden else None
        parts = list(_parts(len(hidden), tokens))
        to_weight = _Sum(weight, len(parts)) if needs_weight else None
        to_bias = _Sum(bias, len(parts)) if needs_bias else None
        for part in parts:
            logits = nn.functional.linear(hidden[part], weight, bias)
            rows = (each[part] for each in (targets, log_sums, entropies, *gradients))
            to_logits = differentiate(logits, *rows, temperature, entropy)
            if to_hidden is not None:
                torch.mm(to_logits, weight, out=to_hidden[part])
            if to_weight is not None:
                to_weight.add(to_logits.t() @ hidden[part])
            if to_bias is not None:
                to_bias.add(to_logits.sum(0))
        sums = (None if each is None else each.total() for each in (to_weight, to_bias))
        return to_hidden, *sums, None, None, None, None, None


class _Sum:
    """A parameter's gradient summed over blocks, in float32 if there are several."""

    def __init__(self, parameter: torch.Tensor, parts: int):
        self.dtype = parameter.dtype
        self.sum = torch.zeros_like(parameter, dtype=torch.float32) if parts > 1 else None

    def add(self, gradient: torch.Tensor) -> None:
        self.sum = gradient if self.sum is None else self.sum.add_(gradient)

    def total(self) -> torch.Tensor:
        assert self.sum is not None
        return self.sum.to(self.dtype)


def _measure(logits, targets, temperature: float, entropy: bool):
    """Log-probs at the targets, log-sum-exps, and entropies (zeros unless wanted) of logits (n, V): (n,) each."""
    scaled = logits.float() / temperature
    log_sums = scaled.logsumexp(-1)
    log_probs = scaled.gather(-1, targets[:, None]).squeeze(-1) - log_sums
    if not entropy:
        return log_probs, log_sums, torch.zeros_like(log_sums)
    shifted = scaled - log_sums[:, None]
    return log_probs, log_sums, -(shifted.exp() * shifted).sum(-1)


def _differentiate(logits, targets, log_sums, entropies, to_log_probs, to_entropies, temperature: float, entropy: bool):
    """The gradient of the logits (n, V), in their dtype.

    With s the scaled logits, p = exp(s - log-sum) and H the entropy:
    d log p[y] / ds = [v = y] - p, and dH / ds = -p (log p + H).
    """
    shifted = logits.float() / temperature - log_sums[:, None]
    probs = shifted.exp()
    is_target = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    to_scaled = to_log_probs[:, None] * (is_target.float() - probs)
    if entropy:
        to_scaled = to_scaled - to_entropies[:, None] * probs * (shifted + entropies[:, None])
    return (to_scaled / temperature).to(logits.dtype)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _parts(length: int, size: int) -> Iterator[slice]:
    """As few as will do, all of about the same length: a last one of a single row would be compiled anew."""
    size = max(1, -(-length // -(-length // size))) if length else size
    return (slice(start, min(start + size, length)) for start in range(0, length, size))

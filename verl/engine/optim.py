"""AdamW over the masters, with clipping, a learning-rate schedule and refusal of non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from verl.engine.distributed import full

if TYPE_CHECKING:
    from verl.config.parts import OptimConfig


class Optimizer:
    """Decoupled weight decay (arXiv:1711.05101) on every parameter. Its state exists from the start.

    steps: of the schedule, which counts PPO iterations, not updates.
    """

    def __init__(
        self, masters: Mapping[str, nn.Parameter], config: OptimConfig, grad_clip: float | None, total_steps: int
    ):
        self.masters, self.config, self.grad_clip, self.total_steps = masters, config, grad_clip, total_steps
        self.warmup_steps = warmup_steps(config, total_steps)
        self.steps = 0
        self.adamw = torch.optim.AdamW(
            list(masters.values()),
            lr=self.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        for master in masters.values():
            self.adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    @property
    def lr(self) -> float:
        factor = lr_factor(
            self.steps,
            self.config.lr_scheduler_type,
            warmup=self.warmup_steps,
            total=self.total_steps,
            floor=self.config.min_lr_ratio,
        )
        return self.config.lr * factor

    def step(self) -> tuple[float, bool]:
        """One step on the accumulated gradients, which are then dropped. Gives their norm before clipping, and whether
        a step was made: with a gradient that is not finite neither parameters nor state change."""
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        norm = full(get_total_norm(gradients))
        stepped = bool(torch.isfinite(norm))
        if stepped:
            if self.grad_clip is not None:
                clip_grads_with_norm_(self.masters.values(), self.grad_clip, norm)
            self.adamw.param_groups[0]["lr"] = self.lr
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return float(norm), stepped

    def step_schedule(self) -> None:
        self.steps += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state by name: ``exp_avg.<parameter>``, ``exp_avg_sq.<parameter>``, ``step.<parameter>``."""
        return {
            f"{key}.{name}": value
            for name, master in self.masters.items()
            for key, value in self.adamw.state[master].items()
        }


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """``lr_warmup_steps``, or, while that is negative, ``lr_warmup_steps_ratio`` of all steps."""
    if config.lr_warmup_steps >= 0:
        return config.lr_warmup_steps
    return int(config.lr_warmup_steps_ratio * total_steps)


def lr_factor(step: int, kind: str, *, warmup: int, total: int, floor: float) -> float:
    """Share of the learning rate at a step counted from 0: linear from 0 over ``warmup`` steps, then constant, or down
    to ``floor`` at step ``total`` in a line or half a cosine. The same numbers as transformers' schedules."""
    if step < warmup:
        return step / warmup
    progress = min((step - warmup) / max(1, total - warmup), 1.0)
    match kind:
        case "constant":
            return 1.0
        case "linear":
            return floor + (1 - floor) * (1 - progress)
        case "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"unknown lr_scheduler_type {kind!r}: constant, linear or cosine")

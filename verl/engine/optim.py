"""AdamW over the master weights, with gradient clipping and a learning-rate schedule. Skips non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from verl.engine.distributed import full
from verl.engine.offload import Copies, give_storage, local, through_device
from verl.engine.precision import MasterWeights

if TYPE_CHECKING:
    from verl.config.sections.parts import OptimConfig

BUCKET = 1 << 30  # bytes of state that are streamed through the device together


class Optimizer:
    """AdamW with decoupled weight decay (arXiv:1711.05101) on every parameter. Its state is created at once.

    steps: position in the schedule, which counts PPO iterations, not updates.
    """

    def __init__(
        self,
        masters: MasterWeights,
        config: OptimConfig,
        grad_clip: float | None,
        total_steps: int,
        home: torch.device,
    ):
        """home: the device on which the moments are created."""
        self.masters, self.config, self.grad_clip, self.total_steps = masters, config, grad_clip, total_steps
        self.warmup_steps = warmup_steps(config, total_steps)
        self.steps = 0
        self.state = {
            "exp_avg": {name: _zeros(master, home) for name, master in masters.by_name.items()},
            "exp_avg_sq": {name: _zeros(master, home) for name, master in masters.by_name.items()},
            "step": {name: torch.zeros((), device=param.device) for name, param in masters.params.items()},
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

    @torch.no_grad()
    def step(self, copies: Copies | None = None) -> tuple[float, bool]:
        """Makes one step on the accumulated gradients and drops them.

        Returns the gradients' norm before clipping, and whether a step was made. If a gradient is not finite, neither
        parameters nor state change.

        copies: given if some of ``movable`` is on the host. It is then streamed through the device, ``BUCKET`` bytes at
            a time.
        """
        gradients = self.masters.gradients()
        norm = full(get_total_norm(list(gradients.values())))
        stepped = bool(torch.isfinite(norm))
        if stepped:
            if self.grad_clip is not None:
                factor = (self.grad_clip / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
                torch._foreach_mul_([local(gradient) for gradient in gradients.values()], factor)
            if copies is None:
                self._adamw(list(gradients), *(list(map(local, kind)) for kind in self._tensors_of(gradients)))
                self.masters.copy_to_params()
            else:
                self._step_through_device(list(gradients), copies)
        self.masters.drop_gradients()
        return float(norm), stepped

    def _step_through_device(self, names: list[str], copies: Copies) -> None:
        buckets = _buckets(names, {name: 3 * local(self.masters.by_name[name]).nbytes for name in names})

        def work(number: int, tensors: list[torch.Tensor]) -> None:
            bucket = buckets[number]
            masters, exp_avg, exp_avg_sq = self._split(bucket, tensors)
            self._adamw(bucket, masters, exp_avg, exp_avg_sq)
            self.masters.copy_to_params(dict(zip(bucket, masters, strict=True)))

        through_device([list(map(local, self._on_host(bucket))) for bucket in buckets], copies, work)

    def _on_host(self, names: Sequence[str]) -> list[torch.Tensor]:
        """The tensors of these parameters that are on the host while the optimizer is offloaded."""
        masters, exp_avg, exp_avg_sq = self._tensors_of(names)
        return [*masters, *exp_avg, *exp_avg_sq] if self.masters.separate else [*exp_avg, *exp_avg_sq]

    def _split(self, names: Sequence[str], tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Splits ``tensors``, in the order of ``_on_host``, into masters, exp_avg, exp_avg_sq."""
        if not self.masters.separate:
            tensors = [*(local(self.masters.by_name[name]) for name in names), *tensors]
        size = len(names)
        return [tensors[:size], tensors[size : 2 * size], tensors[2 * size :]]

    def _tensors_of(self, names: Iterable[str]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        kinds = (self.masters.by_name, self.state["exp_avg"], self.state["exp_avg_sq"])
        masters, exp_avg, exp_avg_sq = ([kind[name] for name in names] for kind in kinds)
        return masters, exp_avg, exp_avg_sq

    def _adamw(self, names: list[str], masters: list, exp_avg: list, exp_avg_sq: list) -> None:
        gradients = self.masters.gradients()
        adamw(
            masters,
            [local(gradients[name]) for name in names],
            exp_avg,
            exp_avg_sq,
            [],
            [self.state["step"][name] for name in names],
            fused=True,
            amsgrad=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=self.lr,
            weight_decay=self.config.weight_decay,
            eps=self.config.eps,
            maximize=False,
        )

    def step_schedule(self) -> None:
        self.steps += 1

    def movable(self) -> list[torch.Tensor]:
        """The tensors that ``optimizer_offload`` moves: the moments and separate master weights."""
        return self._on_host(list(self.masters.by_name))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer state by name: ``exp_avg.<parameter>``, ``exp_avg_sq.<parameter>``, ``step.<parameter>``."""
        return {f"{key}.{name}": value for key, values in self.state.items() for name, value in values.items()}


def _zeros(master: torch.Tensor, home: torch.device) -> torch.Tensor:
    zeros = torch.zeros_like(master)
    give_storage(zeros, local(zeros).to(home))
    return zeros


def _buckets(names: Sequence[str], sizes: Mapping[str, int]) -> list[list[str]]:
    buckets: list[list[str]] = []
    room = 0
    for name in names:
        if not buckets or sizes[name] > room:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(name)
        room -= sizes[name]
    return buckets


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """``lr_warmup_steps``; if that is negative, ``lr_warmup_steps_ratio`` of all steps."""
    if config.lr_warmup_steps >= 0:
        return config.lr_warmup_steps
    return int(config.lr_warmup_steps_ratio * total_steps)


def lr_factor(step: int, kind: str, *, warmup: int, total: int, floor: float) -> float:
    """The factor of the learning rate at a step counted from 0. Equals transformers' schedules.

    It rises linearly from 0 over ``warmup`` steps. Then it is constant, or falls to ``floor`` at step ``total``,
    linearly or along half a cosine.
    """
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

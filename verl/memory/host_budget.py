"""The host memory that a run needs on each machine, computed from sizes and settings before a model is built.

A model with AdamW takes, in bytes a parameter (``verl/engine/precision.py``, ``optim.py``, ``offload.py``):

                                param_offload   optimizer_offload
    one device, bfloat16              2         12: float32 masters, two moments
    one device, float32               4          8: two moments
    several devices                   4          8: the float32 shards are their own masters
    not trained                     2 or 4       -

On a CPU nothing is offloaded: all of it is in host memory all the time, and float32 gradients during an update. Memory
of the processes themselves, of the rollout engine and of samples is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Literal

from verl.machine import resolve_dtype
from verl.plan import ModelSize, RunPlan
from verl.units import gigabytes

if TYPE_CHECKING:
    from verl.config.sections.models import Config, FSDPConfig, SFTConfig

WIDTHS = {"float32": 4, "bfloat16": 2}  # bytes
# Bytes of a rank while its optimizer state moves to the host, and while it writes a checkpoint. The same values as in
# verl/engine, which imports torch.
PIECE, FILES = 1 << 30, 2 << 30

FSDP = {
    "actor": "actor_rollout_ref.actor.fsdp_config",
    "critic": "critic.model.fsdp_config",
    "reference": "actor_rollout_ref.ref.fsdp_config",
    "reward": "reward_model.model.fsdp_config",
}


@dataclass(frozen=True)
class Model:
    """A model to be built.

    section: key of its FSDP settings.
    exports: whether checkpoints also hold it as a Hugging Face folder.
    """

    role: str
    section: str
    settings: FSDPConfig
    size: ModelSize
    trained: bool
    exports: bool = False


@dataclass(frozen=True)
class Devices:
    """The devices of the run; every model is on all of them."""

    kind: Literal["cpu", "cuda"]
    nnodes: int = 1
    per_node: int = 1

    @property
    def count(self) -> int:
        return self.nnodes * self.per_node


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of one model in the host memory of one machine, over all its ranks.

    weights, optimizer: permanent.
    building: while it is built, on top of the models built before.
    gradients: while it is updated, on top of what all models hold.
    exporting: while it is exported, on top of what all models hold.
    """

    role: str
    section: str
    weights: int
    optimizer: int
    gradients: int
    building: int
    exporting: int

    @property
    def kept(self) -> int:
        return self.weights + self.optimizer


@dataclass(frozen=True)
class HostBudget:
    """The host memory of one machine.

    models: in the order in which they are built.
    saving: bytes while a checkpoint is written.
    """

    models: tuple[ModelMemory, ...]
    saving: int

    @property
    def kept(self) -> int:
        return sum(model.kept for model in self.models)

    def __str__(self) -> str:
        most, when = self.most()
        beyond = f"; at most {gigabytes(most)}, {when}" if most > self.kept else ""
        return f"about {gigabytes(self.kept)} for good{beyond}"

    def most(self) -> tuple[int, str]:
        """The peak in bytes, and when it occurs."""
        moments = [(self.kept, "between stages")]
        before = 0
        for model in self.models:
            moments.append((before + model.building, f"while the {model.role} is built"))
            moments.append((self.kept + model.gradients, f"while the {model.role} is updated"))
            moments.append((self.kept + model.exporting, f"while the {model.role} is exported"))
            before += model.kept
        moments.append((self.kept + self.saving, "while a checkpoint is written"))
        return max(moments, key=lambda moment: moment[0])


def budget_of(models: Sequence[Model], devices: Devices, *, saves: bool, node: int = 0) -> HostBudget:
    """The budget of machine number ``node``. The first one also holds whole models for a while.

    saves: whether checkpoints are written.
    """
    held = tuple(_memory_of(model, devices, first=node == 0) for model in models)
    state = max((devices.per_node * _share(model, devices) * 12 for model in models if model.trained), default=0)
    return HostBudget(held, min(2 * int(state), FILES * devices.per_node) if saves else 0)


def _memory_of(model: Model, devices: Devices, first: bool) -> ModelMemory:
    on_cpu, alone = devices.kind == "cpu", devices.count == 1
    computed = resolve_dtype(model.settings.dtype, devices.kind)
    separate = model.trained and computed != "float32" and alone  # master weights are a copy
    here = devices.per_node * _share(model, devices)
    read = "float32" if model.trained else computed
    mapped = model.size.dtype in (None, read)  # then weights are mapped pages of the files, which need no memory
    whole = 0 if mapped or not first else model.size.parameters * WIDTHS[read]
    weights = optimizer = 0
    if (on_cpu and not (mapped and alone and not model.trained)) or (model.settings.param_offload and not on_cpu):
        weights = int(here * (WIDTHS[computed] if separate or not model.trained else 4))
    if model.trained and (on_cpu or model.settings.optimizer_offload):
        optimizer = int(here * (12 if separate else 8))
    moving = 0 if on_cpu else min(optimizer, PIECE * devices.per_node)
    exports = model.exports and first and not (on_cpu and alone)
    return ModelMemory(
        model.role,
        model.section,
        weights,
        optimizer,
        gradients=int(here * 4) if on_cpu and model.trained else 0,
        building=max(whole + (weights if on_cpu and not alone else 0), optimizer + moving),
        exporting=model.size.parameters * WIDTHS[computed] if exports else 0,
    )


def _share(model: Model, devices: Devices) -> float:
    """The number of its parameters that one rank holds."""
    size = model.settings.fsdp_size
    return model.size.parameters / (size if 0 < size < devices.count else devices.count)


def fsdp_settings(config: Config) -> dict[str, FSDPConfig]:
    """FSDP settings by role, also of roles that the run does not build."""
    return {role: reduce(getattr, section.split("."), config) for role, section in FSDP.items()}  # type: ignore[misc]


def budget_of_run(config: Config, plan: RunPlan, node: int = 0) -> HostBudget | None:
    """The budget of a PPO run; None if the size of a model is unknown."""
    if plan.roles.keys() - plan.models.keys():
        return None
    settings = fsdp_settings(config)
    trained = {"actor": config.actor_rollout_ref.actor.checkpoint, "critic": config.critic.checkpoint}
    models = [
        Model(
            role,
            FSDP[role],
            settings[role],
            plan.models[role],
            trained=role in trained,
            exports=plan.save_freq > 0 and role in trained and "hf_model" in trained[role].save_contents,
        )
        for role in plan.roles
    ]
    devices = Devices(plan.device, plan.nnodes, plan.devices_per_node)
    return budget_of(models, devices, saves=plan.save_freq > 0, node=node)


def budget_of_sft(config: SFTConfig, size: ModelSize, kind: Literal["cpu", "cuda"]) -> HostBudget:
    """The budget of an SFT run: one model on one device. Its weights are never offloaded."""
    settings = config.fsdp_config.model_copy(update={"param_offload": False})
    return budget_of([Model("model", "fsdp_config", settings, size, trained=True)], Devices(kind), saves=True)

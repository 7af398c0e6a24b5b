"""One rank of a PPO job: the models it trains and what the trainer asks of them. One process holds them all."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch

from verl.algorithms.loss_modes import resolve
from verl.algorithms.losses import policy_loss, value_loss
from verl.config.sections.models import ActorConfig, Config, CriticConfig, ModelConfig
from verl.data.schema import with_columns
from verl.data.tokenizer import load_tokenizer
from verl.engine import TrainEngine
from verl.engine.model import Kind
from verl.memory.device_memory import SPARE, Peak
from verl.memory.host_budget import fsdp_settings
from verl.plan import RunPlan
from verl.rollout.contract.base import MemoryTag
from verl.trainer.ppo.metrics import StageCost, memory_metrics

# The columns that a method reads of its rows, where the table has them.
SEQUENCES = ("prompt_ids", "response_ids")
READS = {
    "old_log_probs": SEQUENCES,
    "log_probs_at": SEQUENCES,
    "ref_log_probs": SEQUENCES,
    "values": SEQUENCES,
    "reward_scores": SEQUENCES,
    "update_actor": (
        *SEQUENCES,
        "response_mask",
        "loss_weights",
        "advantages",
        "old_log_probs",
        "ref_log_probs",
        "rollout_is_weights",
    ),
    "update_critic": (*SEQUENCES, "response_mask", "loss_weights", "values", "returns"),
}


def reads_of(config: Config) -> dict[str, tuple[str, ...]]:
    """``READS``, with the columns that the run's policy loss reads."""
    columns = resolve(config.actor_rollout_ref.actor.policy_loss.loss_mode).columns
    return READS | {"update_actor": (*READS["update_actor"], *columns)}


class PPOWorker:
    """Roles: "actor", "critic", "reference" and "reward", those that the plan builds.

    A role whose switches say so lives in host memory between stages: ``load`` brings it to the device for a stage,
    ``unload`` takes it away again, and says what the stage took.
    """

    def __init__(self, config: Config, plan: RunPlan):
        self.config, self.plan = config, plan
        self.temperature = config.actor_rollout_ref.rollout.temperature
        self.token_loss = resolve(config.actor_rollout_ref.actor.policy_loss.loss_mode).load()
        self.fsdp_configs = fsdp_settings(config)
        self.engines: dict[str, TrainEngine] = {}
        self._stages: dict[str, tuple[Peak, float]] = {}  # those that go on, by role: and the engine's flops before
        for role in plan.roles:
            self.engines[role] = self._build(role)
            self._offload(role)
        if plan.device == "cuda":  # what was imported and built stays: free_memory's collections need not go through it
            gc.collect()
            gc.freeze()

    def _build(self, role: str) -> TrainEngine:
        trained: dict[str, ActorConfig | CriticConfig] = {
            "actor": self.config.actor_rollout_ref.actor,
            "critic": self.config.critic,
        }
        settings = trained.get(role)
        return TrainEngine(
            *model_of(self.config, role),
            self.fsdp_configs[role],
            optim_config=settings.optim if settings else None,
            grad_clip=settings.grad_clip if settings else None,
            total_steps=self.plan.total_steps or 1,
            device=self.plan.device,
            seed=self.config.trainer.seed,
        )

    def unpackable(self) -> dict[str, str]:
        """The roles whose sequences are padded on a GPU although packing was asked for, each with the reason."""
        if self.plan.device == "cpu":
            return {}
        return {role: engine.unpackable for role, engine in self.engines.items() if engine.unpackable}

    # ---- memory

    def load(self, role: str, optimizer: bool = False) -> None:
        engine = self.engines[role]
        self._stages[role] = Peak(engine.device), engine.flops
        engine.onload(params=True, optimizer=optimizer)

    def unload(self, role: str, needed: bool = False) -> StageCost:
        """needed: the parameters stay, for what comes next loads them anyway."""
        engine, (peak, flops) = self.engines[role], self._stages.pop(role)
        self._offload(role, needed)
        return StageCost(flops=engine.flops - flops, peak_flops=engine.peak_flops, memory=peak.bytes)

    def _offload(self, role: str, needed: bool = False) -> None:
        engine, switches = self.engines[role], self.fsdp_configs[role]
        engine.offload(params=switches.param_offload and not needed, optimizer=switches.optimizer_offload)
        if switches.param_offload and needed:
            engine.copy_to_host()

    @contextmanager
    def borrowed(self, role: str) -> Iterator[None]:
        """The role's model on the device, whatever stage it is; afterwards it is where it was."""
        was_here = self.engines[role].params_loaded
        self.engines[role].onload(params=True)
        try:
            yield
        finally:
            if not was_here:
                self._offload(role)

    def not_finite(self, role: str) -> str:
        """The name of a parameter of the role that holds a number that is not finite; "" if there is none."""
        return self.engines[role].not_finite()

    def free_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Give what the allocator holds unused back to the device, for what the rollout engine is about to wake. Its
        weights alone may well fit beside that, and what is on its way to the host then need not be there first."""
        if self.plan.device == "cuda" and not (set(tags) == {"weights"} and self._weights_fit()):
            gc.collect()
            torch.cuda.ipc_collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _weights_fit(self) -> bool:
        """Were they whole and in float32: more than an engine of the trainer's own type takes for them."""
        weights = 4 * sum(param.numel() for param in self.engines["actor"].module.parameters())
        return torch.cuda.mem_get_info()[0] > weights + SPARE

    def memory_metrics(self) -> dict[str, float]:
        return memory_metrics(torch.device(self.plan.device))

    # ---- stages: each takes rows and answers with the same rows, columns added

    def old_log_probs(self, rows: pa.Table) -> pa.Table:
        return self.log_probs_at(rows, self.temperature)

    def log_probs_at(self, rows: pa.Table, temperature: float) -> pa.Table:
        batching = self.plan.forwards["old_log_probs"]
        found = self.engines["actor"].log_probs(rows, temperature=temperature, batching=batching)
        return with_columns(rows, old_log_probs=found["log_probs"], entropy=found["entropy"])

    def ref_log_probs(self, rows: pa.Table) -> pa.Table:
        batching = self.plan.forwards["ref_log_probs"]
        found = self.engines["reference"].log_probs(
            rows, temperature=self.temperature, batching=batching, entropy=False
        )
        return with_columns(rows, ref_log_probs=found["log_probs"])

    def values(self, rows: pa.Table) -> pa.Table:
        batching = self.plan.forwards["values"]
        return with_columns(rows, values=self.engines["critic"].values(rows, batching=batching))

    def reward_scores(self, rows: pa.Table) -> pa.Table:
        """rows: as ``verl.reward.model_inputs`` makes them."""
        batching = self.plan.forwards["reward_scores"]
        return with_columns(rows, score=self.engines["reward"].values(rows, batching=batching).flatten())

    # ---- updates: one optimizer step on these rows, which carry their ``loss_weights``

    def update_actor(self, rows: pa.Table, num_tokens: int) -> dict[str, float]:
        actor = self.config.actor_rollout_ref.actor
        loss = partial(
            policy_loss,
            token_loss=self.token_loss,
            settings=actor,
            num_tokens=num_tokens,
        )
        found = self.engines["actor"].update(
            rows,
            loss,
            batching=self.plan.actor.micro_batching,
            temperature=self.temperature,
            entropy=actor.entropy_coeff != 0,
        )
        return of_role("actor", found)

    def update_critic(self, rows: pa.Table, num_tokens: int) -> dict[str, float]:
        assert self.plan.critic is not None
        loss = partial(value_loss, cliprange_value=self.config.critic.cliprange_value, num_tokens=num_tokens)
        found = self.engines["critic"].update(rows, loss, batching=self.plan.critic.micro_batching)
        return of_role("critic", found)

    def step_schedule(self, role: str) -> None:
        self.engines[role].step_schedule()

    # ---- weights and state

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.engines["actor"].weights()

    def save(self, folder: Path) -> None:
        """Each trained role in ``folder/{role}``, with ``huggingface/`` in it where save_contents asks for hf_model."""
        contents = {"actor": self.config.actor_rollout_ref.actor.checkpoint, "critic": self.config.critic.checkpoint}
        for role, checkpoint in contents.items():
            if role in self.engines:
                self.engines[role].save(folder / role)
                if "hf_model" in checkpoint.save_contents:
                    with self.borrowed(role):
                        self.engines[role].export_hf(folder / role / "huggingface", self._tokenizer())

    def restore(self, folder: Path) -> None:
        for role, engine in self.engines.items():
            if engine.trainable:
                engine.onload(params=True, optimizer=True)
                engine.load(folder / role)
                self._offload(role)

    def _tokenizer(self):
        model = self.config.actor_rollout_ref.model
        return load_tokenizer(model.tokenizer_path, model.trust_remote_code)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


def model_of(config: Config, role: str) -> tuple[ModelConfig, Kind]:
    kinds: dict[str, tuple[ModelConfig, Kind]] = {
        "critic": (config.critic.model, "value"),
        "reward": (config.reward_model.model, "reward"),
    }
    return kinds.get(role, (config.actor_rollout_ref.model, "policy"))


def of_role(role: str, found: dict[str, float]) -> dict[str, float]:
    """An engine's metrics under the names that a run reports."""
    own = {name: f"{role}/{name}" for name in ("grad_norm", "lr")}
    own["skipped"] = f"{role}/skipped_steps"
    return {own.get(name, name): value for name, value in found.items()}

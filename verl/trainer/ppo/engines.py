"""The rollout engine of a run: started before the trainer's models where it is a process of its own, as its KV cache
is a share of the memory that it finds free; or made of the actor's module."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from verl.data.tokenizer import end_token_ids
from verl.engine.model import architectures, read_config
from verl.engine.precision import compute_dtype
from verl.memory.gpu_balance import environment_for_engine
from verl.plan import RunPlan
from verl.rollout.client.backend import Backend
from verl.rollout.client.engine import NO_WEIGHTS, ClientEngine
from verl.rollout.contract.base import RolloutEngine
from verl.rollout.embedded.engine import HFEngine
from verl.rollout.engines.registry import ADAPTERS
from verl.rollout.engines.sglang.server_replicas import build_server_rollout
from verl.rollout.processes.adapter import EngineSettings
from verl.rollout.processes.subprocess_backend import SubprocessBackend

if TYPE_CHECKING:
    from verl.config.sections.models import Config, ModelConfig
    from verl.trainer.ppo.worker import PPOWorker

Say = Callable[[str], None]


def start_engine(
    config: Config,
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    note: Say,
    no_weights: str | None = NO_WEIGHTS,
) -> RolloutEngine | None:
    """The engine, if it does not need the trainer's models. folder: of the run, for its logs. no_weights: why it must
    not draw yet; None: it draws from the model that it has read itself."""
    if plan.engine == "hf":
        return None
    if config.actor_rollout_ref.rollout.mode == "server":
        return _servers(config, plan, tokenizer, note, no_weights)
    return _start_process(config, plan, tokenizer, folder, note, no_weights)


def embedded_engine(config: Config, plan: RunPlan, worker: PPOWorker, tokenizer: PreTrainedTokenizerBase) -> HFEngine:
    """Generates with the actor's own module."""
    rollout, actor = config.actor_rollout_ref.rollout, worker.engines["actor"]
    return HFEngine(
        actor.module,
        tokenizer,
        root=actor.root,
        reshard_after_forward=config.actor_rollout_ref.actor.fsdp_config.reshard_after_forward,
        eos_token_ids=end_token_ids(tokenizer, config.actor_rollout_ref.model.path),
        max_model_len=plan.context_length,
        max_num_seqs=plan.max_num_seqs,
        max_prefill_tokens=rollout.max_num_batched_tokens,
    )


def _start_process(
    config: Config,
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    note: Say,
    no_weights: str | None,
) -> RolloutEngine:
    adapter = ADAPTERS[plan.engine]
    log = folder / "rollout" / f"{adapter.name}.log"
    note(f"starting {adapter.title} (its output: {log})")
    megabytes = config.actor_rollout_ref.rollout.update_weights_bucket_megabytes
    backend = SubprocessBackend(
        adapter,
        engine_settings(config, plan),
        log=log,
        bucket_bytes=megabytes << 20,
        environment=environment_for_engine(os.environ),
        note=note,
    )
    note(backend.describe())
    return client_of(backend, config, plan, tokenizer, no_weights)


def client_of(
    backend: Backend,
    config: Config,
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    no_weights: str | None = NO_WEIGHTS,
) -> ClientEngine:
    """Of a new engine. no_weights: as for ``start_engine``."""
    model, holds_weights = config.actor_rollout_ref.model, backend.capabilities.holds_weights
    return ClientEngine(
        backend,
        tokenizer,
        eos_token_ids=end_token_ids(tokenizer, model.path),
        max_model_len=plan.context_length,
        vocab_size=vocab_size_of(model),
        no_weights=no_weights if holds_weights else None,
    )


def _servers(
    config: Config, plan: RunPlan, tokenizer: PreTrainedTokenizerBase, note: Say, no_weights: str | None
) -> RolloutEngine:
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    return build_server_rollout(
        config,
        tokenizer,
        end_token_ids(tokenizer, model.path),
        plan.context_length,
        vocab_size_of(model),
        dtype=getattr(torch, engine_dtype(config, plan)),
        bucket_bytes=rollout.update_weights_bucket_megabytes << 20,
        no_weights=no_weights,
        note=note,
    )


def vocab_size_of(model: ModelConfig) -> int:
    return read_config(model, "policy").get_text_config(decoder=True).vocab_size


def engine_dtype(config: Config, plan: RunPlan) -> str:
    """As torch names it."""
    asked, actor = config.actor_rollout_ref.rollout.dtype, config.actor_rollout_ref.actor.fsdp_config.dtype
    return str(compute_dtype(actor, torch.device(plan.device))).removeprefix("torch.") if asked == "auto" else asked


def engine_settings(config: Config, plan: RunPlan) -> EngineSettings:
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    return EngineSettings(
        model_path=os.path.expanduser(model.path),
        trust_remote_code=model.trust_remote_code,
        device=plan.device,
        dtype=engine_dtype(config, plan),
        max_model_len=plan.context_length,
        max_num_seqs=plan.max_num_seqs,
        max_prefill_tokens=rollout.max_num_batched_tokens,
        tensor_parallel=plan.tensor_parallel,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        free_cache_engine=rollout.free_cache_engine,
        enforce_eager=rollout.enforce_eager,
        load_format=rollout.load_format,
        override_config={"architectures": architectures(model), **model.override_config},
        seed=config.trainer.seed,
        extra=getattr(rollout.engine_kwargs, plan.engine),
    )

"""Starts the rollout engine of a training or generation run: in a process of its own, on servers, or on a module that
the run already has.

An engine in its own process starts before the trainer's models are built: its KV cache is a share of the memory that is
free at that moment.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from verl.data.tokenizer import end_token_ids
from verl.engine import TrainEngine
from verl.engine.model import read_config
from verl.engine.precision import compute_dtype
from verl.memory.gpu_balance import environment_for_engine
from verl.plan import EnginePlan
from verl.rollout.client.backend import Backend
from verl.rollout.client.engine import NO_WEIGHTS, ClientEngine
from verl.rollout.contract.base import RolloutEngine
from verl.rollout.embedded.engine import HFEngine
from verl.rollout.engines.registry import ADAPTERS
from verl.rollout.engines.sglang.server_replicas import build_server_rollout
from verl.rollout.processes.adapter import EngineSettings
from verl.rollout.processes.subprocess_backend import SubprocessBackend

if TYPE_CHECKING:
    from verl.config.sections.models import ModelConfig

Say = Callable[[str], None]


def start_engine(
    plan: EnginePlan,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    note: Say,
    no_weights: str | None = NO_WEIGHTS,
) -> RolloutEngine | None:
    """The engine, or None if it is embedded and needs a module (``embedded_engine``).

    folder: of the run, for the engine's logs. no_weights: why the engine must not generate yet; None: it generates with
    the weights that it reads itself.
    """
    if plan.name == "hf":
        return None
    if plan.rollout.mode == "server":
        return _servers(plan, tokenizer, note, no_weights)
    return _start_process(plan, tokenizer, folder, note, no_weights)


def embedded_engine(plan: EnginePlan, model: TrainEngine, tokenizer: PreTrainedTokenizerBase) -> HFEngine:
    """An engine that generates with the module of ``model``."""
    return HFEngine(
        model.module,
        tokenizer,
        root=model.root,
        reshard_after_forward=plan.reshard_after_forward,
        eos_token_ids=end_token_ids(tokenizer, plan.model.path),
        max_model_len=plan.context_length,
        max_num_seqs=plan.rollout.max_num_seqs,
        max_prefill_tokens=plan.rollout.max_num_batched_tokens,
    )


def _start_process(
    plan: EnginePlan, tokenizer: PreTrainedTokenizerBase, folder: Path, note: Say, no_weights: str | None
) -> RolloutEngine:
    adapter = ADAPTERS[plan.name]
    log = folder / "rollout" / f"{adapter.name}.log"
    note(f"starting {adapter.title} (its output: {log})")
    backend = SubprocessBackend(
        adapter,
        engine_settings(plan),
        log=log,
        bucket_bytes=plan.bucket_megabytes << 20,
        environment=environment_for_engine(os.environ),
    )
    note(backend.describe())
    return client_of(backend, plan, tokenizer, no_weights)


def client_of(
    backend: Backend, plan: EnginePlan, tokenizer: PreTrainedTokenizerBase, no_weights: str | None = NO_WEIGHTS
) -> ClientEngine:
    """The client of a new engine. no_weights: as for ``start_engine``."""
    return ClientEngine(
        backend,
        tokenizer,
        eos_token_ids=end_token_ids(tokenizer, plan.model.path),
        max_model_len=plan.context_length,
        vocab_size=vocab_size_of(plan.model),
        no_weights=no_weights if backend.capabilities.holds_weights else None,
    )


def _servers(plan: EnginePlan, tokenizer: PreTrainedTokenizerBase, note: Say, no_weights: str | None) -> RolloutEngine:
    return build_server_rollout(
        plan.rollout,
        Path(plan.model.path).expanduser(),
        tokenizer,
        end_token_ids(tokenizer, plan.model.path),
        plan.context_length,
        vocab_size_of(plan.model),
        dtype=getattr(torch, engine_dtype(plan)),
        bucket_bytes=plan.bucket_megabytes << 20,
        weights_dir=plan.weights_dir,
        no_weights=no_weights,
        note=note,
    )


def vocab_size_of(model: ModelConfig) -> int:
    return read_config(model, "policy").get_text_config(decoder=True).vocab_size


def engine_dtype(plan: EnginePlan) -> str:
    """The type of the engine's weights, by torch's name."""
    if plan.rollout.dtype != "auto":
        return plan.rollout.dtype
    return str(compute_dtype(plan.compute_dtype, torch.device(plan.device))).removeprefix("torch.")


def engine_settings(plan: EnginePlan) -> EngineSettings:
    model, rollout = plan.model, plan.rollout
    return EngineSettings(
        model_path=os.path.expanduser(model.path),
        trust_remote_code=model.trust_remote_code,
        device=plan.device,
        dtype=engine_dtype(plan),
        max_model_len=plan.context_length,
        max_num_seqs=rollout.max_num_seqs,
        max_prefill_tokens=rollout.max_num_batched_tokens,
        tensor_parallel=plan.tensor_parallel,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        free_cache_engine=plan.free_cache,
        enforce_eager=rollout.enforce_eager,
        load_format=rollout.load_format,
        override_config=model.override_config,
        seed=plan.seed,
        extra=rollout.engine_kwargs.of(plan.name),
    )

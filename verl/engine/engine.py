"""``TrainEngine``: one model on this rank's device, whole or sharded over the ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from verl.engine import checkpoint, offload
from verl.engine.attention import packed_attention, why_padded
from verl.engine.checkpoint_names import CheckpointNames, share_conversions
from verl.engine.compile import PLAIN, CompiledLayers
from verl.engine.distributed import (
    max_over_ranks,
    on_first_rank,
    rank,
    receive_from_first,
    shard,
    sharded_modules,
    sum_over_ranks,
    whole_parameters,
    world_size,
)
from verl.engine.flops import ForwardFlops, peak_flops
from verl.engine.model import Kind, empty_model, read_config, read_model, wrap, write_model
from verl.engine.optim import Optimizer
from verl.engine.packing import MicroBatch, Packer
from verl.engine.precision import MasterWeights, compute_dtype
from verl.engine.weight_files import broken_tensor
from verl.memory.device_memory import SPARE, Peak
from verl.plan import MicroBatching

if TYPE_CHECKING:
    from verl.config.sections.parts import FSDPConfig, ModelConfig, OptimConfig

Tensors = dict[str, torch.Tensor]
LossFunction = Callable[[Tensors, Tensors], tuple[torch.Tensor, Tensors]]
CPU = torch.device("cpu")


class OffloadedError(RuntimeError):
    """Parameters are offloaded to the host. Call ``onload`` first."""


class TrainEngine:
    """Computes per-token numbers of one model and updates it.

    If the caller has initialised a process group of several ranks (on GPUs, after ``torch.cuda.set_device``), the model
    is sharded over them. Every method is then collective: all ranks call it, each with its own rows (any number, also
    none).

    module: the transformers model. With several ranks its parameters are sharded.
    root: the module around it, which is the root of sharding.
    compute_dtype: dtype of forwards.
    packed: whether a micro-batch's sequences are packed into one row instead of padded.
    unpackable: why they are padded although packing is configured; None otherwise.
    params_loaded: whether the parameters are on the device.
    flops: floating point operations of this rank's forwards and updates so far (``verl.engine.flops``).
    """

    def __init__(
        self,
        model_config: ModelConfig,
        kind: Kind,
        fsdp_config: FSDPConfig,
        *,
        optim_config: OptimConfig | None = None,
        grad_clip: float | None = 1.0,
        total_steps: int = 1,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ):
        """optim_config: None for a model that is never updated. total_steps: of the learning-rate schedule."""
        self.kind: Kind = kind
        self.device = torch.device(device)
        self.compute_dtype = compute_dtype(fsdp_config.dtype, self.device)
        self.trainable = optim_config is not None
        self.config = read_config(model_config, kind)
        self.compiles = fsdp_config.use_torch_compile and self.device.type == "cuda"
        self._copies = offload.Copies(self.device)
        self.root = self._build(model_config, fsdp_config, seed)
        self.root.eval()
        self.module: transformers.PreTrainedModel = self.root.hf
        asked = model_config.use_remove_padding
        self.unpackable = why_padded(self.module, self.device, self.compute_dtype) if asked else None
        self.packed = asked and self.unpackable is None
        self._forward_flops = ForwardFlops(self.module)
        self.flops = 0.0
        checkpointing = self.trainable and model_config.enable_gradient_checkpointing
        self._layers = CompiledLayers(self.module, checkpointing) if self.compiles else None
        self.optimizer: Optimizer | None = None
        if optim_config is None:
            self.root.requires_grad_(False)
            self.root.to(self.device)
        else:
            self._build_optimizer(optim_config, grad_clip, total_steps, on_host=fsdp_config.optimizer_offload)
            if checkpointing:
                self.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(PLAIN))
        self._params = offload.MovableModule(self.root, self._copies)

    def _build_optimizer(self, config: OptimConfig, grad_clip: float | None, steps: int, on_host: bool) -> None:
        """on_host: the state is created on the host. It then never has to fit on the device as a whole."""
        home = CPU if on_host else self.device
        self.masters = MasterWeights(self.module, self.compute_dtype, world_size() > 1, self.device, home)
        if world_size() == 1:
            self.root.to(self.device)
        self.optimizer = optimizer = Optimizer(self.masters, config, grad_clip, steps, home)
        self._state = offload.MovableTensors(optimizer.movable(), self._copies, loaded=not on_host)
        # Bytes of state that fit on the device beside an update. Every update measures it.
        self._state_room: int | None = 0 if self.device.type == "cuda" else None
        self._peak_of_others = 0

    def _build(self, model_config: ModelConfig, fsdp_config: FSDPConfig, seed: int) -> Any:
        stored = torch.float32 if self.trainable else self.compute_dtype
        whole = on_first_rank(lambda: read_model(model_config, self.kind, self.config, stored, seed))
        if world_size() == 1:
            assert whole is not None
            return wrap(whole, self.kind, self.compiles)
        root = wrap(empty_model(model_config, self.kind, self.config, stored), self.kind, self.compiles)
        shard(root, set(root.hf._no_split_modules or ()), fsdp_config, self.device, self.compute_dtype)
        receive_from_first(root, None if whole is None else wrap(whole, self.kind), self.device)
        share_conversions(root.hf, whole)
        if whole is not None and self.kind == "policy":
            root.hf.generation_config = whole.generation_config
        return root

    # ---- per-token numbers

    def log_probs(
        self, table: pa.Table, *, temperature: float, batching: MicroBatching, entropy: bool = True
    ) -> dict[str, pa.ListArray]:
        """``log_probs`` and, if wanted, ``entropy``: float32 columns, one entry per response token, rows as in
        ``table``. Both are of ``log_softmax(logits / temperature)`` over the full vocabulary."""
        return self._infer(table, batching, temperature=_positive(temperature), entropy=entropy)

    def values(self, table: pa.Table, *, batching: MicroBatching) -> pa.ListArray:
        """float32 column, one entry per response token: the value of the state before the token is emitted."""
        return self._infer(table, batching)["values"]

    @torch.no_grad()
    def _infer(self, table: pa.Table, batching: MicroBatching, **options: Any) -> dict[str, pa.ListArray]:
        self._need_params()
        packer = Packer(table, self.device, packed=self.packed)
        self.flops += self._forward_flops(*packer.sizes())
        tokens: list[np.ndarray] = []
        found: dict[str, list[torch.Tensor]] = {}
        with self._forwarding():
            for micro in self._micro_batches(packer, batching):
                outputs = self.root(micro.input_ids, *self._arguments(micro), **options)
                tokens.append(micro.tokens)
                for name, values in outputs.items():
                    found.setdefault(name, []).append(values[: len(micro.tokens)])  # a filler adds none
        self._reshard()
        return {name: packer.column(tokens, values) for name, values in found.items()}

    # ---- updates

    def update(
        self,
        table: pa.Table,
        loss_fn: LossFunction,
        *,
        batching: MicroBatching,
        temperature: float = 1.0,
        entropy: bool = True,
    ) -> dict[str, float]:
        """Makes one optimizer step on a mini-batch. ``table`` holds this rank's share of its rows.

        Returns the metrics, summed over micro-batches and ranks, and three of its own:
            grad_norm: before clipping.
            lr: of this step.
            skipped: 1.0 if the gradient was not finite. Then nothing changed.

        loss_fn: (outputs, batch) -> (loss, metrics) on the T response tokens of a micro-batch.
            outputs: float32 (T,) ``log_probs`` and, if wanted, ``entropy``; or ``values``. All have a gradient.
            batch: the table's token columns and ``row_ids`` (see ``MicroBatch.columns``).
            Loss and metrics of micro-batches and ranks must add up to those of the mini-batch.
        """
        if self.optimizer is None:
            raise RuntimeError("this engine was built without an optimizer")
        self._need_params()
        peak = Peak(self.device)
        metrics = self._update(table, loss_fn, batching, temperature, entropy)
        if self.device.type == "cuda" and not metrics["skipped"]:
            self._measure_optimizer_room(peak.bytes)
        return metrics

    def _update(
        self, table: pa.Table, loss_fn: LossFunction, batching: MicroBatching, temperature: float, entropy: bool
    ) -> dict[str, float]:
        assert self.optimizer is not None
        options = {"temperature": _positive(temperature), "entropy": entropy} if self.kind == "policy" else {}
        packer = Packer(table, self.device, packed=self.packed)
        self.flops += 3 * self._forward_flops(*packer.sizes())  # a backward is two forwards
        totals: dict[str, Any] = {}
        with self._forwarding(updating=True), self._recomputing():
            for micro in self._micro_batches(packer, batching):
                outputs = self.root(micro.input_ids, *self._arguments(micro), **options)
                if len(micro.tokens):
                    loss, metrics = loss_fn(outputs, micro.columns)
                    for name, value in metrics.items():
                        totals[name] = totals.get(name, 0.0) + value
                else:
                    loss = 0.0 * torch.stack(list(outputs.values())).sum()
                loss.backward()
        self._reshard()
        lr = self.optimizer.lr
        self._copies.wait()
        self._params.changed = self._state.changed = True
        grad_norm, stepped = self.optimizer.step(None if self._state.loaded else self._copies)
        sums = sum_over_ranks({name: float(value) for name, value in totals.items()})
        return {**sums, "grad_norm": grad_norm, "lr": lr, "skipped": float(not stepped)}

    def step_schedule(self) -> None:
        """Advances the learning-rate schedule. Call it once a PPO iteration, not once an update."""
        assert self.optimizer is not None
        self.optimizer.step_schedule()

    def _micro_batches(self, packer: Packer, batching: MicroBatching) -> Iterator[MicroBatch]:
        """The micro-batches of this rank, then fillers until all ranks have run equally many forwards, at least one."""
        plan = packer.micro_batches(batching)
        forwards = max_over_ranks(max(len(plan), 1), self.device)
        for rows in plan:
            yield packer.micro_batch(rows)
        for _ in range(forwards - len(plan)):
            yield packer.filler()

    def _arguments(self, micro: MicroBatch) -> tuple[Any, ...]:
        places = (micro.layout, micro.positions)
        return (*places, micro.targets) if self.kind == "policy" else places

    @contextmanager
    def _forwarding(self, updating: bool = False) -> Iterator[None]:
        """Packed attention and compiled layers, for this engine's forwards only: a rollout may borrow the module."""
        compiled = nullcontext() if self._layers is None else self._layers(updating)
        with packed_attention(self.module) if self.packed else nullcontext(), compiled:
            yield

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Activation checkpointing. transformers checkpoints only layers in training mode, so the layers are put into
        it; their submodules stay in evaluation mode. Compiled layers checkpoint themselves."""
        own = set() if self._layers is None else self._layers.recomputing
        layers = {layer for layer in self.module.modules() if isinstance(layer, GradientCheckpointingLayer)} - own
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def _reshard(self) -> None:
        for module in sharded_modules(self.root):
            module.reshard()

    # ---- weights

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, whole tensor) with the names and shapes of a saved model.

        Tied parameters come once, fused experts one by one. Parameters have the compute dtype, buffers their own.
        Tensors are gathered a layer at a time, in the same order on every rank. Collective: every rank has to consume
        the whole iterator.
        """
        yield from self._checkpoint_names.stream(self._module_weights())

    @cached_property
    def _checkpoint_names(self) -> CheckpointNames:
        return CheckpointNames(self.module)

    def _module_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and persistent buffers under their names in the module."""
        self._need_params()
        if world_size() > 1:
            yield from whole_parameters(self.root, self.module)
        else:
            for name, param in self.module.named_parameters():
                yield name, param.detach().to(self.compute_dtype)
        for name in self._checkpoint_names.persistent_buffers:
            yield name, self.module.get_buffer(name)

    def export_hf(self, path: str | Path, tokenizer: Any = None) -> None:
        """Writes a folder that transformers loads: safetensors in the compute dtype, config, tokenizer if given."""
        state: Tensors = {}
        for name, tensor in self._module_weights() if world_size() > 1 else ():
            if rank() == 0:
                state[name] = tensor.cpu()

        def write() -> None:
            write_model(self.module, path, state or None)
            self.module.config.dtype = self.compute_dtype  # transformers wrote the dtype of the shards
            self.module.config.save_pretrained(path)
            if tokenizer is not None:
                tokenizer.save_pretrained(path)

        on_first_rank(write)

    # ---- memory

    def offload(self, *, params: bool = False, optimizer: bool = False) -> None:
        """Moves parameters, or optimizer state with separate master weights, to the host, if they are not there yet.
        Does not wait for the copies: the device's memory is free once they are done."""
        if params:
            self._params.offload()
        if optimizer and self.trainable:
            self._state.offload()

    def copy_to_host(self) -> None:
        """Starts to copy the parameters to the host, so that the next ``offload`` has nothing to copy."""
        self._params.refresh()

    def onload(self, *, params: bool = False, optimizer: bool = False) -> None:
        """Moves parameters or optimizer state to the device. State that did not fit beside the previous update stays on
        the host, before the first update all of it; updates stream it through the device in buckets."""
        if params:
            self._params.onload()
        if optimizer and self.trainable:
            self._state.onload(self._state_room)

    @property
    def peak_flops(self) -> float:
        """Peak operations a second of this rank's device; 0 if unknown."""
        return peak_flops(self.device, self.compute_dtype)

    @property
    def params_loaded(self) -> bool:
        return self._params.loaded

    def _measure_optimizer_room(self, peak: int) -> None:
        """peak: most bytes of the device that were allocated during an update, loaded optimizer state included."""
        self._peak_of_others = max(self._peak_of_others, peak - self._state.loaded_bytes)
        self._state_room = self._device_bytes() - self._peak_of_others - SPARE

    def _device_bytes(self) -> int:
        """Bytes of the device that this process has reserved or could still reserve."""
        return torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)

    def _need_params(self) -> None:
        if not self.params_loaded:
            raise OffloadedError("the parameters are on the host: call onload(params=True) first")

    def broken_parameter(self) -> str:
        """What is wrong with a parameter in this rank's shard (``broken_tensor``); "" if nothing is."""
        return broken_tensor((name, offload.local(param)) for name, param in self.module.named_parameters())

    # ---- checkpoints

    def save(self, path: str | os.PathLike) -> None:
        """Writes master weights, optimizer state and schedule into a new folder. Collective."""
        self._copies.finish()
        state: dict[str, Any] = {"kind": self.kind}
        if self.optimizer is not None:
            state["schedule_steps"] = self.optimizer.steps
        checkpoint.save(Path(path), self._state_tensors(), state)

    def load(self, path: str | os.PathLike) -> None:
        """Restores the state of ``save`` exactly, on any number of ranks. Collective."""
        self._copies.finish()
        self._params.changed = True
        if self.optimizer is not None:
            self._state.changed = True
        state = checkpoint.load(Path(path), self._state_tensors())
        if self.optimizer is not None:
            self.optimizer.steps = state["schedule_steps"]
            self.masters.copy_to_params()

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        params = self.masters.by_name if self.optimizer is not None else dict(self.module.named_parameters())
        tensors: dict[str, torch.Tensor] = {f"model.{name}": param.detach() for name, param in params.items()}
        if self.optimizer is not None:
            tensors |= {f"optim.{name}": tensor for name, tensor in self.optimizer.tensors().items()}
        return tensors

    def close(self) -> None:
        """Frees the model and all state."""
        self._params.close()
        if self.trainable:
            self._state.close()
        self.optimizer = None
        self.__dict__.pop("masters", None)
        self.__dict__.pop("module", None)
        self.__dict__.pop("_checkpoint_names", None)
        self.root = nn.Module()
        self._layers = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _positive(temperature: float) -> float:
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: log-probs need one above 0 (those of greedy responses are at 1)")
    return temperature

"""Sharding over ranks, and the collectives of an engine. Without a process group there is one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from verl.errors import UserError

if TYPE_CHECKING:
    from verl.config.sections.parts import FSDPConfig

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a sharded one (a collective), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_first_rank(read: Callable[[], T]) -> T | None:
    """The result of ``read`` on rank 0; None on other ranks. A UserError or OSError of it is raised on every rank."""
    found: T | None = None
    problem: list[Exception | None] = [None]
    if rank() == 0:
        try:
            found = read()
        except (UserError, OSError) as error:
            problem = [error]
    if world_size() > 1:
        dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise problem[0]
    return found


def max_over_ranks(number: int, device: torch.device) -> int:
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def sum_over_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """Sums by key, in rank order. A rank may lack keys."""
    if world_size() == 1:
        return metrics
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, metrics)
    keys = sorted(set().union(*gathered))
    return {key: sum(each[key] for each in gathered if key in each) for key in keys}


def make_mesh(fsdp_size: int, device: torch.device) -> DeviceMesh:
    """A mesh of one dimension; (replicas, shards) if ``fsdp_size`` is below the world size (hybrid sharding)."""
    world = world_size()
    if fsdp_size == -1 or fsdp_size >= world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    if world % fsdp_size:
        raise UserError(f"fsdp_config.fsdp_size={fsdp_size} does not divide the {world} ranks")
    return init_device_mesh(device.type, (world // fsdp_size, fsdp_size), mesh_dim_names=("replicate", "shard"))


def shard(
    root: nn.Module, layer_classes: set[str], config: FSDPConfig, device: torch.device, compute_dtype: torch.dtype
) -> None:
    """Applies FSDP2 to each decoder layer and the root, in place.

    Parameters keep their dtype and are gathered in ``compute_dtype``. Gradients are reduced in float32 as sums, not
    means, because the losses of all ranks add up to that of the mini-batch.
    """
    mesh = make_mesh(config.fsdp_size, device)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for module in root.modules():
        if type(module).__name__ in layer_classes:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for sharded in sharded_modules(root):  # weights that stay gathered are resharded by TrainEngine
        sharded.set_reshard_after_backward(config.reshard_after_forward)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def sharded_modules(root: nn.Module) -> list[FSDPModule]:
    """All FSDP modules, outer ones before those inside them."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def whole_parameters(root: nn.Module, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, whole tensor in the dtype of forwards) of each parameter of ``module``, a part of the sharded
    ``root``.

    Consecutive parameters that are sharded together (a layer) are gathered together and freed when the next are
    gathered. Collective.
    """
    owners = _owners(root, module)
    for owner, names in groupby(owners, key=owners.__getitem__):
        owner.unshard()
        try:
            for name in names:
                yield name, module.get_parameter(name).detach().clone()
        finally:
            owner.reshard()


def _owners(root: nn.Module, module: nn.Module) -> dict[str, FSDPModule]:
    """The innermost FSDP module around each parameter of ``module``, by name."""
    innermost = {id(param): part for part in sharded_modules(root) for param in cast(nn.Module, part).parameters()}
    owners = {}
    for name, param in module.named_parameters():
        if not isinstance(param, DTensor):
            raise RuntimeError(f"{name} is whole, and FSDP's to free: a rollout that borrows the model still draws")
        owners[name] = innermost[id(param)]
    return owners


def receive_from_first(root: nn.Module, source: nn.Module | None, device: torch.device) -> None:
    """Fills a sharded module without storage from ``source``, a whole module that only rank 0 has. Collective."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    buffers = dict(source.named_buffers()) if source else {}
    root.to_empty(device=device)
    for name, buffer in root.named_buffers():  # some, like rotary frequencies, are in no state dict
        if source:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(root, source.state_dict() if source else {}, options=options)

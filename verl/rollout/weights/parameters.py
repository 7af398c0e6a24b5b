"""The parameters of one tensor-parallel rank of an engine's model, by the names of the checkpoint.

SGLang and vLLM, whose models are of one descent, fuse tensors (q, k and v; gate and up; experts) and keep slices of
them. Which tensor goes where is known to each model's ``load_weights`` alone, so it is watched once, tensor by tensor:
which parameter's loader was called, with which part. From then on the part of a parameter that holds (a slice of) a
named tensor can be read back, without trusting anything that was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from verl.rollout.weights.checksums import Piece, piece_of
from verl.rollout.weights.receiver import NamedTensors

SKIP = "set trainer.check_weights=never for this model"
Part = tuple[Any, ...]  # how a loader was called: () for the whole parameter, ("q",), (0,), ("w1", expert)


@dataclass(frozen=True)
class Slot:
    """A named tensor's place: the parameter, and the part of it.

    again: loads a whole tensor as the model's ``load_weights`` did, by the same call of the parameter's loader. None
    where the model gave the loader something else than the tensor itself.
    """

    parameter: str
    part: Part
    again: Callable[[torch.Tensor], None] | None


class ModelParameters:
    """See ``verl.rollout.weights.receiver.Holder``. default_loader: of parameters that have none of their own."""

    def __init__(self, model: Any, default_loader: Callable):
        self._model, self._default_loader = model, default_loader
        self._slots: dict[str, list[Slot]] = {}  # by checkpoint name
        self._shapes: dict[str, tuple[int, ...]] = {}
        # A model that computes further tensors from its weights has to see them come.
        self._replays = not hasattr(model, "post_load_weights")
        self._come: set[str] = set()
        self._covered = False  # the names known so far fill all parameters
        self._owners = {
            f"{path}.{name}" if path else name: (module, name)
            for path, module in model.named_modules(remove_duplicate=False)
            for name, _ in module.named_parameters(recurse=False)
        }

    # ---- Holder

    def begin(self) -> None:
        self._come.clear()

    def load(self, tensors: NamedTensors) -> None:
        new = [(name, tensor) for name, tensor in tensors if name not in self._slots]
        known = [(name, tensor) for name, tensor in tensors if name in self._slots]
        for name, tensor in known:
            if tuple(tensor.shape) != self._shapes[name]:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, not {list(self._shapes[name])}")
        through_model = []
        for name, tensor in known:
            slots = self._slots[name]
            if self._replays and all(slot.again for slot in slots):
                for slot in slots:
                    slot.again(tensor)  # type: ignore[misc]
            else:
                through_model.append((name, tensor))
        if through_model:
            self._model.load_weights(iter(through_model))
        for name, tensor in new:
            self._load_watched(name, tensor)
        self._come.update(name for name, _ in tensors)

    def finish(self) -> None:
        if missing := sorted(self._slots.keys() - self._come):
            raise ValueError(f"was not sent {_some(missing)}")
        if self._covered:
            return
        filled = {
            (slot.parameter, part) for slots in self._slots.values() for slot in slots for part in self._parts(slot)
        }
        absent = [
            f"{parameter}{''.join(f' [{each}]' for each in part)}"
            for parameter in self._parameters()
            for part in self._all_parts(parameter)
            if (parameter, part) not in filled
        ]
        if absent:
            raise ValueError(f"was not sent anything for {_some(absent)}")
        self._covered = True

    def pieces(self) -> list[Piece]:
        return [
            piece_of(name, held, self._shapes[name], dim, start)
            for name, slots in self._slots.items()
            for slot in slots
            for held, dim, start in self._held(slot, self._shapes[name])
            if held.numel()  # a rank may hold nothing but padding
        ]

    # ---- watching load_weights

    def _load_watched(self, name: str, tensor: torch.Tensor) -> None:
        seen: list[Slot] = []
        with _watched(self._parameters(), self._default_loader, tensor, seen):
            try:
                self._model.load_weights(iter([(name, tensor)]))
            except Exception as error:
                raise ValueError(f"{name}, shape {list(tensor.shape)}: {error or type(error).__name__}") from error
        if not seen:
            raise ValueError(f"{name} is not a parameter of {type(self._model).__name__}")
        self._slots[name], self._shapes[name] = seen, tuple(tensor.shape)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._model.named_parameters())

    # ---- what a parameter consists of

    def _all_parts(self, parameter: str) -> list[Part]:
        module, _ = self._owners[parameter]
        kind = _kind(module)
        if kind == "qkv":
            return [("q",), ("k",), ("v",)]
        if kind == "merged":
            return [(index,) for index in range(len(module.output_sizes))]
        if kind == "experts":
            roles = ("w2",) if parameter.endswith("w2_weight") else ("w1", "w3")
            return [(role, expert) for expert in range(_experts(module)[0]) for role in roles]
        return [()]

    def _parts(self, slot: Slot) -> list[Part]:
        """A fused tensor that came whole fills all parts."""
        return [slot.part] if slot.part else self._all_parts(slot.parameter)

    def _held(self, slot: Slot, shape: Sequence[int]) -> Iterator[tuple[torch.Tensor, int, int]]:
        """(slice held, its dimension, its start) of a named tensor of this shape, read from the parameter. What lies
        past the tensor's end is left out: an engine may pad what it holds, so that ranks share it evenly."""
        for held, dim, start in self._padded(slot, shape):
            size = max(0, min(held.shape[dim], shape[dim] - start)) if shape else 1
            yield held.narrow(dim, 0, size) if shape else held, dim, start

    def _padded(self, slot: Slot, shape: Sequence[int]) -> Iterator[tuple[torch.Tensor, int, int]]:
        module, name = self._owners[slot.parameter]
        parameter = getattr(module, name).detach()
        kind = _kind(module)
        if kind == "experts":
            yield _expert(module, parameter, slot.part)
        elif kind in ("qkv", "merged"):
            read: Callable = _qkv if kind == "qkv" else _merged
            start = 0
            for part in self._parts(slot):
                held, offset, whole = read(module, parameter, part)
                yield held, 0, start + offset
                start += whole
        elif kind == "vocabulary":
            indices = module.shard_indices
            yield parameter[: indices.num_org_elements], 0, indices.org_vocab_start_index
        else:
            yield _sliced(module, parameter, shape, slot.parameter)


class _watched:  # noqa: N801
    """While it is open, every call of a parameter's loader is noted in ``seen``."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], default_loader: Callable, whole: torch.Tensor, seen: list[Slot]
    ):
        self._parameters, self._default_loader, self._whole, self._seen = parameters, default_loader, whole, seen
        self._had: dict[str, Any] = {}

    def __enter__(self) -> None:
        for name, parameter in self._parameters.items():
            self._had[name] = getattr(parameter, "weight_loader", None)
            loader = self._had[name] or self._default_loader
            parameter.weight_loader = partial(self._note, name, loader)  # type: ignore[attr-defined]

    def _note(
        self, name: str, loader: Callable, parameter: nn.Parameter, tensor: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if "expert_id" in kwargs or len(args) == 3:
            part: Part = (
                kwargs.get("shard_id", args[1] if len(args) > 1 else None),
                kwargs.get("expert_id", *args[2:]),
            )
        else:
            part = tuple(each for each in (*args, *kwargs.values()) if each is not None)
        again = partial(_load, loader, parameter, args, kwargs) if tensor is self._whole else None
        self._seen.append(Slot(name, part, again))
        return loader(parameter, tensor, *args, **kwargs)

    def __exit__(self, *_: object) -> None:
        for name, parameter in self._parameters.items():
            if self._had[name] is None:
                del parameter.weight_loader  # type: ignore[attr-defined]
            else:
                parameter.weight_loader = self._had[name]  # type: ignore[attr-defined]


def _load(loader: Callable, parameter: nn.Parameter, args: tuple, kwargs: dict[str, Any], tensor: torch.Tensor) -> None:
    loader(parameter, tensor, *args, **kwargs)


# ---- the engines' layers, by what they are and not by their import path


def _kind(module: nn.Module) -> str:
    if hasattr(module, "num_kv_head_replicas"):
        return "qkv"
    if hasattr(module, "w13_weight") or hasattr(module, "w2_weight"):
        return "experts"
    if hasattr(module, "shard_indices"):
        return "vocabulary"
    if isinstance(getattr(module, "output_sizes", None), list):
        return "merged"
    return "plain"


def _qkv(module: Any, parameter: torch.Tensor, part: Part) -> tuple[torch.Tensor, int, int]:
    """(rows of this part here, their start in the part's whole tensor, the whole tensor's rows)."""
    role = part[0]
    q, k = module.num_heads * module.head_size, module.num_kv_heads * module.head_size
    sizes = {"q": q, "k": k, "v": module.num_kv_heads * module.v_head_size}
    offset = {"q": 0, "k": sizes["q"], "v": sizes["q"] + sizes["k"]}[role]
    heads = module.total_num_heads if role == "q" else module.total_num_kv_heads
    head_size = module.v_head_size if role == "v" else module.head_size
    rank = module.tp_rank if role == "q" else module.tp_rank // module.num_kv_head_replicas
    return parameter[offset : offset + sizes[role]], rank * sizes[role], heads * head_size


def _merged(module: Any, parameter: torch.Tensor, part: Part) -> tuple[torch.Tensor, int, int]:
    index, sizes = part[0], module.output_sizes
    size = sizes[index] // module.tp_size
    offset = sum(sizes[:index]) // module.tp_size
    return parameter[offset : offset + size], module.tp_rank * size, sizes[index]


def _experts(module: Any) -> tuple[int, int, int]:
    """(how many there are, the rank among those that share each one, ranks that they are spread over): SGLang's layer
    says it itself, vLLM's has it in its configuration."""
    if hasattr(module, "moe_tp_rank"):
        return module.num_experts, module.moe_tp_rank, getattr(module, "moe_ep_size", 1)
    parallel = module.moe_config.moe_parallel_config
    return module.global_num_experts, parallel.tp_rank, parallel.ep_size


def _expert(module: Any, parameter: torch.Tensor, part: Part) -> tuple[torch.Tensor, int, int]:
    role, expert = part
    (_, rank, spread), local = _experts(module), module.intermediate_size_per_partition
    if spread != 1 or getattr(module, "use_triton_kernels", False):
        raise NotImplementedError(f"no checksums of experts that are spread over ranks, or laid out transposed; {SKIP}")
    if role == "w2":
        return parameter[expert], 1, rank * local
    first = 0 if role == "w1" else local
    return parameter[expert, first : first + local], 0, rank * local


def _sliced(module: Any, parameter: torch.Tensor, shape: Sequence[int], name: str) -> tuple[torch.Tensor, int, int]:
    """Along the dimension that the layer shares out; all of the tensor where it shares none."""
    for dim, side in ((1, "input_size"), (0, "output_size")):
        share = getattr(module, f"{side}_per_partition", None)
        if share is not None and share != getattr(module, side) and dim < len(shape):  # a bias of rows is whole
            return parameter, dim, module.tp_rank * parameter.shape[dim]
    if tuple(parameter.shape) != tuple(shape):
        raise NotImplementedError(
            f"no checksum of {name}: it is not known how {list(parameter.shape)} are a part of {list(shape)}; {SKIP}"
        )
    return parameter, 0, 0


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

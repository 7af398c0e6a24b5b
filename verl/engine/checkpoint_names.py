"""The names and shapes that a model's tensors have in a saved checkpoint, which are those that rollout engines load.

transformers converts many models as it reads them: the experts of a layer become one tensor, parts of names change.
``save_pretrained`` reverts that for a whole model at once; here it is reverted tensor by tensor, by the same function.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.utils._pytree import tree_leaves

from verl.errors import UserError

try:
    from transformers.core_model_loading import revert_weight_conversion
except ImportError:  # it is not documented; a release without it does for models that are not converted
    revert_weight_conversion = None  # type: ignore[assignment]

Shapes = dict[str, torch.Size]


class CheckpointNames:
    """How a module's tensors are saved, found out once.

    persistent_buffers: the names of the buffers that are saved.
    """

    def __init__(self, module: transformers.PreTrainedModel):
        self._module = module
        saved = module.state_dict()
        self.persistent_buffers = [name for name, _ in module.named_buffers() if name in saved]
        names = [*(name for name, _ in module.named_parameters()), *self.persistent_buffers]
        self._renamed: dict[str, str] = {}
        self._groups: dict[str, frozenset[str]] = {}  # what must be whole to be converted, by each of its names
        if revert_weight_conversion is None:
            _refuse_if_converted(module)
        else:
            self._plan({name: _Traced.source(name, saved[name].shape) for name in names})

    def stream(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """(module name, whole tensor) of all parameters and persistent buffers, as (name, contiguous tensor) of the
        checkpoint. One that is converted waits only for those it is converted with."""
        waiting: dict[str, torch.Tensor] = {}
        for name, tensor in tensors:
            group = self._groups.get(name)
            if group is None:
                yield self._renamed.get(name, name), tensor
            else:
                waiting[name] = tensor
            del tensor  # before the next is gathered
            if group and group <= waiting.keys():
                converted = revert_weight_conversion(self._module, {name: waiting.pop(name) for name in group})
                for saved_name in list(converted):
                    yield saved_name, converted.pop(saved_name).contiguous()

    def _plan(self, sources: dict[str, _Traced]) -> None:
        """Convert tensors without data, all at once as ``save_pretrained`` does, and see what becomes of each."""
        saved: dict[str, Any] = revert_weight_conversion(self._module, dict(sources))
        converted = {}
        for saved_name, tensor in saved.items():
            origin = min(tensor.sources)
            if tensor is not sources[origin]:
                converted[saved_name] = tensor
            elif saved_name != origin:
                self._renamed[origin] = saved_name
        for tensor in converted.values():
            group = tensor.sources.union(*(self._groups.get(name, ()) for name in tensor.sources))
            self._groups |= dict.fromkeys(group, group)
        parts: Shapes = {}
        for group in set(self._groups.values()):
            parts |= _shapes(revert_weight_conversion(self._module, {name: sources[name] for name in group}))
        if parts != _shapes(converted):
            raise UserError(
                f"{type(self._module).__name__}: its weights cannot be streamed to a rollout engine, for transformers "
                f"{transformers.__version__} converts them to a checkpoint's only all at once"
            )


class _Traced(torch.Tensor):
    """Without data; knows the names of those it was made of."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def source(cls, name: str, shape: torch.Size) -> _Traced:
        made = torch.empty(shape, device="meta").as_subclass(cls)
        made.sources = frozenset({name})
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        made = [each for each in tree_leaves(result) if isinstance(each, cls)]
        if made:
            used = (each.sources for each in tree_leaves((args, kwargs)) if isinstance(each, cls))
            sources = frozenset().union(*used)
            for each in made:
                each.sources = sources
        return result


def _shapes(tensors: dict[str, Any]) -> Shapes:
    return {name: tensor.shape for name, tensor in tensors.items()}


def share_conversions(module: transformers.PreTrainedModel, read: transformers.PreTrainedModel | None) -> None:
    """What transformers converted as rank 0 read its model, known to every rank's module. Collective.

    read: that model; None on other ranks.
    """
    conversions = [getattr(read, "_weight_conversions", None)]
    dist.broadcast_object_list(conversions)
    if conversions[0] is not None:
        module._weight_conversions = conversions[0]


def _refuse_if_converted(module: transformers.PreTrainedModel) -> None:
    conversions = getattr(module, "_weight_conversions", None)
    unknown = conversions is None and any(param.ndim > 2 for param in module.parameters())  # fused experts
    if conversions or unknown:
        raise UserError(
            f"{type(module).__name__}: transformers {transformers.__version__} converts its weights when reading them "
            "and has no core_model_loading.revert_weight_conversion to convert them back: install a release that has"
        )

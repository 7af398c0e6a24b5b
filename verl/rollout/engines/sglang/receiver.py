"""Runs in SGLang's scheduler processes: SGLang calls ``receive`` as a custom weight loader, once for each session."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from verl.rollout.weights.parameters import ModelParameters
from verl.rollout.weights.receiver import serve_worker

LOADER = "verl.rollout.engines.sglang.receiver.receive"

_parameters: WeakKeyDictionary[nn.Module, ModelParameters] = WeakKeyDictionary()


def receive(model: nn.Module, _: Any) -> None:
    from sglang.srt.distributed import get_tensor_model_parallel_rank
    from sglang.srt.model_loader.weight_utils import default_weight_loader

    if model not in _parameters:
        _parameters[model] = ModelParameters(model, default_weight_loader)
    serve_worker(get_tensor_model_parallel_rank(), _parameters[model])

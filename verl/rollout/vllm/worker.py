"""Mixed into vLLM's worker (its ``worker_extension_cls``), in each worker process, before it loads the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers import utils
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform

from verl.rollout.vllm.sampler import ContractSampler
from verl.rollout.weights.parameters import ModelParameters
from verl.rollout.weights.receiver import serve_worker


def keep_weight(layer: nn.Module, remove_weight: bool) -> None:
    """Instead of vLLM's ``dispatch_cpu_unquantized_gemm``, which replaces a layer's weight by a packed copy: what a
    weight update writes, and what checksums are made from, has to be what the layer computes with."""
    layer.cpu_linear = torch.nn.functional.linear


if current_platform.is_cpu():
    utils.dispatch_cpu_unquantized_gemm = keep_weight


class Worker:
    model_runner: Any

    def prepare(self) -> None:
        """Once, when the engine is up."""
        self.model_runner.sampler = ContractSampler(self.model_runner)
        self.named_weights = ModelParameters(self.model_runner.get_model(), default_weight_loader)

    def receive_weights(self) -> None:
        with torch.no_grad():
            serve_worker(get_tensor_model_parallel_rank(), self.named_weights)

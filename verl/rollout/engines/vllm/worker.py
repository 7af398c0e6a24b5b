"""Mixed into vLLM's worker (its ``worker_extension_cls``), in each worker process, before it loads the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers import utils
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform

from verl.rollout.engines.vllm.sampler import ContractSampler
from verl.rollout.weights.parameters import ModelParameters
from verl.rollout.weights.receiver import serve_worker


def keep_weight(layer: nn.Module, remove_weight: bool) -> None:
    """Instead of vLLM's ``dispatch_cpu_unquantized_gemm``, which replaces a layer's weight by a packed copy: what a
    weight update writes, and what checksums are made from, has to be what the layer computes with."""
    setattr(layer, "cpu_linear", torch.nn.functional.linear)  # noqa: B010


if current_platform.is_cpu():
    utils.dispatch_cpu_unquantized_gemm = keep_weight


class Worker:
    model_runner: Any

    def prepare(self) -> str | None:
        """Once, when the engine is up. Says why this model's weights could not be updated; None: they can."""
        model = self.model_runner.get_model()
        self.model_runner.sampler = ContractSampler(self.model_runner)
        self.named_weights = ModelParameters(model, default_weight_loader)
        return _no_updates(model, self.model_runner.model_config.quantization)

    def receive_weights(self) -> None:
        with torch.no_grad():
            serve_worker(get_tensor_model_parallel_rank(), self.named_weights)


def _no_updates(model: nn.Module, quantization: str | None) -> str | None:
    """vLLM computes with the parameters that ``load_weights`` writes, except where it makes others of them, once."""
    if quantization:
        return f"it quantizes them ({quantization}) as it loads them"
    for name, module in model.named_modules():
        if hasattr(module, "w13_weight") and current_platform.is_cpu():
            return f"on a CPU it packs experts ({name}) as it loads them"
        if hasattr(module, "kv_b_proj") and hasattr(module, "process_weights_after_loading"):
            return f"its latent attention ({name}) computes further weights of kv_b_proj as it loads it"
    return None

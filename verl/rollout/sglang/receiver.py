"""Runs in SGLang's scheduler processes: SGLang calls ``receive`` as a custom weight loader, once for each session."""

from __future__ import annotations

import json
import os
import traceback
from multiprocessing import AuthenticationError
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from verl.rollout.sglang.parameters import SGLangParameters
from verl.rollout.weights.receiver import serve_session

LOADER = "verl.rollout.sglang.receiver.receive"
SENDERS_VARIABLE = "VERL_WEIGHT_SENDERS"  # JSON: tensor-parallel rank -> [address, key]

_parameters: WeakKeyDictionary[nn.Module, SGLangParameters] = WeakKeyDictionary()


def receive(model: nn.Module, _: Any) -> None:
    """An exception here would end the scheduler, and the engine with it; the sender has been told already."""
    from sglang.srt.distributed import get_tensor_model_parallel_rank

    if model not in _parameters:
        _parameters[model] = SGLangParameters(model)
    rank = get_tensor_model_parallel_rank()
    address, key = json.loads(os.environ[SENDERS_VARIABLE])[str(rank)]
    try:
        serve_session(address, bytes.fromhex(key), rank, _parameters[model])
    except (AuthenticationError, EOFError, OSError):
        traceback.print_exc()

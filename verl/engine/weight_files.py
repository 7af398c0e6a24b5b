"""Faults in a model's weights, in its files or in memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from verl.errors import UserError

LARGEST = 1e6  # parameters of language models are below 1e3
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.\d+\.")


def check_loaded(named: Iterable[tuple[str, torch.Tensor]], unexpected: Iterable[str], path: str) -> None:
    """UserError if the files hold layers that the model does not have, or numbers that are not finite.

    named: the loaded tensors. unexpected: names in the files that the model has no place for. path: ``model.path``."""
    if layers := sorted(name for name in unexpected if LAYER.search(name)):
        raise UserError(
            f"model.path={path}: its files hold {layers[0]} ({len(layers)} tensors in all), which the model of its "
            "config.json does not have. Correct num_hidden_layers there, or name the model that the files belong to"
        )
    for name, tensor in named:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"model.path={path}: {name}{_file_of(path, name)} holds numbers that are not finite. The files are "
                "damaged, or the run that saved them had diverged: name another model or an earlier checkpoint"
            )


def broken_tensor(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """What is wrong with the first tensor that holds a number that is not finite or over LARGEST; "" if none does."""
    for name, tensor in named:
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not math.isfinite(largest):
            return f"{name} is not finite"
        if largest > LARGEST:
            return f"{name} holds numbers up to {largest:.2g}"
    return ""


def _file_of(path: str, name: str) -> str:
    """The text " in FILE", if a safetensors file of this folder holds the tensor."""
    for file in sorted(Path(path).expanduser().glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118  (it has no __contains__)
                return f" in {file.name}"
    return ""

"""An engine's saved state as a Hugging Face folder, in one process, whatever number of ranks saved it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader

from verl.config.sections.parts import ModelConfig
from verl.engine import checkpoint
from verl.engine.model import read_config, read_model, write_model
from verl.errors import UserError

GROUP = 1 << 28  # elements that are read from the checkpoint at a time


@torch.no_grad()
def export_checkpoint(
    saved: Path, out: Path, model: ModelConfig, dtype: torch.dtype | None, tokenizer: Any
) -> torch.dtype:
    """What ``TrainEngine.export_hf`` of that engine would write to ``out``; gives the tensors' type.

    saved: what ``TrainEngine.save`` wrote. model: that training began with; parameters are the checkpoint's, buffers
    and the layout of the files its own. dtype: None for that of this model. UserError where model and checkpoint do not
    hold the same parameters.
    """
    try:
        kind = json.loads((saved / checkpoint.STATE).read_text())["kind"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{saved} is not the saved state of a model: {error}") from error
    config = read_config(model, kind)
    chosen = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    hf = read_model(model, kind, config, chosen, seed=0)
    parameters = dict(hf.named_parameters())
    _refuse_others(saved, parameters, model.path)
    for names in _groups(parameters):
        masters = {f"model.{name}": torch.empty(parameters[name].shape) for name in names}
        try:
            checkpoint.load(saved, masters)
        except checkpoint.CheckpointError as error:
            raise UserError(f"{saved} does not fit model.path={model.path}: {error.__cause__}") from error
        for name in names:
            parameters[name].copy_(masters[f"model.{name}"])
    write_model(hf, out, None)
    tokenizer.save_pretrained(out)
    return chosen


def _refuse_others(saved: Path, parameters: dict[str, torch.nn.Parameter], path: str) -> None:
    """What the checkpoint has beyond the model's parameters."""
    held = HuggingFaceStorageReader(str(saved)).read_metadata().state_dict_metadata
    weights = {name.removeprefix("model.") for name in held if name.startswith("model.")}
    if unknown := weights - parameters.keys():
        raise UserError(
            f"{saved} holds {min(unknown)} ({len(unknown)} tensors in all), which model.path={path} does not have: "
            "name the model that training began with"
        )


def _groups(parameters: dict[str, torch.nn.Parameter]) -> Iterator[list[str]]:
    names: list[str] = []
    for name, parameter in parameters.items():
        if names and sum(math.prod(parameters[each].shape) for each in names) + parameter.numel() > GROUP:
            yield names
            names = []
        names.append(name)
    yield names

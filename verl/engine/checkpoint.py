"""An engine's state in a folder: tensors as safetensors by torch's distributed checkpoint (DCP), the rest as JSON.

Every rank writes its own shards; any number of ranks reads them. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from verl.engine.distributed import rank, world_size
from verl.errors import UserError

STATE = "engine.json"


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or is of something else."""


def save(folder: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Into ``folder``, which is made if need be and holds no earlier checkpoint. Collective."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer, no_dist=world_size() == 1)
    if rank() == 0:
        with (folder / STATE).open("w") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def load(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Fill ``tensors`` in place; gives the state. Collective."""
    try:
        state = json.loads((folder / STATE).read_text())
        reader = HuggingFaceStorageReader(str(folder))
        dcp.load(dict(tensors), storage_reader=reader, no_dist=world_size() == 1)
    except Exception as error:
        raise CheckpointError(f"the checkpoint in {folder} cannot be read: {error}") from error
    return state

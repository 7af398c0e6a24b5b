"""An engine's state in a folder: tensors as safetensors by torch's distributed checkpoint (DCP), the rest as JSON.

Every rank writes its own shards; any number of ranks reads them. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from verl.engine.distributed import on_first_rank, world_size
from verl.engine.offload import local
from verl.errors import UserError

STATE = "engine.json"
FILE = 1 << 30  # bytes of a rank's tensors in one file, or one larger tensor; to write a file, torch holds it twice


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or is of another model."""


def save(folder: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Into ``folder``, which is made if need be and holds no earlier checkpoint. Collective. An OSError of one rank
    (its disk is full) is raised on every rank."""
    on_first_rank(lambda: _write_state(folder, state))
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    try:
        with _quiet():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=world_size() == 1)
    except CheckpointException as error:
        raise _cause(error) from error


def _files(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """The number of the file that each goes to, from 1."""
    numbers: dict[str, int] = {}
    number, room = 0, 0
    for name, tensor in tensors.items():
        if not number or local(tensor).nbytes > room:
            number, room = number + 1, FILE
        numbers[name] = number
        room -= local(tensor).nbytes
    return numbers


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / STATE).open("w") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def load(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Fill ``tensors`` in place; gives the state. Collective."""
    reader = HuggingFaceStorageReader(str(folder))
    try:
        state = json.loads((folder / STATE).read_text())
        _check(reader, tensors)
        with _quiet():
            dcp.load(dict(tensors), storage_reader=reader, no_dist=world_size() == 1)
    except (Exception, CheckpointException) as error:  # DCP and safetensors raise many kinds for a damaged file
        cause = _cause(error) if isinstance(error, CheckpointException) else error
        raise CheckpointError(
            f"the checkpoint in {folder} cannot be read: {cause}. If it is another model's: name another "
            "trainer.default_local_dir, or start anew with trainer.resume_mode=disable"
        ) from error
    return state


def _check(reader: HuggingFaceStorageReader, tensors: dict[str, torch.Tensor]) -> None:
    """Every tensor is there, of the right size, and whole: DCP itself leaves holes where a rank's file is missing."""
    metadata = reader.read_metadata().state_dict_metadata
    saved = {name: each for name, each in metadata.items() if isinstance(each, TensorStorageMetadata)}
    if missing := tensors.keys() - saved.keys():
        raise ValueError(f"it lacks {min(missing)} ({len(missing)} tensors in all)")
    for name, tensor in tensors.items():
        parts = sum(chunk.sizes.numel() for chunk in saved[name].chunks)
        if saved[name].size != tensor.shape or parts != tensor.numel():
            held = f"{parts:,} elements of shape {tuple(saved[name].size)}"
            raise ValueError(f"of {name}, shape {tuple(tensor.shape)}, it holds {held}")


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong on a rank: an OSError if there is one."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])


def _quiet() -> warnings.catch_warnings:
    """DCP remarks that a single process has no process group."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)

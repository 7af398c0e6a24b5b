"""Weights as a Hugging Face folder that trainer and servers both see: written once, read by each server.

<folder>/<this run's token>/version-7/   config.json, model-00001.safetensors, ..., model.safetensors.index.json
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from verl.errors import UserError
from verl.rollout.client.backend import WeightStream

SHARD_BYTES = 2 << 30
INDEX = "model.safetensors.index.json"
# What a model's folder has besides weights.
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")


class SavedWeights:
    """A stream that can be read any number of times, and the folder that it is in."""

    def __init__(self, folder: Path, shard_of: dict[str, str]):
        self.folder, self._shard_of = folder, shard_of

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for shard in dict.fromkeys(self._shard_of.values()):
            with safe_open(self.folder / shard, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    yield name, tensors.get_tensor(name)

    def beginnings(self, rows: int, most_elements: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The first rows of tensors that are not larger than that, without a look at the rest."""
        for shard in dict.fromkeys(self._shard_of.values()):
            with safe_open(self.folder / shard, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    if part.get_shape() and math.prod(part.get_shape()) <= most_elements:
                        yield name, part[:rows]


class WeightFolder:
    """Writes versions of a model. A version has its name only once all of it is there.

    folder: seen under this path by every server. model_path: a local folder, whose configuration goes along.
    dtype: that floating point tensors are written in; None: their own.
    """

    def __init__(self, folder: str | Path, model_path: str | Path, dtype: torch.dtype | None = None):
        self._folder = Path(folder).expanduser().absolute() / secrets.token_hex(4)
        self._model_path, self._dtype = Path(model_path).expanduser(), dtype

    def write(self, stream: WeightStream, version: int) -> SavedWeights:
        final = self._folder / f"version-{version}"
        partial = final.with_suffix(".partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            shard_of = self._write(stream, partial)
            shutil.rmtree(final, ignore_errors=True)  # the same version once more
            partial.rename(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"actor_rollout_ref.rollout.server_weights_dir: {partial} could not be written ({error}); "
                "it takes two versions of the weights for a moment"
            ) from error
        return SavedWeights(final, shard_of)

    def forget(self, saved: WeightStream) -> None:
        if isinstance(saved, SavedWeights):
            shutil.rmtree(saved.folder, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, stream: WeightStream, folder: Path) -> dict[str, str]:
        for pattern in SIDE_FILES:
            for path in self._model_path.glob(pattern):
                if not path.name.endswith(".index.json"):
                    shutil.copyfile(path, folder / path.name)
        shard_of: dict[str, str] = {}
        total = 0
        for number, bucket in enumerate(host_buckets(stream, SHARD_BYTES, self._dtype), start=1):
            shard = dict(bucket)
            name = f"model-{number:05d}.safetensors"
            save_file(shard, folder / name, metadata={"format": "pt"})
            _flush(folder / name)
            shard_of |= dict.fromkeys(shard, name)
            total += sum(tensor.nbytes for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": shard_of}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
        _flush(folder / INDEX)
        return shard_of


def host_buckets(
    stream: WeightStream, size: int, dtype: torch.dtype | None
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Of at most ``size`` bytes, except for single tensors that are larger; copies on the CPU, as ``host_copy`` makes
    them."""
    bucket: list[tuple[str, torch.Tensor]] = []
    filled = 0
    for name, tensor in stream:
        copied = host_copy(tensor, dtype)
        if bucket and filled + copied.nbytes > size:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, copied))
        filled += copied.nbytes
    if bucket:
        yield bucket


def host_copy(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """On the CPU, sharing memory with nothing. dtype: of floating point tensors; None: their own."""
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", wanted, copy=True, memory_format=torch.contiguous_format)


def _flush(path: Path) -> None:
    """A server on another machine reads it next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Processes forked from one server that has imported torch, transformers and verl once for all of them: a fresh
interpreter takes 7 s of a core to do so."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

FORKS = multiprocessing.get_context("forkserver")
# Importing these touches no GPU and starts no thread of theirs.
FORKS.set_forkserver_preload(
    [
        "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.llama.modeling_llama",
        "verl.engine",
        "verl.rollout.weights.receiver",
        "verl.trainer.ppo.run",
        "pandas",
    ]
)


def run_forked(main: Callable[..., int], *args: Any) -> subprocess.CompletedProcess[str]:
    """``main(*args)``, which gives an exit code, in a process of its own; as ``subprocess.run`` gives it back."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        process = FORKS.Process(target=_main, args=(outputs, main, args))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
        stdout, stderr = (path.read_text() if path.exists() else "" for path in outputs)
    return subprocess.CompletedProcess(args, process.exitcode, stdout, stderr)


def _main(outputs: tuple[Path, Path], main: Callable[..., int], args: tuple) -> None:
    for number, path in enumerate(outputs, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.exit(main(*args))


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, backend: str = "gloo") -> list[Any]:
    """``function(rank, world_size, *args)`` in as many processes with a group of torch's; their answers (numpy, not
    tensors, for the processes end), in rank order. With NCCL, each sees the GPU of its rank alone."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = [FORKS.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            FORKS.Process(
                target=_rank,
                args=(rank, world_size, f"file://{folder}/store", backend, pipes[rank][1], function, args),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for _, writer in pipes:
            writer.close()
        try:
            answers = _answers([reader for reader, _ in pipes])
        finally:
            for process in processes:
                process.join(timeout=10)
                process.kill()
    return answers


def _answers(readers: list[Connection]) -> list[Any]:
    """The first error is raised at once: the others may wait for that rank."""
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + 240
    while waiting := {reader: rank for rank, reader in enumerate(readers) if rank not in answers}:
        ready = wait(list(waiting), timeout=deadline - time.monotonic())
        if not ready:
            raise TimeoutError(f"ranks {list(waiting.values())} do not answer")
        for reader in ready:
            answers[waiting[reader]] = _answer(reader, waiting[reader])
    return [answers[rank] for rank in range(len(readers))]


def _answer(reader, rank: int) -> Any:
    try:
        ok, answer = reader.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died") from None
    if not ok:
        raise RuntimeError(f"rank {rank}:\n{answer}")
    return answer


def _rank(
    rank: int, world_size: int, store: str, backend: str, writer, function: Callable[..., Any], args: tuple
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if "nccl" in backend:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[rank] if seen else str(rank)
    try:
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=world_size)
        writer.send((True, function(rank, world_size, *args)))
        dist.destroy_process_group()
    except BaseException:
        writer.send((False, traceback.format_exc()))

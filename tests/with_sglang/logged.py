"""SGLang in a process of its own, and what it says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl.rollout.client.engine import ClientEngine
from verl.rollout.engines.sglang.arguments import SGLANG
from verl.rollout.processes.adapter import EngineSettings
from verl.rollout.processes.subprocess_backend import SubprocessBackend


@contextmanager
def sglang(model: Path, log: Path, *, length: int, at_once: int, prefill: int, cache: int) -> Iterator[ClientEngine]:
    """length: of a prompt and its response. at_once: responses. prefill: tokens of one forward.
    cache: in tokens."""
    settings = EngineSettings(
        model_path=str(model),
        device="cpu",
        dtype="float32",
        max_model_len=length,
        max_num_seqs=at_once,
        max_prefill_tokens=prefill,
        extra={"max_total_tokens": cache},
    )
    backend = SubprocessBackend(SGLANG, settings, log=log, bucket_bytes=1 << 20)
    try:
        yield ClientEngine(backend, eos_token_ids=[1], max_model_len=length, vocab_size=16)
    finally:
        backend.close()
